"""Which implementation of an op runs.

Every backend of an op is an op of its own in torch's dispatcher (`fastkd::relation_kl_cpp`, ...), all with
the schema that stands in `fastkd/ops/<op>.py`. The choice is made here, in Python, before the call, so that
`torch.compile` guards on it.

An explicit choice (the `backend=` argument, `use_backend`, or the environment variable `FASTKD_BACKEND`)
must run or raise with the reason; `"auto"` may fall back and says so once in the log.
"""

import importlib.machinery
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from fastkd.ops.fastest import measured_order

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Why an op cannot run on a backend for tensors of this device, dtype and width; None where it can. The width is that of
# the rows the kernel works on (one relation head, for relation_kl); 0 asks about ordinary ones.
Support = Callable[[torch.device, torch.dtype, int], str | None]

# What the kernels of an op take, unless it says otherwise.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_logger = logging.getLogger("fastkd")
_told: set[str] = set()
_default = "auto"
_supports: dict[str, dict[str, Support]] = {}
_preferences: dict[str, dict[str, tuple[str, ...]]] = {}


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}={name!r} is not a backend; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


def register(op: str, supports: dict[str, Support], preferred: dict[str, tuple[str, ...]]) -> None:
    """Declare an op's backends, and for each device type the order in which `"auto"` tries them."""
    _supports[op] = supports
    _preferences[op] = preferred


def register_kernels(op: str, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES, widest: int | None = None) -> None:
    """`register` an op that has a reference and all kernels: C++ on the CPU, Triton and CUDA C++ on CUDA devices.

    dtypes: what the kernels take. widest: the width up to which those on CUDA devices take it; None is any.
    """
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    taken = f"{', '.join(names)} and {last}"

    def kernel(name: str, device_type: str, missing: Callable[[], str | None], widest: int | None = None) -> Support:
        where = {"cpu": "the CPU", "cuda": "CUDA devices"}[device_type]

        def support(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
            if device.type != device_type:
                return f"the {name} kernel runs on {where}, the tensors are on {device.type}"
            if dtype not in dtypes:
                return f"the {name} kernel takes {taken}, not {dtype}"
            if widest is not None and width > widest:
                return f"the {name} kernel takes widths up to {widest}, not {width}"
            return missing()

        return support

    supports = {
        "reference": lambda device, dtype, width: None,
        "cpp": kernel("C++", "cpu", lambda: cpu_library_missing),
        "triton": kernel("Triton", "cuda", lambda: None if triton_installed else "triton is not installed", widest),
        "cuda": kernel("CUDA", "cuda", lambda: cuda_library_missing, widest),
    }
    register(op, supports, {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")})


def registered_ops() -> tuple[str, ...]:
    return tuple(_supports)


def registered_backends(op: str) -> tuple[str, ...]:
    return tuple(_supports[op])


def preferences(
    op: str, device: torch.device, dtype: torch.dtype | None = None, width: int = 0, length: int = 0
) -> tuple[str, ...]:
    """The backends that `"auto"` tries for tensors on this device, in that order: as measured, else as registered."""
    measured = measured_order(op, device, dtype, width, length) if device.type == "cuda" and dtype else None
    return measured or _preferences[op].get(device.type, ("reference",))


def missing_reason(op: str, backend: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> str | None:
    """Why `op` cannot run on `backend` for tensors of this device, dtype and width, or None where it can."""
    support = _supports[op].get(backend)
    return f"{op} has no {backend} implementation" if support is None else support(device, dtype, width)


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype, width: int = 0, length: int = 0) -> str:
    """The backend that runs: the explicit choice if there is one, else the first of the device's preferences that can.

    `length` is that of the longest sequence, where the op has sequences: `"auto"` may depend on it.

    Raises:
        ValueError: the name is no backend.
        RuntimeError: an explicitly chosen backend cannot run here; the message says why.
    """
    asked = _checked(backend, "backend")
    if asked == "auto":
        asked = _default
    if asked != "auto":
        reason = missing_reason(op, asked, device, dtype, width)
        if reason is not None:
            raise RuntimeError(f"{op}: backend={asked!r} was asked for but cannot run: {reason}")
        return asked
    for name in preferences(op, device, dtype, width, length):
        reason = missing_reason(op, name, device, dtype, width)
        if reason is None:
            return name
        if not torch.compiler.is_compiling():
            _tell_once(f"{op} on {device.type} falls back from {name}: {reason}")
    raise RuntimeError(f"{op}: no backend can run on {device.type} with {dtype}")


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _logger.warning(message)


@contextmanager
def use_backend(name: str):
    """Within the block every op runs on this backend, or raises with the reason why it cannot.

    Args:
        name: `"auto"`, `"reference"`, `"cpp"`, `"triton"` or `"cuda"`. A `backend=` argument still wins.
    """
    global _default
    before, _default = _default, _checked(name, "use_backend")
    try:
        yield
    finally:
        _default = before


# The instruction sets that have a library of their own, each including those before it.
_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


def cpu_capability() -> str:
    """The richest of the instruction sets `default`, `avx2`, `avx512` and `avx512_bf16` that this CPU has."""
    # torch's own answer honours ATEN_CPU_CAPABILITY, which is how the slower paths are tested on a fast machine.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx512" and torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return capability if capability in _CAPABILITIES else "default"


def _load_cpu_library() -> tuple[str | None, str | None]:
    """Load the compiled CPU ops. Returns the library's name, or why there is none and what to do about it."""
    rebuild = "run `pip install --no-build-isolation -e .` in the source tree (or reinstall fastkd) to build it"
    package = Path(__file__).resolve().parent.parent
    capability = cpu_capability()
    # A compiler too old for the CPU's own instruction set leaves the next lesser library.
    usable = reversed(_CAPABILITIES[: _CAPABILITIES.index(capability) + 1])
    paths = [package / f"_cpu_{name}{suffix}" for name in usable for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    library = next((path for path in paths if path.exists()), None)
    if library is None:
        return None, f"the compiled part _cpu_{capability} was not built; {rebuild}"
    name = library.name.partition(".")[0]
    try:
        from fastkd import _build

        if torch.__version__ != _build.torch_version:
            built_for = f"built for torch {_build.torch_version}, this is {torch.__version__}"
            return None, f"the compiled part was {built_for}; {rebuild}"
        torch.ops.load_library(library)
    except (ImportError, OSError) as error:
        return None, f"the compiled part {name} does not load ({error}); {rebuild}"
    return name, None


def _load_cuda_library() -> tuple[str | None, str | None]:
    """Load the compiled CUDA ops. They keep to torch's stable ABI: one build serves every torch from 2.11 on."""
    if torch.version.cuda is None:
        return None, "torch is built without CUDA"
    package = Path(__file__).resolve().parent.parent
    paths = [package / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    library = next((path for path in paths if path.exists()), None)
    rebuild = "run `FASTKD_BUILD=cuda pip install --no-build-isolation -e .` in the source tree to build it"
    if library is None:
        return None, f"the compiled part _cuda was not built; {rebuild}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return None, f"the compiled part _cuda does not load ({error}); {rebuild}"
    return library.name.partition(".")[0], None


cpu_library, cpu_library_missing = _load_cpu_library()
cuda_library, cuda_library_missing = _load_cuda_library()
# Looked for, not imported: importing triton costs as much as half of torch.
triton_installed: bool = importlib.util.find_spec("triton") is not None
_default = _checked(os.environ.get("FASTKD_BACKEND", "auto"), "FASTKD_BACKEND")
