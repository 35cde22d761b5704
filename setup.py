"""The extension modules and the decision what to build; everything else stands in pyproject.toml.

FASTKD_BUILD=auto   (default) build what can be built here; what cannot is named and left out
FASTKD_BUILD=cpu    the CPU libraries, or fail
FASTKD_BUILD=cuda   the CPU libraries and the CUDA library, or fail
FASTKD_BUILD=none   no compiled part: every op runs on its reference or Triton backend
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

CHOICES = ("auto", "cpu", "cuda", "none")
X86_64 = platform.machine() in ("x86_64", "AMD64")

# One library per instruction set; fastkd/ops/backends.py loads the one that fits the CPU. The names of the
# capabilities, and the macros that go with them, are torch's own.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
CPU_LIBRARIES = {"default": ("DEFAULT", [])}
if X86_64:
    CPU_LIBRARIES |= {
        "avx2": ("AVX2", AVX2),
        "avx512": ("AVX512", AVX512),
        "avx512_bf16": ("AVX512", [*AVX512, "-mavx512bf16"]),
    }

# Machine code for these, and PTX for what comes after; the macros choose torch's ABI as it was in 2.11.
CUDA_ARCHS = ("sm_80", "sm_90a")
CUDA_FLAGS = [
    "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in CUDA_ARCHS),
    "-gencode=arch=compute_80,code=compute_80",
]  # fmt: skip


def cpu_extensions(optional: bool) -> list[Extension]:
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    # GCC takes the intrinsics' own undefined registers for uninitialised variables.
    common = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is serial without it
    libraries = [
        CppExtension(
            f"fastkd._cpu_{name}",
            sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc/cpu").glob("*.h"))),
            extra_compile_args=[
                *common, *openmp, *flags, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}",
            ],
            extra_link_args=openmp,
            optional=optional,
        )
        for name, (capability, flags) in CPU_LIBRARIES.items()
    ]  # fmt: skip
    facts = Extension(
        "fastkd._build",
        ["csrc/bindings.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-O1", "-g0", "-fvisibility=hidden"],
        language="c++",
        optional=optional,
    )
    return [*libraries, facts]


def cuda_missing() -> str | None:
    """Why the CUDA library cannot be built here, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if CUDA_HOME is None:
        return "nvcc was not found: set CUDA_HOME to the CUDA toolkit"
    return None


def cuda_extension(optional: bool) -> Extension:
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "fastkd._cuda",
        sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
        depends=sorted(map(str, [*Path("csrc/cuda").glob("*.cuh"), *Path("csrc/cuda").glob("*.h")])),
        extra_compile_args={"cxx": ["-O3"], "nvcc": CUDA_FLAGS},
        optional=optional,
    )


def build_command():
    import torch
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = "build/objects"  # kept by editable installs too: only what has changed is compiled again

        def build_extensions(self):
            self.built = []
            try:
                super().build_extensions()
            except RuntimeError as error:  # torch's, before anything is compiled: nvcc is of another CUDA than torch
                cuda = [ext for ext in self.extensions if ext.name == "fastkd._cuda"]
                if not any(ext.optional for ext in cuda):
                    raise
                print(f"fastkd: no CUDA library, because {error}", file=sys.stderr)
                self.extensions = [ext for ext in self.extensions if ext not in cuda]
                super().build_extensions()

        def build_extension(self, ext):
            if ext.name == "fastkd._build":
                ext.define_macros += [
                    ("FASTKD_TORCH_VERSION", f'"{torch.__version__}"'),
                    ("FASTKD_CPU_LIBRARIES", f'"{" ".join(name for name in self.built if name != "_cuda")}"'),
                    ("FASTKD_CUDA_ARCHS", f'"{" ".join(CUDA_ARCHS) if "_cuda" in self.built else ""}"'),
                ]
            # The libraries share their source: without a folder each, they would overwrite each other's objects.
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
                self.built.append(ext.name.removeprefix("fastkd.").removeprefix("_cpu_"))
            except (
                RuntimeError,
                OSError,
            ) as error:  # what torch raises; setuptools forgives a CompileError if optional
                raise CompileError(f"{ext.name} was not built: {error}") from error
            finally:
                self.build_temp = shared

    return Build


def compiled_part() -> dict:
    """The arguments of setup() that build the compiled part; none where it is not wanted or cannot be built."""
    choice = os.environ.get("FASTKD_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"FASTKD_BUILD={choice!r}; allowed are {', '.join(CHOICES)}")
    if choice == "none":
        return {}
    try:
        missing = None if choice == "cpu" else cuda_missing()
        if choice == "cuda" and missing:
            raise SystemExit(f"FASTKD_BUILD=cuda: {missing}")
        if missing:
            print(f"fastkd: no CUDA library, because {missing}", file=sys.stderr)
        optional = choice == "auto"
        cuda = [] if choice == "cpu" or missing else [cuda_extension(optional)]
        # The facts come last: they tell which libraries were built.
        extensions = [*cuda, *cpu_extensions(optional)]
        return {"ext_modules": extensions, "cmdclass": {"build_ext": build_command()}}
    except ImportError as error:
        if choice != "auto":
            raise
        print(
            f"fastkd: no compiled part, because {error}; install torch first and use --no-build-isolation",
            file=sys.stderr,
        )
        return {}


setup(**compiled_part())
