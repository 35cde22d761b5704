"""relation_kl reads every layout: masks, packed batches, strides; and answers every upstream gradient."""

import pytest
import torch

from fastkd.ops import relation_kl

LENGTHS = [70, 1, 0, 33, 64, 17]


def mask_of(pattern: str, device) -> torch.Tensor:
    lengths, positions = torch.tensor(LENGTHS, device=device)[:, None], torch.arange(70, device=device)
    if pattern == "right padding":
        return positions < lengths
    if pattern == "left padding":
        return positions >= 70 - lengths
    if pattern == "holes":
        return (torch.rand(6, 70, generator=torch.Generator().manual_seed(1)) > 0.4).to(device)
    return torch.zeros(6, 70, dtype=torch.bool, device=device)  # nothing valid


PATTERNS = ["right padding", "left padding", "holes", "nothing valid"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_mask_is_right_and_padding_may_hold_nan(draw, check, backend, pattern, causal, dtype):
    student, teacher = draw(6, 70, (24, 48), dtype=dtype)
    mask = mask_of(pattern, backend.device)
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    losses, (grad,) = check(student, teacher, 3, mask=mask, causal=causal)
    assert not grad[~mask].any(), "padding must get a gradient of exactly zero"
    assert not losses[mask.sum(1) <= 1].any(), "a softmax over one token or none has no divergence"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cross_relations_take_masks_too(draw, check, backend, pattern):
    (left, teacher_left), (right, teacher_right) = (draw(6, 70, (16, 32)) for _ in range(2))
    mask = mask_of(pattern, backend.device)
    for x in (left, right, teacher_left, teacher_right):
        x[~mask] = float("nan")
    _, grads = check((left, right), (teacher_left, teacher_right), 2, mask=mask)
    assert not any(grad[~mask].any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_masks_are_boolean_or_integers(draw, check, backend, dtype):
    check(*draw(6, 70, (16, 16)), 2, mask=mask_of("holes", backend.device).to(dtype))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_batches_are_right(draw, check, backend, index_dtype, cross, causal):
    cu_seqlens = torch.tensor([0, *LENGTHS], device=backend.device).cumsum(0).to(index_dtype)
    (student, teacher), (right, teacher_right) = (draw(sum(LENGTHS), (16, 32)) for _ in range(2))
    operands = ((student, right), (teacher, teacher_right)) if cross else (student, teacher)
    check(*operands, 2, cu_seqlens=cu_seqlens, max_seqlen=max(LENGTHS), causal=causal)


def test_rows_behind_the_last_packed_sequence_get_zero_gradient_and_may_hold_nan(draw, check, backend):
    student, teacher = draw(12, (8, 16))
    student[9:], teacher[9:] = float("nan"), float("nan")
    _, (grad,) = check(student, teacher, 2, cu_seqlens=torch.tensor([0, 4, 4, 9], device=backend.device))
    assert not grad[9:].any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no sequence", "no token"])
def test_an_empty_batch_has_no_loss_and_an_empty_gradient(draw, backend, shape):
    student, teacher = draw(*shape, (8, 16))
    student.requires_grad_()
    loss = relation_kl(student, teacher, 2, backend=backend.name)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and grad.shape == student.shape


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]], ids=["no sequence", "empty sequences"])
def test_an_empty_packed_batch_has_no_loss_and_zero_gradient(draw, backend, offsets, rows):
    student, teacher = draw(rows, (8, 16))
    student.requires_grad_()
    loss = relation_kl(
        student, teacher, 2, cu_seqlens=torch.tensor(offsets, device=backend.device), backend=backend.name
    )
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and grad.shape == student.shape and not grad.any()


def chunk_of_fused_qkv(x):
    return torch.cat([torch.full_like(x, float("nan")), x, torch.full_like(x, float("nan"))], -1).chunk(3, -1)[1]


STRIDED = {
    "chunk of a fused QKV projection": chunk_of_fused_qkv,
    "every second token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "batch and length swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one sequence for the whole batch": lambda x: x[:1].expand(len(x), -1, -1),
    "last dimension not dense": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "storage offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strided_operands_are_read_in_place(backend, draw, view, dtype):
    student, teacher = draw(3, 33, (16, 32), dtype=dtype)
    mask = torch.rand(3, 33).to(backend.device) > 0.2
    results = []
    for make in (lambda x: view(x), lambda x: view(x).clone(memory_format=torch.contiguous_format)):
        leaf = student.clone().requires_grad_()
        loss = relation_kl(make(leaf), make(teacher), 2, mask=mask, backend=backend.name)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    (loss, grad), (dense_loss, dense_grad) = results
    assert torch.equal(loss, dense_loss) and torch.equal(grad, dense_grad)


def test_packed_operands_may_be_strided(draw, check, backend):
    (student, teacher), cu_seqlens = draw(40, (16, 32)), torch.tensor([0, 15, 40], device=backend.device)
    wide, wide_teacher = torch.cat([student, student], -1), torch.cat([teacher, teacher], -1)
    check(wide[:, :16], wide_teacher[:, 32:], 2, cu_seqlens=cu_seqlens)


UPSTREAMS = {
    "stride 0, as from sum()": lambda: torch.tensor(0.7).expand(4),
    "strided": lambda: torch.randn(8)[::2],
    "zero": lambda: torch.zeros(4),
    "of mixed sign and size": lambda: torch.tensor([1e4, -1e-4, 0.0, -3.0]),
}


@pytest.mark.parametrize("upstream", UPSTREAMS.values(), ids=UPSTREAMS)
def test_upstream_gradients_of_any_layout_and_value(draw, check, backend, upstream):
    check(*draw(4, 18, (16, 32)), 2, upstream=upstream().to(backend.device))


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_absent_upstream_gradient_gives_none(draw, backend):
    student, teacher = draw(2, 5, (8, 8))
    student.requires_grad_()
    _NoGradient.apply(relation_kl(student, teacher, 2, reduction="none", backend=backend.name)).sum().backward()
    assert student.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_loss_scale_of_65536_costs_no_accuracy(draw, run, truth, backend, dtype):
    """Unscaled, these gradients are subnormal in fp16: a factor applied before the cast would cost their digits."""
    student, teacher = draw(2, 64, (48, 48), dtype=dtype)
    student = (teacher.float() + 0.02 * student.float()).to(dtype)
    scale = torch.full((2,), 65_536.0 / 2, device=backend.device)
    _, (grad,) = run(student, teacher, 12, scale)
    _, (exact,) = truth(student, teacher, 12, scale)
    assert (exact / 65_536).abs().median() < 0.1 * torch.finfo(torch.float16).smallest_normal
    relative = ((grad.double() - exact).abs() / exact.abs()).median().item()
    assert relative < torch.finfo(dtype).eps, "two roundings, of the saved gradient and of the result"


def test_gradients_add_up_over_micro_batches(draw, backend):
    """Both forwards run before either backward: nothing that the first saved may be overwritten by the second."""
    student, teacher = draw(4, 18, (16, 32))
    whole, parts = student.clone().requires_grad_(), student.clone().requires_grad_()
    relation_kl(whole, teacher, 2, backend=backend.name).backward()
    halves = [relation_kl(parts[i : i + 2], teacher[i : i + 2], 2, backend=backend.name) / 2 for i in (0, 2)]
    for half in halves:
        half.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-9)
