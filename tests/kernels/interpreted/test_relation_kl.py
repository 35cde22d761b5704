"""The Triton kernels against the definition in fp64, on CPU tensors; started by ../test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off", allow_module_level=True)

from fastkd.benchmarks.accuracy import judge
from fastkd.kernels import relation_kl as kernels
from fastkd.ops.relation_kl import eager_relation_kl

HEADS = 2
FORMS = {"self": (False, False), "self causal": (False, True), "cross": (True, False), "cross causal": (True, True)}
forms = pytest.mark.parametrize(("cross", "causal"), FORMS.values(), ids=FORMS)
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def draw(batch, length, width_s=8, width_t=16, cross=False, dtypes=(fp32, fp32), spread=1.0):
    """Student and teacher operands, a list of one (self) or two (cross) tensors each."""
    return tuple(
        [(torch.randn(batch, length, HEADS * width) * spread).to(dtype) for _ in range(1 + cross)]
        for width, dtype in zip((width_s, width_t), dtypes, strict=True)
    )


def launch(
    student, teacher, lengths, causal=False, starts=None, order=None, max_length=None, divisor=1, with_grad=True
):
    starts = torch.zeros(len(lengths), dtype=torch.int64) if starts is None else torch.tensor(starts)
    max_length = student[0].shape[-2] if max_length is None else max_length
    losses, *grads = kernels.relation_kl(
        student[0], student[1] if len(student) == 2 else None, teacher[0], teacher[1] if len(teacher) == 2 else None,
        starts, torch.tensor(lengths, dtype=torch.int32), order, max_length, HEADS, causal, divisor, with_grad,
    )  # fmt: skip
    return losses, *grads[: len(student)]


def definition(student, teacher, lengths, causal=False, divisor=1, dtype=None):
    """Losses and the gradients of their sum / divisor, in fp16 without the factors, by autograd, in `dtype` or in the
    tensors' own."""
    folded = student[0].dtype != fp16
    student = [x.to(dtype or x.dtype).clone().requires_grad_() for x in student]
    teacher = [y.to(dtype or y.dtype) for y in teacher]
    lengths = torch.tensor(lengths)
    losses = eager_relation_kl((student[0], student[-1]), (teacher[0], teacher[-1]), lengths, HEADS, causal)
    (losses / divisor if folded else losses * HEADS * lengths.clamp(min=1)).sum().backward()
    return losses.detach(), *(x.grad for x in student)


def check(student, teacher, lengths, causal=False, noise=1e-7, divisor=1):
    """noise: of the loss, and of the gradient without its factor."""
    results = launch(student, teacher, lengths, causal, divisor=divisor)
    eagers = definition(student, teacher, lengths, causal, divisor)
    truths = definition(student, teacher, lengths, causal, divisor, torch.float64)
    largest_factor = 1 if student[0].dtype == fp16 else 1 / (HEADS * min(n for n in lengths if n) * divisor)
    noises = (noise, noise * largest_factor, noise * largest_factor)
    names = ("loss", "gradient", "right")
    for name, result, eager, truth, allowed in zip(names, results, eagers, truths, noises, strict=False):
        verdict = judge(result, eager, truth, noise=allowed)
        assert verdict, f"{name}: {verdict}"


def rounded_scores(student, teacher):
    """What rounding the largest score once comes to in the gradient, two times G · X / √d.

    The interpreter's products are NumPy's: the score of one pair rounds differently in the two sweeps, by CPU and tile.
    """
    split = [[x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in pair] for pair in (student, teacher)]
    largest = max((x[0] @ x[-1].mT).abs().max().item() / x[0].shape[-1] ** 0.5 for x in split)
    of_gradient = 2 * max(x.abs().max().item() for x in student) / split[0][0].shape[-1] ** 0.5
    return torch.finfo(fp32).eps / 2 * largest * of_gradient


def same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@forms
@pytest.mark.parametrize("length", [1, 16, 17, 31])
def test_short_sequences(cross, causal, length):
    student, teacher = draw(3, length, cross=cross)
    check(student, teacher, [length, length // 2 + 1, 0], causal)


@forms
@pytest.mark.parametrize("length", [33, 64, 65])
def test_sequences_of_several_tiles(cross, causal, length):
    student, teacher = draw(3, length, cross=cross)
    check(student, teacher, [length, length // 2, 0], causal)


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("widths", [(1, 1), (6, 16), (8, 26), (26, 64), (32, 32), (128, 2)])
def test_head_widths(widths, length):
    student, teacher = draw(1, length, *widths)
    check(student, teacher, [length])


@pytest.mark.parametrize("length", [70, 140])
@pytest.mark.parametrize("dtypes", [(bf16, bf16), (fp16, fp16), (fp32, bf16), (bf16, fp32), (fp16, bf16)])
def test_dtypes(dtypes, length):
    student, teacher = draw(1, length, 16, 32, dtypes=dtypes)
    check(student, teacher, [length])


@forms
@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("dtype", [fp32, bf16, fp16])
def test_the_divisor_of_the_reduction_is_in_the_gradient(dtype, length, cross, causal):
    student, teacher = draw(3, length, cross=cross, dtypes=(dtype, dtype))
    check(student, teacher, [length, 0, length // 2], causal, divisor=1000)


@pytest.mark.parametrize("length", [100, 140])
@pytest.mark.parametrize(("cross", "causal"), [(False, True), (True, False)])
def test_forms_in_bf16(cross, causal, length):
    student, teacher = draw(1, length, cross=cross, dtypes=(bf16, bf16))
    check(student, teacher, [length - 3], causal)


@forms
@pytest.mark.parametrize("max_length", [21, 40])
def test_packed_sequences_equal_padded_ones(cross, causal, max_length):
    lengths = [5, 0, max_length, 1, 13, max_length]
    student, teacher = draw(len(lengths), max_length, cross=cross)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [torch.cat([x[i, :n] for i, n in enumerate(lengths)] + [torch.full_like(x[0, :4], torch.nan)]) for x in
            (*student, *teacher)]  # fmt: skip
    packed = launch(rows[: len(student)], rows[len(student) :], lengths, causal, starts=starts, max_length=max_length)
    padded = launch(student, teacher, lengths, causal)
    expected = [torch.cat([g[i, :n] for i, n in enumerate(lengths)] + [torch.zeros_like(g[0, :4])]) for g in padded[1:]]
    same(packed, [padded[0], *expected])


@forms
@pytest.mark.parametrize("length", [24, 45])
def test_holes_in_the_mask_are_skipped(cross, causal, length):
    student, teacher = draw(2, length, cross=cross)
    valid = torch.rand(2, length) < 0.7
    order = torch.argsort(~valid, dim=1, stable=True)
    lengths = valid.sum(1).tolist()
    compact = [[x.gather(1, order[:, :, None].expand_as(x)) for x in pair] for pair in (student, teacher)]
    losses, *grads = launch(*compact, lengths, causal)
    expected = [torch.zeros_like(g).scatter(1, order[:, :, None].expand_as(g), g) for g in grads]
    same(launch(student, teacher, lengths, causal, order=order.int()), [losses, *expected])


@pytest.mark.parametrize("length", [24, 40])
def test_strided_operands_are_read_in_place(length):
    fused_s, fused_t = torch.randn(2, length + 1, 3 * 16), torch.randn(1, length, 3 * 32).expand(2, -1, -1)
    student, teacher = [fused_s[:, 1:, 5:21], fused_s[:, :-1, 16:32]], [fused_t[..., 32:64], fused_t[..., :32]]
    dense = [[x.contiguous() for x in pair] for pair in (student, teacher)]
    same(launch(student, teacher, [length, 9]), launch(*dense, [length, 9]))


@forms
@pytest.mark.parametrize("length", [24, 45])
def test_padding_is_never_read(cross, causal, length):
    student, teacher = draw(2, length, cross=cross)
    expected = launch(student, teacher, [length - 5, 3], causal)
    for x in (*student, *teacher):
        x[0, length - 5 :], x[1, 3:] = torch.nan, torch.nan
    same(launch(student, teacher, [length - 5, 3], causal), expected)


@forms
@pytest.mark.parametrize("length", [24, 70])
def test_every_output_is_written(cross, causal, length, monkeypatch):
    student, teacher = draw(3, length, cross=cross)
    expected = launch(student, teacher, [length - 5, 0, 3], causal)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    same(launch(student, teacher, [length - 5, 0, 3], causal), expected)
    assert not any(g[1].any() or g[0, length - 5 :].any() for g in expected[1:])


@pytest.mark.parametrize("max_length", [0, 20, 40])
def test_a_bound_below_the_padded_length_changes_nothing(max_length):
    student, teacher = draw(2, 50)
    lengths = [max_length, max_length // 2]
    loss, grad = launch(student, teacher, lengths, max_length=max_length)
    verdict = judge(loss, loss, definition(student, teacher, lengths, dtype=torch.float64)[0], noise=1e-7)
    assert verdict and not grad[0, max_length:].any(), str(verdict)


@forms
@pytest.mark.parametrize("length", [24, 40])
def test_without_gradient_only_the_loss_is_made(cross, causal, length):
    student, teacher = draw(2, length, cross=cross)
    losses, *grads = launch(student, teacher, [length, 7], causal, with_grad=False)
    same([losses], launch(student, teacher, [length, 7], causal)[:1])
    assert all(g.shape == (0,) for g in grads)


@forms
@pytest.mark.parametrize("length", [30, 40])
@pytest.mark.parametrize("spread", [10.0, 30.0])
def test_scores_in_the_thousands(cross, causal, length, spread):
    student, teacher = draw(1, length, cross=cross)
    student, teacher = [x * spread for x in student], [y * spread for y in teacher]
    check(student, teacher, [length], causal, rounded_scores(student, teacher))


@pytest.mark.parametrize("length", [30, 40])
def test_rows_of_very_different_size(length):
    student, teacher = draw(1, length)
    scale = torch.linspace(0.1, 40, length)[None, :, None]
    student, teacher = [student[0] * scale], [teacher[0] * scale.flip(1)]
    check(student, teacher, [length], noise=rounded_scores(student, teacher))


@pytest.mark.parametrize("length", [30, 40])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_a_student_close_to_its_teacher(length, spread):
    (student,), _ = draw(1, length, 16, 16, spread=spread)
    check([student * (1 + 1e-4 * torch.randn_like(student))], [student], [length])


@pytest.mark.parametrize("length", [30, 140])
def test_small_differences_survive_fp16(length):
    """S − P is far below fp16's normal numbers here, and the gradient of the left operand is not."""
    left, right = (torch.randn(1, length, HEADS * 16) * scale for scale in (1e-3, 30))
    student = [left.to(fp16), right.to(fp16)]
    teacher = [student[0].float() * 1.001, student[1].float()]
    _, grad, _ = launch(student, teacher, [length])
    truth = definition(student, teacher, [length], dtype=torch.float64)[1]
    assert (grad - truth).abs().max() <= 0.01 * truth.abs().max()


def test_equal_operands_have_neither_loss_nor_gradient():
    (student,), _ = draw(2, 40)
    losses, grad = launch([student], [student], [40, 7])
    assert not losses.any() and not grad.any()


def test_a_batch_without_sequences():
    losses, grad = launch(*draw(0, 12), [])
    assert losses.shape == (0,) and grad.shape == (0, 12, 16)


def test_heads_wider_than_a_tile_are_refused():
    with pytest.raises(ValueError, match=r"num_heads=2 .* width 129 .* up to 128"):
        launch(*draw(1, 4, 129, 16), [4])
