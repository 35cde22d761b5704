"""The CPU's limit for relation_kl does the arithmetic that its page counts, no less and no more, and does it right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastkd.benchmarks.kernels import _cpu_limit
from fastkd.benchmarks.kernels._cpu_limit import arithmetic_at_peak, exp2, least_operations


def test_the_least_work_is_that_of_the_triangles_and_one_product():
    sizes, heads, width, teacher_width = [5, 1, 0, 8], 3, 4, 6
    pairs = heads * sum(len(torch.triu_indices(n, n)[0]) for n in sizes)
    squares = heads * sum(n * n for n in sizes)
    scores, gradient = 2 * pairs * (width + teacher_width), 2 * squares * width
    assert least_operations(sizes, heads, width, teacher_width) == (scores + gradient, 2 * pairs)


def test_the_exponential_is_that_of_an_exact_kernel():
    x = -torch.rand(100_000) * 100
    assert (exp2(x).double() / torch.exp2(x.double()) - 1).abs().max() < 3e-7
    assert exp2(torch.tensor([0.0, -1.0, -126.0])).tolist() == [1.0, 0.5, 2.0**-126]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_product_multiplies(dtype):
    multiply, (rows, columns, _) = _cpu_limit.fastest_product(dtype, torch.get_num_threads())
    assert multiply(rows).shape == (rows, columns) and multiply(7).shape == (7, columns)
    multiply, one = _cpu_limit._by_onednn(torch.eye(3, dtype=dtype), torch.arange(12).view(3, 4).to(dtype)), 2
    assert multiply(one).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("sizes", [[3], [300, 20, 7], [512] * 4], ids=["tiny", "ragged", "many products"])
def test_it_does_all_of_the_least_work_and_no_more(sizes, monkeypatch):
    """Up to what does not fill a row of the product, or a row of exponentials."""
    counted = []
    monkeypatch.setattr(_cpu_limit, "exp2", lambda x: counted.append(x.numel()) or x)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    left, right = torch.randn(256, 64), torch.randn(64, 128)
    monkeypatch.setattr(
        _cpu_limit, "fastest_product", lambda *_: (_cpu_limit._by_blas(left, right), (256, 128, 64))
    )  # fmt: skip
    provider = arithmetic_at_peak(sizes, 12, 32, 64, torch.float32)
    with FlopCounterMode(display=False) as flops:
        provider.forward()
    operations, exponentials = least_operations(sizes, 12, 32, 64)
    assert operations - 2 * 128 * 64 < flops.get_total_flops() <= operations
    assert 0.99 * exponentials <= sum(counted) <= exponentials
