"""Attributions normalised, and how far two of them are apart."""

import pytest
import torch

from fastkd.explain import distance, normalise
from fastkd.explain.scores import length

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def _scores():
    return (torch.randn(2, 4, dtype=torch.float64) * MASK).requires_grad_()


@pytest.mark.parametrize("norm", [None, "l1", "l2"])
def test_normalised_scores_pass_gradcheck_twice(norm):
    weights = torch.randn(2, 4, dtype=torch.float64)
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: normalise(a, norm) * weights, scores)
    assert torch.autograd.gradgradcheck(lambda a: (normalise(a, norm) * weights).square(), scores)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scores_of_zero_stay_zero_and_have_no_gradient(norm):
    scores = torch.zeros(1, 3, requires_grad=True)
    [first] = torch.autograd.grad(normalise(scores, norm).square().sum(), scores, create_graph=True)
    [second] = torch.autograd.grad(first.sum(), scores)
    assert not first.any() and not second.any()


def test_the_length_of_a_zero_row_has_derivatives_of_zero():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    [first] = torch.autograd.grad(length(rows).sum(), rows, create_graph=True)
    torch.testing.assert_close(first, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    [second] = torch.autograd.grad(first.square().sum(), rows)
    assert second.isfinite().all() and not second[1].any()


@pytest.mark.parametrize(("kind", "of"), [("l2", lambda x: x * x), ("l1", abs)])
def test_the_distance_is_a_mean_over_tokens_and_then_sequences(kind, of):
    student, teacher = _scores(), _scores()
    apart = of(student - teacher)
    expected = (apart[0].sum() / 4 + apart[1].sum() / 2) / 2
    torch.testing.assert_close(distance(student, teacher, MASK, kind), expected)


def test_a_batch_may_be_cut_anywhere():
    student, teacher = _scores(), _scores()
    parts = [distance(student[i : i + 1], teacher[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(distance(student, teacher, MASK), sum(parts) / 2)


def test_several_classes_add_up():
    student, teacher = torch.randn(2, 3, 4) * MASK[:, None], torch.randn(2, 3, 4) * MASK[:, None]
    expected = sum(distance(student[:, c], teacher[:, c], MASK, "smooth_l1") for c in range(3))
    torch.testing.assert_close(distance(student, teacher, MASK, "smooth_l1"), expected)


def test_a_teacher_that_explains_nothing_teaches_nothing():
    student, teacher = _scores(), _scores().detach()
    teacher[1] = 0
    loss = distance(student, teacher, MASK)
    torch.testing.assert_close(loss, (student - teacher)[0].square().sum() / 4 / 2)
    loss.backward()
    assert not student.grad[1].any()


def test_an_empty_sequence_adds_nothing():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert distance(torch.ones(2, 4), torch.full((2, 4), 2.0), mask).item() == pytest.approx(0.5)


def test_the_teacher_gets_no_gradient():
    student, teacher = _scores(), _scores()
    distance(student, teacher, MASK).backward()
    assert teacher.grad is None and student.grad.any()


def test_nan_scores_show_in_the_distance():
    student = torch.ones(2, 4)
    student[0, 1] = torch.nan
    assert distance(student, torch.ones(2, 4), MASK).isnan()


def test_unknown_norms_and_distances_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="norm='max'"):
        normalise(torch.ones(1, 2), "max")
    with pytest.raises(ValueError, match="distance='cosine'; allowed are l1, l2, smooth_l1"):
        distance(torch.ones(2, 4), torch.ones(2, 4), MASK, "cosine")
    with pytest.raises(ValueError, match=r"\(2, 4\), the teacher's \(2, 3, 4\)"):
        distance(torch.ones(2, 4), torch.ones(2, 3, 4), MASK)
