"""Attributions from gradients, against closed forms on a linear model and against captum on a BERT."""

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import nn

from fastkd.explain import (
    Classifier,
    GradientSettings,
    central_difference,
    gradient_attribution,
    gradient_x_input,
    integrated_gradients,
    normalise,
    saliency,
)

TARGETS = torch.tensor([2, 0, 1])


def _peer(explainer, classifier, batch, **how):
    """captum's attributions (B, L, D) of the embeddings, 0 in padding."""
    embeddings = classifier.embed(batch).detach().requires_grad_()

    def logits(vectors, ids, mask):
        return classifier.logits({"input_ids": ids, "attention_mask": mask}, vectors)

    rest = (batch["input_ids"], batch["attention_mask"])
    given = explainer(logits).attribute(embeddings, target=TARGETS, additional_forward_args=rest, **how)
    return given.detach() * batch["attention_mask"][..., None]


def test_saliency_is_captums(classifier, batch):
    expected = _peer(Saliency, classifier, batch).norm(dim=-1)
    torch.testing.assert_close(saliency(classifier, batch, target=TARGETS), expected)


@pytest.mark.parametrize("reduce", ["sum", "norm"])
def test_gradient_x_input_is_captums(classifier, batch, reduce):
    expected = _peer(InputXGradient, classifier, batch)
    expected = expected.sum(-1) if reduce == "sum" else expected.norm(dim=-1)
    torch.testing.assert_close(gradient_x_input(classifier, batch, target=TARGETS, reduce=reduce), expected)


@pytest.mark.parametrize("baseline", ["zero", "mask"])
def test_integrated_gradients_are_captums(classifier, batch, baseline):
    start = classifier.baseline(batch, baseline, classifier.embed(batch)).detach()
    expected = _peer(IntegratedGradients, classifier, batch, baselines=start, n_steps=7, method="riemann_right").sum(-1)
    scores = integrated_gradients(classifier, batch, steps=7, baseline=baseline, reduce="sum", target=TARGETS)
    torch.testing.assert_close(scores, expected)


def test_integrated_gradients_add_up_to_what_the_classifier_gains(classifier, batch):
    scores = integrated_gradients(classifier, batch, steps=400, baseline="mask", reduce="sum", target=TARGETS)
    start = classifier.baseline(batch, "mask", classifier.embed(batch))
    gain = (classifier.logits(batch) - classifier.logits(batch, start)).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(scores.sum(1), gain.detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_linear_model_has_its_weights_for_gradients(linear, batch, steps):
    weight = linear.model.weight.detach()[TARGETS]
    embeddings = linear.embed(batch).detach()
    mask = batch["attention_mask"]
    torch.testing.assert_close(saliency(linear, batch, target=TARGETS), weight.norm(dim=-1) * mask)
    scores = integrated_gradients(linear, batch, steps=steps, reduce="sum", target=TARGETS)
    torch.testing.assert_close(scores, (weight * embeddings).sum(-1) * mask)


def test_one_step_from_zero_is_gradient_x_input(classifier, batch):
    torch.testing.assert_close(integrated_gradients(classifier, batch, steps=1), gradient_x_input(classifier, batch))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_the_batch_size_changes_nothing(classifier, batch, batch_size):
    expected = integrated_gradients(classifier, batch, steps=5, baseline="mask")
    scores = integrated_gradients(classifier, batch, steps=5, baseline="mask", batch_size=batch_size)
    torch.testing.assert_close(scores, expected)


def test_batch_size_bounds_the_rows_of_a_forward(classifier, bert, batch):
    rows = []
    bert.bert.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    integrated_gradients(classifier, batch, steps=5, batch_size=7)
    assert rows == [6, 6, 3]


def test_padding_scores_zero_and_says_nothing(classifier, batch):
    scores = gradient_x_input(classifier, batch, norm="l1")
    assert not scores[batch["attention_mask"] == 0].any()
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 17)
    torch.testing.assert_close(gradient_x_input(classifier, batch | {"input_ids": ids}, norm="l1"), scores)


def test_every_class_is_explained_from_one_forward(classifier, bert, batch):
    forwards = []
    bert.bert.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    every = saliency(classifier, batch, target="all")
    assert every.shape == (3, 3, 9) and len(forwards) == 1
    for c in range(3):
        torch.testing.assert_close(every[:, c], saliency(classifier, batch, target=torch.full((3,), c)))


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_predicted_class_is_that_of_the_whole_input(linear, batch, batch_size):
    """Here another class is predicted nearer to the baseline."""
    one = {name: value[:1] for name, value in batch.items()}
    with torch.no_grad():
        linear.model.bias.copy_(-0.7 * (linear.logits(one)[0] - linear.model.bias))
    predicted = linear.logits(one).argmax(1)
    assert linear.logits(one, linear.embed(one) / 3).argmax(1) != predicted
    expected = integrated_gradients(linear, one, steps=3, target=predicted)
    torch.testing.assert_close(integrated_gradients(linear, one, steps=3, batch_size=batch_size), expected)


def test_log_probabilities_have_a_gradient_of_their_own(classifier, batch):
    """∂ log softmax_c = ∂z_c - Σ_k p_k ∂z_k."""
    settings = GradientSettings("gradient_x_input", reduce="sum", score="logit")
    every = gradient_attribution(classifier, batch, settings, target="all")
    shares = classifier.logits(batch).softmax(1).detach()
    expected = every[torch.arange(3), TARGETS] - torch.einsum("bc,bcl->bl", shares, every)
    scores = gradient_x_input(classifier, batch, reduce="sum", score="log_probability", target=TARGETS)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scale", [1, 40])
def test_log_probabilities_of_all_classes_take_a_backward_less(scale, steps, classifier, bert, batch, monkeypatch):
    """Also of a classifier that is all but certain, and with derivatives of their own."""
    bert.classifier.weight.data *= scale
    settings = GradientSettings("integrated_gradients", steps, score="log_probability", norm="l2")

    def scores(target):
        return gradient_attribution(classifier, batch, settings, target=target, create_graph=True)

    def derivatives(found):
        weight = torch.linspace(-1, 1, found.numel()).view_as(found).to(found)
        return torch.autograd.grad((found * weight).sum(), [*bert.parameters()], allow_unused=True)

    expected = torch.stack([scores(torch.full((3,), c)) for c in range(3)], 1)
    backwards, grad = [], torch.autograd.grad
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or grad(*a, **k))
        found = scores("all")
    assert len(backwards) == 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(derivatives(found), derivatives(expected))


def test_a_regression_is_explained_by_its_score(bert, classifier, batch):
    """The log softmax of a single column would be 0."""
    score = Classifier(Score(bert), bert.bert.embeddings)
    expected = saliency(classifier, batch, target=torch.tensor([0, 0, 0]))
    torch.testing.assert_close(saliency(score, batch, score="log_probability"), expected)


class Score(nn.Module):
    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, **inputs):
        return self.bert(**inputs).logits[:, :1]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scores_are_normalised_over_the_sequence(classifier, batch, norm):
    scores = gradient_x_input(classifier, batch, norm=norm)
    torch.testing.assert_close(scores, normalise(gradient_x_input(classifier, batch), norm))
    torch.testing.assert_close(scores.norm(p=int(norm[1]), dim=1), torch.ones(3).double())


def test_parameters_get_no_gradient_and_need_none(classifier, bert, batch):
    expected = saliency(classifier, batch)
    assert all(parameter.grad is None for parameter in bert.parameters())
    bert.requires_grad_(False)
    with torch.no_grad():
        scores = saliency(classifier, batch)
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2])])
def test_a_target_class_out_of_range_is_named(classifier, batch, target):
    bad = 3 if target.max() > 2 else -1
    with pytest.raises(ValueError, match=f"target class {bad} is out of range; the model has 3 classes: 0 to 2"):
        saliency(classifier, batch, target=target)


def test_a_target_of_another_length_or_name_is_refused(classifier, batch):
    with pytest.raises(ValueError, match="one for each of the 3 examples"):
        saliency(classifier, batch, target=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="allowed are 'predicted', 'all'"):
        saliency(classifier, batch, target="gold")


@pytest.mark.parametrize("steps", [0, -2, 1.5])
def test_less_than_one_step_is_refused(classifier, batch, steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        integrated_gradients(classifier, batch, steps=steps)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lime"},
        {"baseline": "noise"},
        {"reduce": "max"},
        {"score": "margin"},
        {"norm": "l3"},
        {"method": "saliency", "steps": 4},
        {"method": "gradient_x_input", "baseline": "mask"},
        {"method": "saliency", "reduce": "sum"},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="="):
        GradientSettings(**settings)


@pytest.mark.parametrize("how", ["own forward", "watched", "central difference"])
def test_a_mask_baseline_has_the_dropout_of_the_embeddings_it_is_taken_from(how, dropping, batch):
    """Else e - e₀ at special tokens would be dropout, and nothing else."""
    model, student = dropping
    settings = GradientSettings("integrated_gradients", 1, "mask")
    found = []
    if how == "central difference":
        central_difference(student, batch, settings, lambda scores: found.append(scores.detach()) or scores.sum())
    else:
        with student.watch() as seen:
            watched = (seen, model(**batch).logits) if how == "watched" else None
        found.append(gradient_attribution(student, batch, settings, watched=watched))
    words = student.maskable(batch)
    assert (found[0][~words] == 0).all() and (found[0][words] != 0).any()


def test_what_follows_a_mask_baseline_draws_dropout_anew(dropping, batch):
    _, student = dropping
    one, other = (
        gradient_attribution(student, batch, GradientSettings("integrated_gradients", 1, "mask")) for _ in "12"
    )
    assert (one != other).any()
