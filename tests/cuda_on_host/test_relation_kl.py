"""The CUDA kernels of relation_kl give the right numbers: run on the CPU, against the eager definition in fp64."""

from contextlib import contextmanager

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.ops.relation_kl import eager_relation_kl

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [fp32, bf16, fp16]
# Head widths of student and teacher: every class of the kernels, aligned to 16 bytes and not. Self relations of 16-bit
# tensors run on the resident kernel where student and teacher are up to 32 and 64 wide, on the sweeps otherwise.
WIDTHS = [(16, 16), (8, 64), (32, 64), (6, 16), (26, 64), (5, 3), (40, 24), (128, 128)]


def rows_of(call, sequence):
    """Index of the valid rows of a sequence."""
    n = int(call.lengths[sequence])
    if call.student.dim() == 2:
        return (call.starts[sequence] + torch.arange(n),)
    return sequence, torch.arange(n) if call.order is None else call.order[sequence, :n].long()


def by_definition(call, dtype):
    """Losses (B,), and the gradients of their sum / divisor by autograd, of the eager form in `dtype`."""
    cross = call.student_right is not None
    leaves = [x.to(dtype).requires_grad_() for x in (call.student, call.student_right)[: 1 + cross]]
    teachers = [x.to(dtype) for x in (call.teacher, call.teacher_right)[: 1 + cross]]
    losses = []
    for sequence, n in enumerate(call.lengths[:, None]):
        s, t = ([x[rows_of(call, sequence)][None] for x in operands] for operands in (leaves, teachers))
        losses.append(eager_relation_kl((s[0], s[-1]), (t[0], t[-1]), n, call.num_heads, call.causal)[0])
    losses = torch.stack(losses)
    return losses.detach(), *torch.autograd.grad(losses.sum() / call.divisor, leaves)


def scaled(call, grad):
    """In fp16 the kernels leave the factor 1 / (num_heads · n · divisor) to backward; padding must already be zero."""
    out = torch.zeros_like(grad, dtype=fp32)
    for sequence, n in enumerate(call.lengths.tolist()):
        rows = rows_of(call, sequence)
        out[rows] = grad[rows].float() / (call.num_heads * max(n, 1) * call.divisor if grad.dtype == fp16 else 1)
        grad[rows] = 0
    assert not grad.any(), "the gradient of padding is not zero"
    return out.to(grad.dtype)


def assert_right(call, losses, *grads):
    exact = by_definition(call, torch.float64)
    eager = next(x for x in (by_definition(call, d) for d in (call.student.dtype, fp32)) if all(map(all_finite, x)))
    # What three units in the last place of one fp32 probability come to in the gradient of a one-token sequence, which
    # in a self relation takes it up twice, in the row and in the column.
    largest = call.student.nan_to_num(0, 0, 0).abs().max().item()
    times = 1 if call.student_right is not None else 2
    noise = times * 2e-7 * largest / (call.num_heads * call.student.shape[-1]) ** 0.5 / call.divisor
    verdict = judge(losses, eager[0], exact[0], noise=FLOORS[fp32])
    assert verdict, f"loss: {verdict}"
    for grad, *others in zip(grads, eager[1:], exact[1:], strict=False):
        verdict = judge(scaled(call, grad), *others, noise=noise)
        assert verdict, f"gradient: {verdict}"


def all_finite(x):
    return x.isfinite().all()


@contextmanager
def poisoned_allocations():
    """Every uninitialised tensor that torch hands out inside, to C++ as well, is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def check(kernels, call):
    """check(student, teacher, num_heads, **layout): loss and gradients keep the rule of benchmarks/accuracy.py."""

    def compare(student, teacher, num_heads, seed=0, sm=90, **layout):
        arguments = call(student, teacher, num_heads, **layout)
        with poisoned_allocations():
            result = kernels(arguments, seed, sm)
        assert_right(arguments, *result)

    return compare


def draw(*leading_and_widths, dtype=fp32, teacher_dtype=None, scale=1.0):
    *leading, widths = leading_and_widths
    student, teacher = (scale * torch.randn(*leading, width) for width in widths)
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def heads(widths, count=2):
    return tuple(count * width for width in widths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_self_relations_of_every_width_are_right(check, widths, dtype):
    check(*draw(1, 70, heads(widths), dtype=dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 31, 32, 33, 63, 64, 65, 97, 128, 129, 193])
def test_lengths_around_a_tile_are_right(check, length, dtype):
    check(*draw(1, length, (16, 16), dtype=dtype), 1)


@pytest.mark.parametrize("length", [257, 320, 512, 600])
def test_large_blocks_of_the_resident_kernel_are_right(check, length):
    check(*draw(1, length, (16, 16), dtype=bf16), 1)


@pytest.mark.parametrize("length", [257, 400])
def test_large_blocks_of_the_resident_kernel_with_wider_heads_are_right(check, length):
    check(*draw(1, length, (32, 64), dtype=bf16), 1)


def test_sequences_too_long_for_one_block_are_right(check):
    check(*draw(1, 1030, (16, 16), dtype=bf16), 1)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(32, 64), (26, 64), (5, 3)], ids=str)
@pytest.mark.parametrize("length", [1, 65, 130])
def test_cross_relations_give_both_operands_their_gradient(check, length, widths, dtype, causal):
    (left, teacher_left), (right, teacher_right) = (draw(1, length, heads(widths), dtype=dtype) for _ in range(2))
    check((left, right), (teacher_left, teacher_right), 2, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_causal_self_relations_are_right(check, length, dtype):
    check(*draw(1, length, (32, 64), dtype=dtype), 1, causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_masks_with_holes_are_compacted_and_padding_may_hold_nan(check, dtype, causal):
    student, teacher = draw(4, 90, (32, 64), dtype=dtype)
    mask = torch.rand(4, 90) > 0.4
    mask[2] = False
    student[~mask], teacher[~mask] = float("nan"), float("nan")
    check(student, teacher, 2, mask=mask, causal=causal)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_packed_ragged_batches_with_empty_sequences_are_right(check, dtype):
    student, teacher = draw(175, (32, 64), dtype=dtype)
    student[170:] = float("nan")
    cu_seqlens = torch.tensor([0, 3, 3, 80, 81, 170])
    for causal in (False, True):
        check(student, teacher, 2, cu_seqlens=cu_seqlens, causal=causal)


@pytest.mark.parametrize("offset", [1, 4, 24])
def test_views_at_any_alignment_are_read_in_place_and_their_neighbours_not_at_all(check, offset):
    """A slice of a wider tensor: rows begin `offset` elements behind a 16-byte boundary, among NaN."""
    operands = []
    for x in draw(1, 70, (26 * 2, 64 * 2), dtype=bf16):
        wide = torch.full((*x.shape[:-1], x.shape[-1] // 8 * 8 + 40), float("nan"), dtype=bf16)
        wide[..., offset : offset + x.shape[-1]] = x
        operands.append(wide[..., offset : offset + x.shape[-1]])
    check(*operands, 2)
    check(tuple(operands[:1]) * 2, tuple(operands[1:]) * 2, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(16, 16), (40, 24)], ids=["resident", "sweeps"])
def test_the_divisor_of_the_reduction_is_in_the_gradient(check, widths, dtype):
    operands = [draw(3, 70, heads(widths), dtype=dtype) for _ in range(2)]
    mask = torch.arange(70) < torch.tensor([70, 0, 33])[:, None]
    check(*operands[0], 2, mask=mask, divisor=1000)
    check(*zip(*operands, strict=True), 2, mask=mask, divisor=1000)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_student_and_teacher_may_differ_in_dtype(check, teacher_dtype):
    for dtype in DTYPES:
        check(*draw(1, 40, (16, 32), dtype=dtype, teacher_dtype=teacher_dtype), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deviation", [10, 30])
def test_peaked_relations_stay_exact(check, deviation, dtype):
    check(*draw(1, 70, (64, 64), scale=deviation**0.5, dtype=dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_whose_diagonal_spreads_too_far_are_left_to_the_sweeps(check, dtype):
    student, teacher = draw(2, 70, (32, 32))
    norms = torch.linspace(0.05, 8, 70)[:, None]
    student[0], teacher[0] = student[0] * norms, teacher[0] * norms.flip(0)
    check(student.to(dtype), teacher.to(dtype), 2)


@pytest.mark.parametrize(("dtype", "largest"), [(fp32, 1e4), (bf16, 1e4), (fp16, 1e4), (fp16, 65504)], ids=str)
def test_extreme_projections_stay_finite_and_right(check, dtype, largest):
    student, teacher = (largest * x.tanh() for x in draw(1, 33, (16, 32)))
    check(student.to(dtype), teacher.to(dtype), 2)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_a_student_close_to_the_teacher_keeps_a_small_exact_gradient(check, dtype):
    _, teacher = draw(1, 70, (32, 32))
    check((teacher + 1e-3 * torch.randn(1, 70, 32)).to(dtype), teacher.to(dtype), 2)


def test_nan_in_a_projection_reaches_the_loss_of_its_sequence_only(kernels, call):
    student, teacher = draw(2, 40, (16, 16), dtype=bf16)
    student[0, 3, 5] = float("nan")
    losses, grad, _ = kernels(call(student, teacher, 1))
    assert losses[0].isnan() and losses[1].isfinite()
    assert grad[0].isnan().any() and grad[1].isfinite().all()


@pytest.mark.parametrize(("widths", "length"), [((16, 16), 150), ((32, 64), 300), ((40, 24), 150)], ids=str)
def test_no_order_of_the_threads_changes_a_bit(kernels, call, widths, length):
    """So there is a barrier wherever two warps meet, and no sum whose order is left to chance."""
    arguments = call(*draw(2, length, widths, dtype=bf16), 1)
    first, *others = (kernels(arguments, seed) for seed in (1, 1000, 2000))
    assert all(torch.equal(x, y) for other in others for x, y in zip(other, first, strict=True))


def test_without_a_gradient_there_is_the_same_loss_and_nothing_else(kernels, call):
    for length, dtype in ((70, bf16), (70, fp32)):
        operands = draw(1, length, (16, 16), dtype=dtype)
        losses, _, _ = kernels(call(*operands, 1))
        alone, *gradients = kernels(call(*operands, 1, with_grad=False))
        assert torch.equal(losses, alone) and all(grad.numel() == 0 for grad in gradients)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_the_widest_heads_fit_an_a100(check, dtype):
    check(*draw(1, 70, (128, 128), dtype=dtype), 1, sm=80)


def test_heads_that_do_not_fit_the_device_are_named(library, call):
    library.set_device(99 * 1024, 0)
    with pytest.raises(RuntimeError, match=r"relation heads of width 128 and 128 take .* bytes of shared memory"):
        torch.ops.fastkd.relation_kl_cuda(*call(*draw(1, 20, (128, 128)), 1))
    with pytest.raises(RuntimeError, match=r"relation heads are 130 \(student\) and 8 \(teacher\) wide"):
        torch.ops.fastkd.relation_kl_cuda(*call(*draw(1, 20, (130, 8)), 1))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no sequence", "no token"])
def test_an_empty_batch_has_no_loss_and_an_empty_gradient(kernels, call, shape):
    student, teacher = draw(*shape, (8, 16))
    losses, grad, _ = kernels(call(student, teacher, 2))
    assert not losses.any() and grad.shape == student.shape
