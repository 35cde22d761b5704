"""The extension modules and the decision what to build; everything else stands in pyproject.toml.

FASTKD_BUILD=auto   (default) build what can be built here; what cannot is named and left out
FASTKD_BUILD=cpu    the CPU libraries, or fail
FASTKD_BUILD=none   no compiled part: every op runs on its reference or Triton backend
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

CHOICES = ("auto", "cpu", "none")
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
    return [*libraries, facts]  # the facts come last: they tell which libraries were built


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
            super().build_extensions()

        def build_extension(self, ext):
            if ext.name == "fastkd._build":
                ext.define_macros += [
                    ("FASTKD_TORCH_VERSION", f'"{torch.__version__}"'),
                    ("FASTKD_CPU_LIBRARIES", f'"{" ".join(self.built)}"'),
                ]
            # The libraries share their source: without a folder each, they would overwrite each other's objects.
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
                self.built.append(ext.name.removeprefix("fastkd._cpu_"))
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
        return {"ext_modules": cpu_extensions(optional=choice == "auto"), "cmdclass": {"build_ext": build_command()}}
    except ImportError as error:
        if choice != "auto":
            raise
        print(
            f"fastkd: no compiled part, because {error}; install torch first and use --no-build-isolation",
            file=sys.stderr,
        )
        return {}


setup(**compiled_part())
