"""The embedding block gives what the definition gives in fp64, on every backend."""

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.benchmarks.kernels.sparse_embedding import random_code, with_dtype
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import eager_embedding_block, embedding_block

pytestmark = pytest.mark.usefixtures("on_poisoned_allocations")

fp32, fp16, bf16, fp64, int8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8


def check(backend, arrays, ids, tables, *, dtype=fp32, eps=1e-12, noise=FLOORS[fp32], **indices):
    device = backend.device
    arrays = Arrays(*(None if array is None else array.to(device) for array in arrays))
    positions, types, weight, bias = (None if table is None else table.to(device) for table in tables)
    ids, indices = ids.to(device), {name: given.to(device) for name, given in indices.items()}
    result = embedding_block(
        ids, arrays, positions, weight, bias, types=types, eps=eps, dtype=dtype, backend=backend.name, **indices
    )
    assert result.shape == (*ids.shape, arrays.kept.shape[1]) and result.dtype == dtype
    given = (indices.get(name) for name in ("token_type_ids", "position_ids"))
    type_ids, position_ids = (None if x is None else x.expand(ids.shape) for x in given)
    eager, exact = (
        eager_embedding_block(
            ids, type_ids, position_ids, with_dtype(arrays, d),
            *(None if table is None else table.to(d) for table in (positions, types, weight, bias)), eps, d,
        )
        for d in (fp32, fp64)
    )  # fmt: skip
    verdict = judge(result, eager, exact, noise=noise)
    assert verdict, str(verdict)
    return result


def tables_of(width, dtype=fp32, types=True):
    drawn = torch.randn(30, width), torch.randn(2, width) if types else None, torch.randn(width), torch.randn(width)
    return [None if table is None else table.to(dtype) for table in drawn]


@pytest.mark.parametrize("types", [False, True], ids=["no types", "types"])
@pytest.mark.parametrize("width", [2, 13, 24, 130, 312, 768])
def test_every_width(backend, width, types):
    check(backend, random_code(60, 12, width, 5), torch.randint(60, (3, 20)), tables_of(width, types=types))


@pytest.mark.parametrize("tables", [fp32, fp16, bf16], ids=str)
@pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=str)
@pytest.mark.parametrize("rows", [fp32, fp16, bf16, int8], ids=str)
def test_every_format(backend, rows, dtype, tables):
    code = random_code(60, 12, 45, 5, rows=rows, residual_bytes=5)
    check(backend, code, torch.randint(60, (3, 20)), tables_of(45, tables), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_positions_and_types_that_are_given(backend, dtype):
    ids = torch.randint(60, (3, 20), dtype=dtype)
    types, positions = torch.randint(2, (3, 20)), torch.randint(30, (3, 20))
    check(backend, random_code(60, 12, 24, 5), ids, tables_of(24), token_type_ids=types, position_ids=positions)


def test_one_row_of_positions_serves_all_sequences(backend):
    ids, positions = torch.randint(60, (3, 20)), torch.arange(20) + 7  # as RoBERTa counts
    code, tables = random_code(60, 12, 24, 5), tables_of(24)
    expected = check(backend, code, ids, tables, position_ids=positions.repeat(3, 1))
    for given in (positions, positions[None], positions[None].expand(3, 20)):
        assert torch.equal(check(backend, code, ids, tables, position_ids=given), expected)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0,), (2, 0), (0, 5)], ids=str)
def test_ids_of_any_shape(backend, shape):
    check(backend, random_code(60, 12, 24, 5), torch.randint(60, shape), tables_of(24))


def test_ids_and_tables_that_are_not_contiguous(backend):
    ids, code, tables = torch.randint(60, (20, 3)).T, random_code(60, 12, 24, 5), tables_of(24)
    spread = [torch.stack([table, table], -1)[..., 0] for table in tables]
    assert torch.equal(check(backend, code, ids, spread), check(backend, code, ids.contiguous(), tables))


def test_a_result_too_large_for_the_caches_is_the_same(backend):
    ids, code, tables = torch.randint(60, (1000, 20)), random_code(60, 12, 64, 5), tables_of(64)
    assert torch.equal(check(backend, code, ids, tables)[:4], check(backend, code, ids[:4], tables))


def test_a_large_mean_costs_no_digits(backend):
    """A variance from the mean of squares would lose them all."""
    tables = tables_of(24)
    tables[0] = tables[0] + 1000.0
    check(backend, random_code(60, 12, 24, 5), torch.randint(60, (3, 20)), tables, noise=1e-3)


def test_the_definition_is_torchs_layer_norm_of_three_embeddings():
    code, (positions, types, weight, bias) = with_dtype(random_code(60, 12, 24, 5), fp64), tables_of(24, fp64)
    ids, type_ids = torch.randint(60, (3, 20)), torch.randint(2, (3, 20))
    dense = embedding_block(
        ids, code, torch.zeros(20, 24).double(), torch.ones(24).double(), torch.zeros(24).double(), eps=0.1, dtype=fp64
    )
    words = torch.stack([code.kept[s] if s < 12 else code.atom_weights[s - 12] @ code.kept[code.atom_ids[s - 12].long()]
                         for s in code.slot.tolist()])  # fmt: skip
    torch.testing.assert_close(dense, torch.nn.functional.layer_norm(words[ids], (24,), eps=0.1))
    x = words[ids] + positions[:20] + types[type_ids]
    result = embedding_block(
        ids, code, positions, weight, bias, types=types, token_type_ids=type_ids, eps=1e-5, dtype=fp64
    )
    torch.testing.assert_close(result, torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-5))
