"""What holds for relation_kl whatever the input: properties on drawn shapes, masks and values."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from fastkd.ops import relation_kl

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
# Fixtures here only name a backend: nothing in them changes from example to example.
shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def problems(draw, same_width=False):
    """student (B, L, D), teacher, mask, heads, causal."""
    batch, length, heads = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    width, teacher_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 5.0]))
    student, teacher = (
        scale * torch.randn(batch, length, heads * d, generator=generator)
        for d in (width, width if same_width else teacher_width)
    )
    mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return student, teacher, mask, heads, draw(st.booleans())


def on(backend, *tensors):
    return tuple(x.to(backend.device) for x in tensors)


def size_of(*tensors):
    """Bound of the scores of all relations, at least 1: what their rounding errors are measured by."""
    return max(1.0, *(x.square().sum(-1).max().item() for x in tensors))


def loss_and_gradient(backend, student, teacher, heads, **options):
    """Losses (B,), and the gradient of their sum."""
    leaf = student.detach().clone().requires_grad_()
    losses = relation_kl(leaf, teacher, heads, reduction="none", backend=backend.name, **options)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@shared_fixture
@given(problem=problems())
def test_a_divergence_is_never_negative(backend, problem):
    student, teacher, mask, heads, causal = problem
    student, teacher, mask = on(backend, student, teacher, mask)
    losses, grad = loss_and_gradient(backend, student, teacher, heads, mask=mask, causal=causal)
    assert (losses >= -1e-6 * size_of(student, teacher)).all() and losses.isfinite().all() and grad.isfinite().all()


@shared_fixture
@given(problem=problems(same_width=True))
def test_equal_relations_have_no_divergence_and_no_gradient(backend, problem):
    student, _, mask, heads, causal = problem
    student, mask = on(backend, student, mask)
    losses, grad = loss_and_gradient(backend, student, student, heads, mask=mask, causal=causal)
    assert losses.abs().max() <= 1e-6 * size_of(student) and grad.abs().max() <= 1e-6 * size_of(student)


@shared_fixture
@given(problem=problems(), junk=st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_padding_content_is_irrelevant(backend, problem, junk):
    student, teacher, mask, heads, causal = problem
    student, teacher, mask = on(backend, student, teacher, mask)
    clean = loss_and_gradient(backend, student, teacher, heads, mask=mask, causal=causal)
    hidden = ~mask[:, :, None]
    dirty = loss_and_gradient(
        backend, student.masked_fill(hidden, junk), teacher.masked_fill(hidden, junk), heads, mask=mask, causal=causal
    )
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@shared_fixture
@given(problem=problems(), amount=st.integers(1, 70))
def test_more_padding_changes_nothing(backend, problem, amount):
    student, teacher, mask, heads, causal = problem
    student, teacher, mask = on(backend, student, teacher, mask)
    losses, grad = loss_and_gradient(backend, student, teacher, heads, mask=mask, causal=causal)
    wider = (pad(x, (0, 0, 0, amount), value=float("nan")) for x in (student, teacher))
    padded, padded_grad = loss_and_gradient(backend, *wider, heads, mask=pad(mask, (0, amount)), causal=causal)
    torch.testing.assert_close(padded, losses, rtol=1e-6, atol=1e-6 * size_of(student, teacher))
    torch.testing.assert_close(padded_grad[:, : grad.shape[1]], grad, rtol=1e-5, atol=1e-6 * size_of(student, teacher))


@shared_fixture
@given(problem=problems())
def test_a_common_rotation_of_a_heads_vectors_turns_only_the_gradient(backend, problem):
    student, teacher, mask, heads, causal = problem
    rotation = torch.linalg.qr(torch.randn(student.shape[-1] // heads, student.shape[-1] // heads))[0]
    student, teacher, mask, rotation = on(backend, student, teacher, mask, rotation)

    def turned(x):
        return (x.unflatten(-1, (heads, -1)) @ rotation).flatten(-2)

    losses, grad = loss_and_gradient(backend, student, teacher, heads, mask=mask, causal=causal)
    turned_losses, turned_grad = loss_and_gradient(backend, turned(student), teacher, heads, mask=mask, causal=causal)
    size = size_of(student, teacher)
    torch.testing.assert_close(turned_losses, losses, rtol=1e-5, atol=2e-6 * size)
    torch.testing.assert_close(turned_grad, turned(grad), rtol=1e-4, atol=1e-5 * size)


@shared_fixture
@given(problem=problems())
def test_sequences_do_not_see_each_other(backend, problem):
    student, teacher, mask, heads, causal = problem
    student, teacher, mask = on(backend, student, teacher, mask)
    order = torch.randperm(len(student)).to(backend.device)
    losses, grad = loss_and_gradient(backend, student, teacher, heads, mask=mask, causal=causal)
    moved, moved_grad = loss_and_gradient(
        backend, student[order], teacher[order], heads, mask=mask[order], causal=causal
    )
    torch.testing.assert_close(moved, losses[order], rtol=1e-6, atol=1e-6 * size_of(student, teacher))
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-5, atol=1e-6 * size_of(student, teacher))


@shared_fixture
@given(problem=problems())
def test_tokens_may_stand_in_any_order_without_causal(backend, problem):
    student, teacher, mask, heads, _ = problem
    student, teacher, mask = on(backend, student, teacher, mask)
    order = torch.randperm(student.shape[1]).to(backend.device)
    losses, grad = loss_and_gradient(backend, student, teacher, heads, mask=mask)
    moved, moved_grad = loss_and_gradient(backend, student[:, order], teacher[:, order], heads, mask=mask[:, order])
    size = size_of(student, teacher)
    torch.testing.assert_close(moved, losses, rtol=1e-5, atol=2e-6 * size)
    torch.testing.assert_close(moved_grad, grad[:, order], rtol=1e-4, atol=1e-5 * size)


@shared_fixture
@given(problem=problems())
def test_packed_and_padded_batches_agree(backend, problem):
    student, teacher, mask, heads, causal = problem
    student, teacher, mask = on(backend, student, teacher, mask)
    losses, grad = loss_and_gradient(backend, student, teacher, heads, mask=mask, causal=causal)
    cu_seqlens = pad(mask.sum(1).cumsum(0), (1, 0))
    packed, packed_grad = loss_and_gradient(
        backend, student[mask], teacher[mask], heads, cu_seqlens=cu_seqlens, max_seqlen=student.shape[1], causal=causal
    )
    torch.testing.assert_close(packed, losses, rtol=1e-6, atol=1e-6 * size_of(student, teacher))
    torch.testing.assert_close(packed_grad, grad[mask], rtol=1e-5, atol=1e-6 * size_of(student, teacher))


@shared_fixture
@given(problem=problems())
def test_causal_losses_do_not_look_ahead(backend, problem):
    """The gradient of a shorter sequence's loss is untouched by tokens that come later."""
    student, teacher, _, heads, _ = problem
    student, teacher = on(backend, student, teacher)
    half = (student.shape[1] + 1) // 2
    changed = student.clone()
    changed[:, half:] += 1
    rows = torch.arange(student.shape[1], device=backend.device) < half
    shorter = [
        relation_kl(x[:, rows], teacher[:, rows], heads, causal=True, reduction="none", backend=backend.name)
        for x in (student, changed)
    ]
    assert torch.equal(*shorter)
