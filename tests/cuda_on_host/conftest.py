"""Compiles csrc/cuda/ for the CPU (see warp_on_host.h): fastkd::relation_kl_cuda then takes CPU tensors."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastkd.ops import backends, sequences
from fastkd.ops.relation_kl import Call

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="session")
def compile_on_host(tmp_path_factory):
    """compile_on_host(op) -> the library of <op>_on_host.cpp, whose op is loaded into torch."""

    def compiled(op: str, optimisation: str = "-O1") -> ctypes.CDLL:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            pytest.skip(f"no C++ compiler: {compiler} is not there")
        if backends.cuda_library is not None:
            pytest.skip("the CUDA library is loaded; its kernels run on the GPU, tests/ops proves them there")
        source, path = HERE / f"{op}_on_host.cpp", tmp_path_factory.mktemp("cuda_on_host") / f"{op}.so"
        installed = Path(torch.__file__).parent
        flags = ["-std=c++20", optimisation, "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
        links = ["-L", installed / "lib", "-ltorch", "-ltorch_cpu"]
        command = [compiler, *flags, "-I", installed / "include", source, *links, "-o", path]
        subprocess.run([*map(str, command)], check=True)
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path))

    return compiled


@pytest.fixture(scope="session")
def library(compile_on_host):
    return compile_on_host("relation_kl", "-O2")


@pytest.fixture
def kernels(library):
    """kernels(call, seed=0, sm=90) -> losses (B,), gradient, right gradient, by the op's schema.

    `seed` draws the order in which threads run, `sm` the shared memory there is.
    """

    def run(call: Call, seed: int = 0, sm: int = 90):
        library.set_device(SHARED_LIMIT[sm], seed)
        return torch.ops.fastkd.relation_kl_cuda(*call)

    return run


@pytest.fixture
def call():
    """call(student, teacher, num_heads, **layout) -> the schema's arguments, as fastkd.relation_kl would pass them."""

    def made(student, teacher, num_heads, *, mask=None, cu_seqlens=None, causal=False, divisor=1, with_grad=True):
        (left, right), (teacher_left, teacher_right) = (
            x if isinstance(x, tuple) else (x, None) for x in (student, teacher)
        )
        starts, lengths, order, longest = sequences.layout(left, mask, cu_seqlens, None)
        rest = (starts, lengths, order, longest, num_heads, causal, divisor, with_grad)
        return Call(left, right, teacher_left, teacher_right, *rest)

    return made
