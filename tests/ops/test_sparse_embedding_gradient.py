"""The gradient of sparse_embedding: kept rows and atom weights, on every backend against autograd in fp64."""

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.benchmarks.kernels.sparse_embedding import draw_ids, random_code, with_dtype
from fastkd.ops import sparse_embedding
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import eager_sparse_embedding

pytestmark = pytest.mark.usefixtures("on_poisoned_allocations")

fp32, fp16, bf16, fp64, int8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8


def leaves_of(arrays, wanted):
    made = {name: getattr(arrays, name).detach().clone().requires_grad_() for name in wanted}
    return arrays._replace(**made), list(made.values())


def gradients(ids, arrays, wanted, upstream, backend, dtype=fp32, **options):
    arrays, leaves = leaves_of(arrays, wanted)
    out = sparse_embedding(ids, arrays, dtype=dtype, backend=backend.name, **options)
    return torch.autograd.grad(out, leaves, upstream.to(dtype))


def by_definition(ids, arrays, wanted, upstream, dtype, padding_idx=None):
    numbers, leaves = leaves_of(with_dtype(arrays, dtype), wanted)
    out = eager_sparse_embedding(ids, numbers, dtype)
    if padding_idx is not None:
        out = torch.where((ids == padding_idx)[..., None], out.detach(), out)
    return torch.autograd.grad(out, leaves, upstream.to(dtype))


def check(backend, arrays, ids, wanted=("kept", "atom_weights"), upstream=None, dtype=fp32, padding_idx=None):
    arrays = Arrays(*(None if array is None else array.to(backend.device) for array in arrays))
    ids = ids.to(backend.device)
    if upstream is None:
        upstream = torch.randn(*ids.shape, arrays.kept.shape[1], device=backend.device)
    upstream = upstream.to(dtype)
    results = gradients(ids, arrays, wanted, upstream, backend, dtype, padding_idx=padding_idx)
    exacts, eagers = (by_definition(ids, arrays, wanted, upstream, d, padding_idx) for d in (fp64, fp32))
    for name, result, eager, truth in zip(wanted, results, eagers, exacts, strict=True):
        stored = getattr(arrays, name)
        assert result.dtype == stored.dtype and result.shape == stored.shape
        size = truth.abs().max().item() if truth.numel() else 0.0
        verdict = judge(result, eager, truth, noise=FLOORS[fp32] * (1 + size))
        assert verdict, f"{name}: {verdict}"
    return results


@pytest.mark.parametrize("width", [1, 13, 24, 130, 312, 768])
def test_gradients_are_right_in_every_width(backend, width):
    check(backend, random_code(60, 12, width, 5, weights=fp32), torch.randint(60, (4, 25)))


@pytest.mark.parametrize("upstream", [fp32, fp16, bf16], ids=str)
@pytest.mark.parametrize("weights", [fp32, fp16], ids=str)
@pytest.mark.parametrize("rows", [fp32, fp16, bf16], ids=str)
def test_gradients_come_in_the_dtype_of_their_array(backend, rows, weights, upstream):
    check(backend, random_code(60, 12, 24, 5, rows=rows, weights=weights), torch.randint(60, (40,)), dtype=upstream)


@pytest.mark.parametrize("scale", [fp32, fp16], ids=str)
def test_kept_rows_learn_beside_int8_weights(backend, scale):
    arrays = random_code(60, 12, 24, 5, weights=int8)
    arrays = arrays._replace(weight_scale=arrays.weight_scale.to(scale))
    check(backend, arrays, torch.randint(60, (40,)), wanted=("kept",))


@pytest.mark.parametrize("weights", [fp32, fp16], ids=str)
def test_weights_learn_beside_int8_rows(backend, weights):
    check(backend, random_code(60, 12, 24, 5, rows=int8, weights=weights), torch.randint(60, (40,)),
          wanted=("atom_weights",))  # fmt: skip


@pytest.mark.parametrize("wanted", ["kept", "atom_weights"])
def test_only_what_asks_gets_a_gradient(backend, wanted):
    check(backend, random_code(60, 12, 24, 5, weights=fp32), torch.randint(60, (40,)), wanted=(wanted,))


def test_a_residual_changes_no_gradient(backend):
    arrays = random_code(60, 12, 24, 5, weights=fp32, residual_bytes=6)
    ids, upstream = torch.randint(60, (40,)), torch.randn(40, 24)
    with_it = check(backend, arrays, ids, upstream=upstream.to(backend.device))
    without = check(backend, arrays._replace(residual=None, codebook=None), ids, upstream=upstream.to(backend.device))
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize(("kept", "atoms"), [(12, 0), (12, 19), (1, 2), (60, 4)])
def test_gradients_without_atoms_with_many_and_without_coded_rows(backend, kept, atoms):
    check(backend, random_code(60, kept, 24, atoms, weights=fp32), torch.randint(60, (40,)))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_ids_of_any_shape(backend, shape):
    check(backend, random_code(60, 12, 24, 5, weights=fp32), torch.randint(60, shape, dtype=torch.int32))


def test_tokens_that_repeat_add_up(backend):
    """As in text: few tokens make up most of a batch, and one alone a tenth of it."""
    arrays = random_code(500, 50, 40, 8, weights=fp32)
    check(backend, arrays, draw_ids(arrays, 16, 64, rare_percent=20))


def test_padding_gives_no_gradient(backend):
    arrays = random_code(60, 12, 24, 5, weights=fp32)
    common, rare = ((arrays.slot.long() < 12) == kind for kind in (True, False))
    for is_padding in (common, rare):
        padding = is_padding.nonzero()[0].item()
        ids = torch.cat([torch.randint(60, (30,)), torch.full((30,), padding)])
        check(backend, arrays, ids, padding_idx=padding)
    only_padding = torch.full((5,), padding)
    assert not any(g.any() for g in check(backend, arrays, only_padding, padding_idx=padding))


def test_a_negative_padding_idx_counts_from_the_end(backend):
    arrays, ids = random_code(60, 12, 24, 5, weights=fp32), torch.arange(60)
    upstream = torch.randn(60, 24, device=backend.device)
    last = check(backend, arrays, ids, upstream=upstream, padding_idx=59)
    arrays = Arrays(*(None if array is None else array.to(backend.device) for array in arrays))
    from_end = gradients(ids.to(backend.device), arrays, ("kept", "atom_weights"), upstream, backend, padding_idx=-1)
    assert all(torch.equal(a, b) for a, b in zip(last, from_end, strict=True))


def test_upstream_gradients_that_are_not_contiguous(backend):
    arrays, ids = random_code(60, 12, 24, 5, weights=fp32), torch.randint(60, (4, 10))
    one = torch.randn(1, device=backend.device)
    check(backend, arrays, ids, upstream=one.expand(4, 10, 24))  # stride 0, as a sum sends it
    check(backend, arrays, ids, upstream=torch.randn(24, 10, 4, device=backend.device).permute(2, 1, 0))


def test_gradients_are_the_same_bits_run_to_run_and_for_any_number_of_threads(backend):
    arrays = random_code(500, 50, 300, 8, weights=fp32)
    ids, upstream = draw_ids(arrays, 16, 64, rare_percent=20), torch.randn(16, 64, 300, device=backend.device)
    first = check(backend, arrays, ids, upstream=upstream)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 5):
            torch.set_num_threads(count)
            again = check(backend, arrays, ids, upstream=upstream)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [("reference", "cpu")], ids=["reference"], indirect=True)
def test_the_references_written_out_gradient_passes_gradcheck(backend):
    arrays = with_dtype(random_code(30, 6, 5, 3, residual_bytes=5), fp64)
    ids = torch.randint(30, (3, 8))

    def compute(kept, atom_weights):
        code = arrays._replace(kept=kept, atom_weights=atom_weights)
        return sparse_embedding(ids, code, dtype=fp64, backend="reference")

    assert torch.autograd.gradcheck(compute, leaves_of(arrays, ("kept", "atom_weights"))[1])


def test_a_second_derivative_is_refused_by_name(backend):
    arrays = Arrays(*(x if x is None else x.to(backend.device) for x in random_code(60, 12, 24, 5, weights=fp32)))
    arrays, leaves = leaves_of(arrays, ("kept", "atom_weights"))
    out = sparse_embedding(torch.arange(60, device=backend.device), arrays, backend=backend.name)
    with pytest.raises(RuntimeError, match="sparse_embedding has no second derivative"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)
