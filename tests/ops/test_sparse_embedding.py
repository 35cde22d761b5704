"""sparse_embedding gives the right numbers: every backend and storage format against the definition in fp64."""

import itertools

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.benchmarks.kernels.sparse_embedding import random_code, with_dtype
from fastkd.ops import sparse_embedding
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import eager_sparse_embedding

pytestmark = pytest.mark.usefixtures("on_poisoned_allocations")

fp32, fp16, bf16, fp64, int8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8

# kept rows, coded rows, width, atoms, and why
SIZES = {
    "one of everything": (1, 1, 1, 1),
    "narrower than a vector": (5, 8, 13, 3),
    "one vector and its overlap": (5, 8, 17, 4),
    "width 312": (9, 20, 312, 8),
    "eight vectors exactly": (9, 20, 128, 8),
    "width 768": (7, 30, 768, 8),
    "more atoms than are loaded at once": (40, 20, 33, 19),
    "no coded row": (11, 0, 24, 4),
    "all rows the same atom": (1, 9, 24, 2),
}


def moved(arrays: Arrays, device) -> Arrays:
    return Arrays(*(None if array is None else array.to(device) for array in arrays))


def exact(ids, arrays, dtype=fp64):
    return eager_sparse_embedding(ids, with_dtype(arrays, fp64), dtype)


def check(backend, arrays, ids=None, dtype=fp32):
    arrays = moved(arrays, backend.device)
    if ids is None:  # every row, some twice
        ids = torch.cat([torch.arange(arrays.slot.shape[0]), torch.tensor([0, 0])])
    ids = ids.to(backend.device)
    result = sparse_embedding(ids, arrays, dtype=dtype, backend=backend.name)
    assert result.shape == (*ids.shape, arrays.kept.shape[1]) and result.dtype == dtype and result.is_contiguous()
    # Atoms may cancel: an fp32 sum is as exact as its largest term, not as its result.
    noise = FLOORS[fp32] * with_dtype(arrays, fp32).kept.abs().max().item() if arrays.kept.numel() else 0.0
    verdict = judge(result, eager_sparse_embedding(ids, arrays, dtype), exact(ids, arrays), noise=noise)
    assert verdict, str(verdict)
    return result


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_row_of_every_size_is_right(backend, size):
    kept, coded, width, atoms = size
    check(backend, random_code(kept + coded, kept, width, atoms))


FORMATS = list(itertools.product([fp32, fp16, bf16, int8], [fp32, fp16, int8]))


@pytest.mark.parametrize("wide", [False, True], ids=["uint16", "int32"])
@pytest.mark.parametrize(("rows", "weights"), FORMATS, ids=str)
def test_every_storage_format_is_right(backend, rows, weights, wide):
    check(backend, random_code(40, 10, 45, 5, rows=rows, weights=weights, wide_indices=wide))


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=str)
@pytest.mark.parametrize("rows", [fp32, fp16, bf16, int8], ids=str)
def test_every_output_dtype_is_right(backend, rows, dtype):
    check(backend, random_code(40, 10, 45, 5, rows=rows), dtype=dtype)


@pytest.mark.parametrize("scale_dtype", [fp32, fp16], ids=str)
def test_the_scales_of_weights_may_be_of_either_format(backend, scale_dtype):
    arrays = random_code(40, 10, 24, 5, weights=int8)
    check(backend, arrays._replace(weight_scale=arrays.weight_scale.to(scale_dtype)))


@pytest.mark.parametrize("codebook", [fp32, fp16], ids=str)
@pytest.mark.parametrize(("kept", "atoms", "width", "residual_bytes"), [
    (10, 5, 48, 6), (10, 5, 39, 3), (10, 0, 48, 48), (10, 0, 17, 1), (0, 0, 48, 6),
])  # fmt: skip
def test_residuals_and_product_quantisation_are_right(backend, kept, atoms, width, residual_bytes, codebook):
    arrays = random_code(40, kept, width, atoms, residual_bytes=residual_bytes)
    check(backend, arrays._replace(codebook=arrays.codebook.to(codebook)))


def test_rare_rows_without_atoms_and_residual_are_zero(backend):
    arrays = random_code(40, 10, 24, 0)
    out = check(backend, arrays)
    assert not out[torch.cat([arrays.slot.long(), arrays.slot[:1].long().repeat(2)]) >= 10].any()


@pytest.mark.parametrize("rows", [fp32, fp16, bf16], ids=str)
def test_common_rows_come_out_bit_for_bit(backend, rows):
    arrays = moved(random_code(40, 10, 45, 5, rows=rows), backend.device)
    common = (arrays.slot.long() < 10).nonzero()[:, 0]
    out = sparse_embedding(common, arrays, dtype=rows, backend=backend.name)
    assert torch.equal(out, arrays.kept[arrays.slot[common].long()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 7), (2, 3, 4), (0,), (2, 0), (0, 5)], ids=str)
def test_ids_of_any_shape(backend, shape, dtype):
    check(backend, random_code(40, 10, 24, 5), torch.randint(40, shape, dtype=dtype))


def test_ids_that_are_not_contiguous(backend):
    ids = torch.randint(40, (6, 8))
    arrays = random_code(40, 10, 24, 5)
    for view in (ids.T, ids[:, ::3], ids[1:2].expand(4, 8)):
        assert torch.equal(check(backend, arrays, view), check(backend, arrays, view.contiguous()))


def test_arrays_that_are_not_contiguous(backend):
    arrays = random_code(40, 10, 24, 6, rows=int8, weights=int8, residual_bytes=4)
    spread = [x if x is None else torch.stack([x, x], -1)[..., 0] for x in arrays]
    wide = torch.cat([arrays.kept, arrays.kept], 1)[:, :24]  # rows dense, with a gap between them
    expected = check(backend, arrays)
    assert torch.equal(check(backend, Arrays(*spread)), expected)
    assert torch.equal(check(backend, arrays._replace(kept=wide)), expected)


def test_results_too_large_for_the_caches_are_the_same(backend):
    """The C++ kernel writes results of a few MiB past the caches."""
    for rows, dtype in ((fp32, fp32), (fp16, fp32), (fp16, fp16), (fp32, bf16)):
        arrays = random_code(60, 20, 128, 4, rows=rows)
        ids = torch.randint(60, (20000,))
        large = check(backend, arrays, ids, dtype)
        assert torch.equal(large[:100], check(backend, arrays, ids[:100], dtype))


@pytest.mark.parametrize("rows", [fp32, fp16, bf16, int8], ids=str)
@pytest.mark.parametrize("largest", [1e4, 60000.0])
def test_extreme_rows_are_summed_in_fp32(backend, rows, largest):
    arrays = random_code(40, 10, 24, 5)
    kept = (largest * arrays.kept.tanh()).to(rows) if rows != int8 else torch.randint(-127, 128, (10, 24), dtype=int8)
    scale = torch.full((10,), largest / 127) if rows == int8 else None
    check(backend, arrays._replace(kept=kept, kept_scale=scale))


def test_low_precision_rows_lose_nothing_but_the_rounding_of_what_is_stored(backend):
    arrays = moved(random_code(200, 40, 64, 16, rows=bf16), backend.device)
    ids = torch.arange(200, device=backend.device)
    result = sparse_embedding(ids, arrays, backend=backend.name)
    torch.testing.assert_close(result.double(), exact(ids, arrays), rtol=1e-5, atol=2e-6)


def test_results_are_the_same_bits_run_to_run_and_for_any_number_of_threads(backend):
    arrays, ids = random_code(400, 40, 96, 8, rows=fp16), torch.randint(400, (40, 50))
    first = check(backend, arrays, ids)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(check(backend, arrays, ids), first)
    finally:
        torch.set_num_threads(threads)


def test_the_definition_is_the_formula_by_hand():
    arrays = Arrays(
        slot=torch.tensor([2, 0, 1], dtype=torch.int32),
        kept=torch.tensor([[1.0, 2.0], [10.0, 20.0]]), kept_scale=None,
        atom_ids=torch.tensor([[1, 0]], dtype=torch.int32), atom_weights=torch.tensor([[0.75, 0.25]]),
        weight_scale=None, residual=torch.tensor([[3, 255]], dtype=torch.uint8),
        codebook=torch.zeros(2, 256, 1).index_fill(1, torch.tensor([3]), 0.5).index_fill(1, torch.tensor([255]), -1.0),
    )  # fmt: skip
    expected = torch.tensor([[0.75 * 10 + 0.25 * 1 + 0.5, 0.75 * 20 + 0.25 * 2 - 1.0], [1.0, 2.0], [10.0, 20.0]])
    assert torch.equal(eager_sparse_embedding(torch.arange(3), arrays), expected)


def test_anything_with_arrays_can_be_looked_up_in(backend):
    class Code:
        arrays = moved(random_code(40, 10, 24, 5), backend.device)

    ids = torch.randint(40, (9,), device=backend.device)
    expected = sparse_embedding(ids, Code.arrays, backend=backend.name)
    assert torch.equal(sparse_embedding(ids, Code(), backend=backend.name), expected)
