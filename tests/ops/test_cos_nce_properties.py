"""What holds for cos_nce whatever the input: properties on drawn shapes, masks, ids and values."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from fastkd.ops import cos_nce

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
# Fixtures here only name a backend: nothing in them changes from example to example.
shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def problems(draw):
    """student (B, L, D), teacher, mask, ids."""
    batch, length, width = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, teacher = torch.randn(2, batch, length, width, generator=generator)
    mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    ids = torch.randint(draw(st.sampled_from([1, 3, 100])), (batch,), generator=generator)
    return student, teacher, mask, ids


def run(backend, student, teacher, mask, ids):
    leaf = student.to(backend.device).requires_grad_()
    losses = cos_nce(
        leaf, teacher.to(backend.device), mask=mask.to(backend.device), exclude=ids, reduction="none",
        backend=backend.name,
    )  # fmt: skip
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def assert_same(one, other, student):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-5)
    # Gradients are of the size 1 / ‖s‖.
    norms = student.norm(dim=-1, keepdim=True).to(one[1].device)
    torch.testing.assert_close(one[1] * norms, other[1] * norms, rtol=0, atol=1e-5)


@shared_fixture
@given(problem=problems())
def test_a_loss_lies_between_zero_and_four(backend, problem):
    losses, grad = run(backend, *problem)
    assert (losses >= -1e-5).all() and (losses <= 4 + 1e-5).all() and grad.isfinite().all()


@shared_fixture
@given(problem=problems())
def test_the_gradient_is_orthogonal_to_its_vector(backend, problem):
    student = problem[0]
    _, grad = run(backend, *problem)
    assert ((student * grad.cpu()).sum(-1)).abs().max() <= 1e-5


@shared_fixture
@given(problem=problems(), junk=st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_padding_content_is_irrelevant(backend, problem, junk):
    student, teacher, mask, ids = problem
    hidden = ~mask[:, :, None]
    clean, dirty = (
        run(backend, student.masked_fill(hidden, value), teacher.masked_fill(hidden, value), mask, ids)
        for value in (0.0, junk)
    )
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@shared_fixture
@given(problem=problems(), amount=st.integers(1, 20))
def test_more_padding_changes_nothing(backend, problem, amount):
    student, teacher, mask, ids = problem
    losses, grad = run(backend, *problem)
    wider = (pad(x, (0, 0, 0, amount), value=float("nan")) for x in (student, teacher))
    padded, padded_grad = run(backend, *wider, pad(mask, (0, amount)), ids)
    assert_same((padded, padded_grad[:, : student.shape[1]]), (losses, grad), student)


@shared_fixture
@given(problem=problems())
def test_a_common_rotation_turns_only_the_gradient(backend, problem):
    student, teacher, mask, ids = problem
    rotation = torch.linalg.qr(torch.randn(student.shape[-1], student.shape[-1]))[0]
    losses, grad = run(backend, *problem)
    turned = run(backend, student @ rotation, teacher @ rotation, mask, ids)
    assert_same(turned, (losses, grad @ rotation.to(grad.device)), student)


@shared_fixture
@given(problem=problems(), scale=st.sampled_from([1e-3, 0.5, 1e4]))
def test_the_length_of_a_vector_does_not_count(backend, problem, scale):
    student, teacher, mask, ids = problem
    losses, grad = run(backend, *problem)
    scaled_losses, scaled_grad = run(backend, scale * student, teacher / scale, mask, ids)
    assert_same((scaled_losses, scale * scaled_grad), (losses, grad), student)


@shared_fixture
@given(problem=problems())
def test_samples_may_stand_in_any_order_and_ids_may_be_renamed(backend, problem):
    student, teacher, mask, ids = problem
    order = torch.randperm(len(student))
    losses, grad = run(backend, *problem)
    moved = run(backend, student[order], teacher[order], mask[order], 7 - 3 * ids[order])
    assert_same(moved, (losses[order.to(losses.device)], grad[order.to(grad.device)]), student[order])
