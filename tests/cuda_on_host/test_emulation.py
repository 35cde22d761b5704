"""The emulation that proves the CUDA kernels notices what it is there to notice."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SEEDS = range(8)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not there")
    path = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source, include = Path(__file__).with_name("emulation.cpp"), Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-I", include, source, "-o", path]
    subprocess.run([*map(str, command)], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("name", ["exchange", "copy"])
def test_a_missing_barrier_or_wait_shows_in_the_result(kernels, name):
    kernel = getattr(kernels, name)
    assert all(kernel(True, seed) == 0 for seed in SEEDS)
    assert any(kernel(False, seed) > 0 for seed in SEEDS)


def test_lanes_that_part_are_refused(kernels):
    assert kernels.astray(False, 0) == 0
    assert all(kernels.astray(True, seed) == -1 for seed in SEEDS)


def test_writing_behind_shared_memory_is_refused(kernels):
    assert kernels.overrun(0, 0) == 0
    assert kernels.overrun(1, 0) == -1


@pytest.mark.parametrize("transposed", [False, True], ids=["by columns", "by rows"])
def test_products_of_fragments_are_matrix_products(kernels, transposed):
    assert kernels.product(transposed, 0) == 0


def test_waiting_for_a_later_block_or_not_for_all_earlier_ones_is_refused(kernels):
    assert all(kernels.waiting(0, seed) == 0 for seed in SEEDS)
    assert kernels.waiting(1, 0) == kernels.waiting(-1, 0) == -1
