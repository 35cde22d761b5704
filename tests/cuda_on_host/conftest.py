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

SOURCE = Path(__file__).with_name("relation_kl_on_host.cpp")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not there")
    if backends.cuda_library is not None:
        pytest.skip("the CUDA library is loaded; its kernels run on the GPU, tests/ops proves them there")
    path = tmp_path_factory.mktemp("cuda_on_host") / "relation_kl.so"
    installed = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    links = ["-L", installed / "lib", "-ltorch", "-ltorch_cpu"]
    command = [compiler, *flags, "-I", installed / "include", SOURCE, *links, "-o", path]
    subprocess.run([*map(str, command)], check=True)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


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
