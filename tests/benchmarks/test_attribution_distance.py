"""The benchmark of attribution_distance compares providers that compute the same thing, on the shapes it says."""

import pytest
import torch

from fastkd.benchmarks.harness import measure
from fastkd.benchmarks.kernels.attribution_distance import DTYPES, SHAPES, case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES["tiny"], ids=str)
def test_all_providers_agree(shape, dtype):
    made = case(*shape, dtype=dtype, device="cpu")
    made.providers[:] = [provider for provider in made.providers if "torch.compile" not in provider.name]
    measured = measure(made, budget=0.0)
    assert {row["status"] for row in measured} == {"ok"}
    assert {"eager", "fastkd reference", "copy of the bytes"} <= {row["provider"] for row in measured}


def test_equal_and_uneven_lengths_are_measured_at_the_same_shapes():
    shapes = {full: {shape[:3] for shape in SHAPES["full"] if shape[3] == full} for full in (True, False)}
    assert shapes[True] == shapes[False]


def test_the_limit_copies_four_arrays():
    made = case(3, 5, 12, True, dtype=torch.float32, device="cpu")
    copied = made.providers[-1].forward()
    assert 2 * copied.nbytes == 4 * 3 * 5 * 12 * 4
