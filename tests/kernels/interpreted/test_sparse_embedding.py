"""The Triton kernels against the definition in fp64, on CPU tensors; started by ../test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off", allow_module_level=True)

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.benchmarks.kernels.sparse_embedding import random_code, with_dtype
from fastkd.kernels import sparse_embedding as kernels
from fastkd.ops.sparse_embedding import eager_embedding_block, eager_sparse_embedding

fp32, fp16, bf16, fp64, int8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8


def judged(result, eager, truth):
    verdict = judge(result, eager, truth, noise=FLOORS[fp32] * (1 + truth.abs().max().item() if truth.numel() else 1))
    assert verdict, str(verdict)


def check(arrays, ids=None, dtype=fp32):
    ids = torch.arange(len(arrays.slot)) if ids is None else ids
    result = kernels.sparse_embedding(ids, *arrays, dtype)
    assert result.shape == (*ids.shape, arrays.kept.shape[1]) and result.dtype == dtype
    exact = eager_sparse_embedding(ids, with_dtype(arrays, fp64), fp64)
    judged(result, eager_sparse_embedding(ids, arrays, dtype), exact)
    return result


@pytest.mark.parametrize(
    ("kept", "coded", "width", "atoms"),
    [(1, 1, 1, 1), (5, 8, 13, 3), (9, 8, 40, 8), (40, 5, 33, 19), (11, 0, 24, 4), (4, 5, 300, 2)],
)
def test_every_row_of_every_size(kept, coded, width, atoms):
    check(random_code(kept + coded, kept, width, atoms))


@pytest.mark.parametrize("weights", [fp32, fp16, int8], ids=str)
@pytest.mark.parametrize("rows", [fp32, fp16, int8], ids=str)
def test_every_storage_format(rows, weights):
    check(random_code(20, 6, 24, 5, rows=rows, weights=weights), dtype=fp16 if rows == fp16 else fp32)


def test_int32_indices_and_ids():
    check(random_code(20, 6, 24, 5, wide_indices=True), torch.randint(20, (2, 3, 2), dtype=torch.int32))


@pytest.mark.parametrize(("kept", "atoms"), [(6, 5), (6, 0), (0, 0)])
def test_residuals_and_product_quantisation(kept, atoms):
    check(random_code(20, kept, 24, atoms, residual_bytes=6))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_ids_of_any_shape(shape):
    check(random_code(20, 6, 24, 5), torch.randint(20, shape))


def test_arrays_and_ids_that_are_not_contiguous():
    arrays = random_code(20, 6, 24, 5, rows=int8, weights=int8, residual_bytes=4)
    spread = arrays._make(x if x is None else torch.stack([x, x], -1)[..., 0] for x in arrays)
    ids = torch.randint(20, (4, 6)).T
    assert torch.equal(check(spread, ids), check(arrays, ids.contiguous()))


@pytest.mark.parametrize("wrong", [20, -1, 2**40])
def test_for_an_id_out_of_range_nothing_is_read_outside_the_arrays(wrong):
    """That it is a device assert besides shows only in compiled code."""
    arrays = random_code(20, 6, 24, 5)
    result = kernels.sparse_embedding(torch.tensor([3, wrong]), *arrays, fp32)
    assert torch.equal(result, check(arrays, torch.tensor([3, 0])))


def gradients(arrays, ids, upstream, padding_idx=-1, wanted=(True, True)):
    return kernels.sparse_embedding_backward(upstream, ids, *arrays, padding_idx, *wanted)


def gradients_by_definition(arrays, ids, upstream, dtype, padding_idx):
    arrays = with_dtype(arrays, dtype)
    leaves = [arrays.kept.clone().requires_grad_(), arrays.atom_weights.clone().requires_grad_()]
    out = eager_sparse_embedding(ids, arrays._replace(kept=leaves[0], atom_weights=leaves[1]), dtype)
    upstream = torch.where((ids == padding_idx)[..., None], 0, upstream.to(dtype))
    return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("padding_idx", [-1, 3])
@pytest.mark.parametrize(
    ("rows", "weights", "kept", "atoms", "width"),
    [(fp32, fp32, 6, 5, 24), (fp16, fp16, 6, 5, 13), (int8, fp32, 6, 5, 24), (fp32, int8, 6, 4, 24),
     (fp32, fp32, 6, 0, 8), (fp32, fp32, 20, 3, 8), (fp32, fp32, 5, 8, 300)],
)  # fmt: skip
def test_gradients(rows, weights, kept, atoms, width, padding_idx):
    arrays, ids = random_code(20, kept, width, atoms, rows=rows, weights=weights), torch.randint(20, (2, 9))
    upstream = torch.randn(2, 9, width)
    results = gradients(arrays, ids, upstream, padding_idx, (rows != int8, weights != int8))
    exacts, eagers = (gradients_by_definition(arrays, ids, upstream, d, padding_idx) for d in (fp64, fp32))
    for array, result, eager, exact in zip((arrays.kept, arrays.atom_weights), results, eagers, exacts, strict=True):
        if array.dtype == int8:
            assert result.shape == (0,)
        else:
            assert result.dtype == array.dtype
            judged(result, eager, exact)


def test_the_gradient_of_no_token_is_zero():
    arrays = random_code(20, 6, 24, 5, weights=fp32)
    d_kept, d_weights = gradients(arrays, torch.empty(0, dtype=torch.int64), torch.empty(0, 24))
    assert d_kept.shape == (6, 24) and d_weights.shape == (14, 5) and not d_kept.any() and not d_weights.any()


@pytest.mark.parametrize("types", [False, True], ids=["no types", "types"])
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("width", [13, 24])
def test_block(width, given, types):
    arrays, ids = random_code(20, 6, width, 5), torch.randint(20, (2, 5))
    tables = torch.randn(7, width), torch.randn(2, width) if types else None, torch.randn(width), torch.randn(width)
    type_ids = torch.randint(2, (2, 5)) if types and given else None
    position_ids = torch.randint(7, (2, 5)) if given else None
    result = kernels.embedding_block(ids, type_ids, position_ids, *arrays, *tables, 1e-5, fp32)
    eager, exact = (
        eager_embedding_block(
            ids, type_ids, position_ids, with_dtype(arrays, d), *(t if t is None else t.to(d) for t in tables), 1e-5, d
        )
        for d in (fp32, fp64)
    )
    judged(result, eager, exact)


def test_every_output_is_written(monkeypatch):
    arrays, ids = random_code(20, 6, 24, 5, weights=fp32), torch.randint(20, (2, 9))
    upstream = torch.randn(2, 9, 24)
    expected = check(arrays, ids), *gradients(arrays, ids, upstream)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(-1))
    again = check(arrays, ids), *gradients(arrays, ids, upstream)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
