"""The benchmark of cos_nce compares providers that compute the same thing, on the shapes it says."""

import pytest
import torch

from fastkd.benchmarks.harness import measure
from fastkd.benchmarks.kernels.cos_nce import DTYPES, SHAPES, case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES["tiny"], ids=str)
def test_all_providers_agree(shape, dtype):
    made = case(*shape, dtype=dtype, device="cpu")
    made.providers[:] = [provider for provider in made.providers if "torch.compile" not in provider.name]
    measured = measure(made, budget=0.0)
    assert {row["status"] for row in measured} == {"ok"}
    assert {"pairwise", "collapsed", "fastkd reference", "copy of the bytes"} <= {row["provider"] for row in measured}


def test_the_issues_shapes_are_measured():
    assert {(4096, 0, 768), (64, 128, 768)} <= set(SHAPES["small"])


def test_the_limit_copies_three_arrays():
    made = case(5, 0, 12, dtype=torch.float32, device="cpu")
    copied = made.providers[-1].forward()
    assert 2 * copied.nbytes == 3 * 5 * 12 * 4
