"""What fastkd found on this machine: `python -m fastkd.info`, or `fastkd info`."""

import importlib.metadata
import platform
from pathlib import Path

import torch

import fastkd
from fastkd.ops import backends

_PACKAGES = ("torch", "transformers", "triton", "datasets", "accelerate")
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(package: str) -> str:
    # From the metadata: importing transformers alone takes longer than everything else here.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name, and those of its features that kernels care about; Linux says both in /proc/cpuinfo."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.processor() or platform.machine()), [f for f in _FEATURES if f in flags]


def _compiled_part() -> list[tuple[str, str]]:
    try:
        from fastkd import _build
    except ImportError as error:
        return [("compiled part", f"missing ({error})")]
    return [
        ("compiled part", f"for torch {_build.torch_version}, by {_build.compiler}"),
        ("  CPU libraries", ", ".join(_build.cpu_libraries) or "none"),
        ("  CUDA architectures", ", ".join(_build.cuda_archs) or "none"),
    ]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return [f"none (torch is built {'for CUDA ' + torch.version.cuda if torch.version.cuda else 'without CUDA'})"]
    return [
        f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _backends_of(op: str, device: torch.device) -> list[tuple[str, str]]:
    """Per dtype what `auto` takes, then why the others cannot run; dtypes of the same answer share a line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for dtype in _DTYPES:
        reasons = {name: backends.missing_reason(op, name, device, dtype) for name in backends.BACKENDS}
        chosen = next(name for name in backends.preferences(op, device) if reasons[name] is None)
        others = [f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
        lines.setdefault((chosen, *others), []).append(str(dtype).removeprefix("torch."))
    return [
        (f"{op} on {device.type}" if i == 0 else "", line)
        for (chosen, *others), dtypes in lines.items()
        for i, line in enumerate([f"{chosen} for {', '.join(dtypes)}", *others])
    ]


def report() -> str:
    """Versions, CPU and GPUs, and for each op which backend runs and why the others do not: text of several lines."""
    cpu, features = _cpu()
    rows = [
        ("fastkd", f"{fastkd.__version__} in {Path(fastkd.__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((package, _version(package)) for package in _PACKAGES),
        ("CPU", cpu),
        ("  features", ", ".join(features) or "unknown"),
        ("  threads", str(torch.get_num_threads())),
        ("  served by", backends.cpu_library or f"no library: {backends.cpu_library_missing}"),
        *(("GPU", gpu) for gpu in _gpus()),
        ("  served by", backends.cuda_library or f"no library: {backends.cuda_library_missing}"),
        *_compiled_part(),
    ]
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for op in backends.registered_ops():
        for device in devices:
            rows += _backends_of(op, device)
    column = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{column}}{value}".rstrip() for name, value in rows)


if __name__ == "__main__":
    print(report())
