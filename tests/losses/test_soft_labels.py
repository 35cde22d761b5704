"""Soft labels: the divergence of softened classes, or a squared error of scores."""

import pytest
import torch

from fastkd.losses import soft_label_loss


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize(("scale_tau2", "factor"), [(True, 1.21), (False, 1.0)])
def test_classes_give_the_divergence_of_softened_predictions(logits, scale_tau2, factor):
    student, teacher = logits
    p, q = (teacher / 1.1).softmax(-1), (student / 1.1).softmax(-1)
    expected = factor * (p * (p.log() - q.log())).sum() / 5
    assert soft_label_loss(student, teacher, 1.1, scale_tau2=scale_tau2).item() == pytest.approx(expected.item())


def test_a_score_gives_the_squared_error(logits):
    student, teacher = (x[:, :1] for x in logits)
    assert soft_label_loss(student, teacher, 7.0).item() == pytest.approx((student - teacher).square().mean().item())


def test_huge_logits_and_a_small_temperature_stay_finite():
    teacher, student = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert soft_label_loss(student, teacher, 0.5).isfinite()


def test_one_column_against_three_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 1\) and teacher_logits \(4, 3\) must have one shape"):
        soft_label_loss(torch.zeros(4, 1), torch.zeros(4, 3), 2.0)
