"""The central difference with the fused distance is the one with the distance of scores."""

import pytest
import torch

from fastkd.explain import DistanceTo, GradientSettings, central_difference, distance, gradient_attribution
from fastkd.ops import use_backend

SETTINGS = {
    "saliency": GradientSettings("saliency", norm="l2"),
    "gradient x input": GradientSettings("gradient_x_input", score="log_probability", norm="l2"),
    "not normalised": GradientSettings("gradient_x_input"),
    "summed": GradientSettings("gradient_x_input", reduce="sum", norm="l1"),
    "2 steps from [MASK]": GradientSettings("integrated_gradients", steps=2, baseline="mask", norm="l2"),
}
TARGETS = torch.tensor([2, 0, 1])


def _gradients(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("target", [TARGETS, "all"], ids=["one class", "every class"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_both_forms_agree(classifier, bert, batch, settings, target):
    scores = gradient_attribution(classifier, batch, settings, target=target)
    teacher = (scores * torch.rand_like(scores)).detach()
    of_scores = central_difference(
        classifier, batch, settings, lambda a: distance(a, teacher, batch["attention_mask"], "smooth_l1"), target=target
    )
    fused = central_difference(classifier, batch, settings, DistanceTo(teacher, "smooth_l1"), target=target)
    torch.testing.assert_close(fused, of_scores)
    torch.testing.assert_close(_gradients(bert, fused), _gradients(bert, of_scores))


def test_the_compiled_kernel_agrees_too(classifier, bert, batch):
    bert.float()
    settings = SETTINGS["gradient x input"]
    scores = gradient_attribution(classifier, batch, settings, target=TARGETS)
    teacher = (scores * torch.rand_like(scores)).detach()

    def found(backend):
        with use_backend(backend):
            loss = central_difference(classifier, batch, settings, DistanceTo(teacher), target=TARGETS)
            return loss.detach(), _gradients(bert, loss)

    torch.testing.assert_close(found("auto"), found("reference"), rtol=2e-3, atol=1e-6)


def test_a_saturated_student_gives_no_gradient_and_no_nan(linear, batch):
    with torch.no_grad():
        linear.model.weight.zero_()
    teacher = torch.rand(batch["attention_mask"].shape)
    loss = central_difference(linear, batch, SETTINGS["gradient x input"], DistanceTo(teacher), target=TARGETS)
    assert loss > 0 and not _gradients(linear.model, loss).any()


def test_a_gradient_of_nan_gives_a_loss_by_which_the_step_can_be_skipped(classifier, bert, batch):
    with torch.no_grad():
        bert.classifier.weight[0, 0] = torch.nan
    teacher = torch.rand(batch["attention_mask"].shape)
    loss = central_difference(classifier, batch, SETTINGS["summed"], DistanceTo(teacher), target=TARGETS)
    assert loss.isnan()


def test_scores_of_other_tokens_are_refused(classifier, batch):
    with pytest.raises(ValueError, match="teacher has shape"):
        central_difference(classifier, batch, GradientSettings(), DistanceTo(torch.rand(3, 2)), target=TARGETS)
