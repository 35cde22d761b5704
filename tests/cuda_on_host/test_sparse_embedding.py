"""csrc/cuda/sparse_embedding* gives the right numbers: compiled for the CPU, run by an emulation of a block's threads,
against the definition in fp64."""

import itertools

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.benchmarks.kernels.sparse_embedding import random_code, with_dtype
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import eager_embedding_block, eager_sparse_embedding

fp32, fp16, bf16, fp64, int8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8

# kept rows, coded rows, width, atoms, and why
SIZES = {
    "one of everything": (1, 1, 1, 1),
    "one number per lane and round": (5, 8, 45, 3),
    "chunks that end within a warp": (9, 20, 312, 8),
    "rounds that end within those at once": (7, 9, 768, 8),
    "a common row in two steps of rounds": (7, 9, 640, 2),
    "more atoms than are loaded at once": (40, 9, 40, 19),
    "more atoms than a warp has lanes": (50, 5, 24, 67),
    "no coded row": (11, 0, 24, 4),
    "all rows the same atom": (1, 9, 24, 2),
}


@pytest.fixture(scope="module")
def library(compile_on_host):
    return compile_on_host("sparse_embedding")


@pytest.fixture
def ops(library):
    """ops(seed=0, processors=1, shared=...): the namespace of the three ops, on a device of that size."""

    def on(seed: int = 0, processors: int = 1, shared: int = 163 * 1024):
        library.set_device(shared, processors, seed)
        return torch.ops.fastkd

    return on


def every_row(arrays):
    return torch.cat([torch.arange(len(arrays.slot)), torch.tensor([0, 0])])


@pytest.fixture
def check(ops):
    """check(arrays, ids=every row, dtype=fp32, **device): the lookup keeps the rule of benchmarks/accuracy.py."""

    def compare(arrays, ids=None, dtype=fp32, **device):
        ids = every_row(arrays) if ids is None else ids
        result = ops(**device).sparse_embedding_cuda(ids, *arrays, dtype)
        assert result.shape == (*ids.shape, arrays.kept.shape[1]) and result.dtype == dtype and result.is_contiguous()
        noise = FLOORS[fp32] * with_dtype(arrays, fp32).kept.abs().max().item() if arrays.kept.numel() else 0.0
        exact = eager_sparse_embedding(ids, with_dtype(arrays, fp64), fp64)
        verdict = judge(result, eager_sparse_embedding(ids, arrays, dtype), exact, noise=noise)
        assert verdict, str(verdict)
        return result

    return compare


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [fp32, fp16, int8], ids=str)
def test_every_row_of_every_size_is_right(check, size, rows):
    kept, coded, width, atoms = size
    check(random_code(kept + coded, kept, width, atoms, rows=rows))


FORMATS = list(itertools.product([fp32, fp16, bf16, int8], [fp32, fp16, int8]))


@pytest.mark.parametrize("width", [48, 24, 13], ids=["chunks of 16", "chunks of 8", "single numbers"])
@pytest.mark.parametrize(("rows", "weights"), FORMATS, ids=str)
def test_every_storage_format_is_right(check, rows, weights, width):
    for wide in (False, True):
        check(random_code(20, 6, width, 5, rows=rows, weights=weights, wide_indices=wide))


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=str)
@pytest.mark.parametrize("rows", [fp32, fp16, bf16, int8], ids=str)
def test_every_output_dtype_is_right(check, rows, dtype):
    for width in (48, 13):
        check(random_code(20, 6, width, 5, rows=rows), dtype=dtype)


def test_the_scales_of_weights_may_be_of_either_format(check):
    arrays = random_code(20, 6, 24, 5, weights=int8)
    for dtype in (fp32, fp16):
        check(arrays._replace(weight_scale=arrays.weight_scale.to(dtype)))


@pytest.mark.parametrize("codebook", [fp32, fp16], ids=str)
@pytest.mark.parametrize(("kept", "atoms", "width", "residual_bytes"), [
    (6, 5, 48, 3), (6, 5, 48, 8), (6, 5, 39, 3), (6, 0, 48, 48), (6, 0, 17, 1), (0, 0, 48, 6),
])  # fmt: skip
def test_residuals_and_product_quantisation_are_right(check, kept, atoms, width, residual_bytes, codebook):
    for rows in (fp32, int8):
        arrays = random_code(20, kept, width, atoms, rows=rows, residual_bytes=residual_bytes)
        check(arrays._replace(codebook=arrays.codebook.to(codebook)))


@pytest.mark.parametrize("rows", [fp32, fp16, bf16], ids=str)
def test_common_rows_come_out_bit_for_bit(check, rows):
    arrays = random_code(20, 6, 48, 5, rows=rows)
    common = (arrays.slot.long() < 6).nonzero()[:, 0]
    assert torch.equal(check(arrays, common, rows), arrays.kept[arrays.slot[common].long()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_ids_of_any_shape(check, shape, dtype):
    check(random_code(20, 6, 24, 5), torch.randint(20, shape, dtype=dtype))


def test_tensors_with_gaps_and_odd_addresses_are_read_as_they_are(check):
    arrays = random_code(20, 6, 24, 6, rows=fp16, residual_bytes=4)
    expected = check(arrays)
    spread = Arrays(*[x if x is None else torch.stack([x, x], -1)[..., 0] for x in arrays])
    odd = torch.cat([torch.zeros(1, dtype=fp16), arrays.kept.flatten()])[1:].view_as(arrays.kept)
    assert odd.data_ptr() % 16
    assert torch.equal(check(spread), expected)
    torch.testing.assert_close(check(arrays._replace(kept=odd)), expected)


@pytest.mark.parametrize("rows", [fp32, int8], ids=str)
def test_slices_of_a_token_and_tokens_of_a_warp_give_the_same_bits(check, rows):
    """As many warps per token as a large device asks for, and a single warp for many tokens."""
    arrays = random_code(20, 6, 768, 5, rows=rows)
    ids = torch.tensor([3, 19, 7])
    assert torch.equal(check(arrays, ids, processors=1), check(arrays, ids, processors=132))


class TestGradient:
    @pytest.fixture
    def check(self, ops):
        """check(arrays, ids, dtype): both gradients against autograd of the definition in fp64."""

        def compare(arrays, ids, dtype=fp32, padding_idx=-1, seed=0):
            upstream = torch.randn(*ids.shape, arrays.kept.shape[1]).to(dtype)

            def gradients(numbers, g):
                leaves = numbers.kept.detach().requires_grad_(), numbers.atom_weights.detach().requires_grad_()
                code = numbers._replace(kept=leaves[0], atom_weights=leaves[1])
                out = eager_sparse_embedding(ids, code, g.dtype) * (ids != padding_idx)[..., None]
                return torch.autograd.grad(out, leaves, g, allow_unused=True, materialize_grads=True)

            found = ops(seed).sparse_embedding_backward_cuda(upstream, ids, *arrays, padding_idx, True, True)
            eager = gradients(arrays, upstream)
            exact = gradients(with_dtype(arrays, fp64), upstream.double())
            for result, own, truth in zip(found, eager, exact, strict=True):
                noise = FLOORS[fp32] * truth.abs().max().item() if truth.numel() else 0.0
                verdict = judge(result, own, truth, noise=noise)
                assert result.dtype == own.dtype and verdict, str(verdict)
            return found

        return compare

    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_every_size_is_right(self, check, size):
        kept, coded, width, atoms = size
        arrays = random_code(kept + coded, kept, width, atoms, weights=fp32)
        check(arrays, torch.randint(kept + coded, (3, 9)))

    @pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=str)
    @pytest.mark.parametrize(("rows", "weights"), [(fp32, fp32), (fp16, fp16), (bf16, fp32)], ids=str)
    def test_every_format_is_right(self, check, rows, weights, dtype):
        for width in (48, 13):
            check(random_code(20, 6, width, 5, rows=rows, weights=weights), torch.randint(20, (40,)), dtype)

    @pytest.mark.parametrize("count", [31, 32, 33, 64, 400], ids=str)
    @pytest.mark.parametrize("frequent", [0, 5], ids=["the first row", "the last row"])
    def test_a_row_may_own_any_number_of_pieces(self, check, count, frequent):
        """Pieces have 32 contributions: a row that fills some, begins or ends within one, or owns the whole batch."""
        arrays = random_code(20, 6, 40, 2, weights=fp32)
        token = (arrays.slot.long() == frequent).nonzero()[0]
        for others in (0, 1, 20):
            check(
                arrays, torch.cat([token.repeat(count), torch.randint(20, (others,))])[torch.randperm(count + others)]
            )

    def test_a_coded_row_sums_its_tokens(self, check):
        arrays = random_code(20, 6, 300, 11, weights=fp32)
        token = (arrays.slot.long() == 9).nonzero()[0]
        check(arrays, token.repeat(37))

    def test_padding_gives_no_gradient(self, check):
        arrays = random_code(20, 6, 24, 5, weights=fp32)
        check(arrays, torch.randint(20, (4, 20)), padding_idx=3)
        d_kept, d_weights = check(arrays, torch.full((2, 5), 3), padding_idx=3)
        assert not d_kept.any() and not d_weights.any()

    def test_int8_rows_stand_behind_the_gradient_of_the_weights(self, ops):
        arrays = random_code(20, 6, 48, 5, rows=int8, weights=fp32)
        weights = arrays.atom_weights.clone().requires_grad_()
        ids, upstream = torch.arange(20), torch.randn(20, 48)
        eager_sparse_embedding(ids, arrays._replace(atom_weights=weights)).backward(upstream)
        d_kept, found = ops().sparse_embedding_backward_cuda(upstream, ids, *arrays, -1, False, True)
        torch.testing.assert_close(found, weights.grad)
        assert d_kept.numel() == 0
        with pytest.raises(RuntimeError, match="int8 has no gradient"):
            ops().sparse_embedding_backward_cuda(upstream, ids, *arrays, -1, True, True)

    def test_no_order_of_the_threads_changes_a_bit(self, ops):
        arrays = random_code(20, 6, 40, 5, weights=fp32)
        ids, upstream = torch.randint(20, (90,)), torch.randn(90, 40)
        first, *others = (
            ops(seed, processors).sparse_embedding_backward_cuda(upstream, ids, *arrays, -1, True, True)
            for seed, processors in ((1, 1), (1000, 1), (2000, 132))
        )
        assert all(torch.equal(x, y) for other in others for x, y in zip(other, first, strict=True))

    def test_no_token_gives_zero(self, ops):
        arrays = random_code(20, 6, 24, 5, weights=fp32)
        none = torch.empty(0, dtype=torch.int64)
        for grad in ops().sparse_embedding_backward_cuda(torch.empty(0, 24), none, *arrays, -1, True, True):
            assert grad.numel() and not grad.any()


class TestBlock:
    @pytest.fixture
    def check(self, ops):
        """check(arrays, ids, ...): the block against its definition in fp64."""

        def compare(arrays, ids, type_ids=None, position_ids=None, with_types=True, tables=fp32, dtype=fp32, **device):
            width = arrays.kept.shape[1]
            positions, types, norm = (torch.randn(n, width).to(tables) for n in (12, 2, 2))
            rest = (positions, types if with_types else None, norm[0] + 1, norm[1])
            result = ops(**device).embedding_block_cuda(ids, type_ids, position_ids, *arrays, *rest, 1e-12, dtype)
            double = [x if x is None else x.double() for x in rest]
            exact = eager_embedding_block(
                ids, type_ids, position_ids, with_dtype(arrays, fp64), *double, 1e-12, dtype=fp64
            )
            eager = eager_embedding_block(ids, type_ids, position_ids, arrays, *rest, 1e-12, dtype=dtype)
            verdict = judge(result, eager, exact, noise=FLOORS[fp32] * exact.abs().max().item())
            assert result.dtype == dtype and verdict, str(verdict)

        return compare

    @pytest.mark.parametrize("rows", [fp32, fp16, bf16, int8], ids=str)
    @pytest.mark.parametrize("width", [768, 312, 33], ids=str)
    def test_every_format_and_width_is_right(self, check, rows, width):
        check(random_code(20, 6, width, 5, rows=rows), torch.randint(20, (2, 9)))

    @pytest.mark.parametrize("tables", [fp32, fp16, bf16], ids=str)
    def test_tables_and_results_of_any_format(self, check, tables):
        for rows in (fp32, int8):
            check(random_code(20, 6, 48, 5, rows=rows), torch.randint(20, (2, 9)), tables=tables, dtype=tables)

    @pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
    def test_types_and_positions_are_read_or_counted(self, check, integers):
        ids, types, positions = (torch.randint(n, (3, 7), dtype=integers) for n in (20, 2, 12))
        arrays = random_code(20, 6, 48, 5)
        check(arrays, ids, types, positions)
        check(arrays, ids, types[:1].expand(3, 7), positions[:1].expand(3, 7))
        check(arrays, ids, None, None, with_types=False)

    def test_a_residual_belongs_to_the_row(self, check):
        check(random_code(20, 6, 48, 5, residual_bytes=8), torch.randint(20, (2, 9)))

    def test_rows_that_do_not_fit_the_device_are_named(self, check):
        arrays = random_code(20, 6, 96, 5)
        with pytest.raises(RuntimeError, match="rows of width 96 take 2048 bytes of shared memory; this device has 99"):
            check(arrays, torch.randint(20, (2, 9)), shared=99)


class TestOutOfRange:
    """On a GPU each of these is a device assert."""

    @pytest.mark.parametrize("outside", [-1, 20, 2**40])
    def test_an_id(self, ops, outside):
        ids = torch.tensor([[3, outside]])
        arrays = random_code(20, 6, 24, 5, weights=fp32)
        with pytest.raises(RuntimeError, match="sparse_embedding: an id is out of range"):
            ops().sparse_embedding_cuda(ids, *arrays, fp32)
        with pytest.raises(RuntimeError, match="sparse_embedding: an id is out of range"):
            ops().sparse_embedding_backward_cuda(torch.ones(1, 2, 24), ids, *arrays, -1, True, True)

    @pytest.mark.parametrize(
        ("type_id", "position_id", "message"), [(2, 0, "a token type id"), (0, 12, "a position id"), (0, -1, "a pos")]
    )
    def test_a_type_or_position(self, ops, type_id, position_id, message):
        arrays, ids = random_code(20, 6, 24, 5), torch.tensor([[3, 4]])
        tables = torch.randn(12, 24), torch.randn(2, 24), torch.randn(24), torch.randn(24)
        given = [torch.tensor([[0, value]]) for value in (type_id, position_id)]
        with pytest.raises(RuntimeError, match=f"embedding_block: {message}"):
            ops().embedding_block_cuda(ids, *given, *arrays, *tables, 1e-12, fp32)

    def test_an_index_of_a_damaged_code(self, ops):
        arrays = random_code(20, 6, 24, 5)
        broken = (
            arrays._replace(slot=torch.full_like(arrays.slot, 20)),
            arrays._replace(atom_ids=torch.full_like(arrays.atom_ids, 6)),
        )
        for code, message in zip(broken, ("slot", "atom"), strict=True):
            with pytest.raises(RuntimeError, match=f"the code's {message} is out of range"):
                ops().sparse_embedding_cuda(torch.arange(20), *code, fp32)
