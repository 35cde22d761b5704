"""The gradient of a distance between attributions: exact by double backward, and by central differences."""

import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastkd.explain import (
    Classifier,
    GradientSettings,
    central_difference,
    distance,
    gradient,
    gradient_attribution,
    second_order,
)

SETTINGS = {
    "saliency": GradientSettings("saliency", norm="l2"),
    "gradient x input": GradientSettings("gradient_x_input", score="log_probability", norm="l2"),
    "summed": GradientSettings("gradient_x_input", reduce="sum", norm="l1"),
    "3 steps from zero": GradientSettings("integrated_gradients", steps=3, norm="l2"),
    "3 steps from [MASK]": GradientSettings("integrated_gradients", steps=3, baseline="mask", norm="l2"),
}
TARGETS = torch.tensor([2, 0, 1])


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def _teachers(classifier, batch, settings, target):
    """Other scores of the same form."""
    scores = gradient_attribution(classifier, batch, settings, target=target)
    return (scores * torch.rand_like(scores)).detach()


def _gradient(model, loss):
    """All parameters' gradients, as one vector."""
    parameters = list(model.parameters())
    given = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in given])


def _relative(error, truth):
    return (torch.linalg.vector_norm(error - truth) / torch.linalg.vector_norm(truth)).item()


def _both(classifier, batch, settings, target=TARGETS, **how):
    teachers = _teachers(classifier, batch, settings, target)

    def apart(scores):
        return distance(scores, teachers, batch["attention_mask"])

    scores = gradient_attribution(classifier, batch, settings, target=target, create_graph=True)
    exact = apart(scores)
    near = central_difference(classifier, batch, settings, apart, target=target, **how)
    return exact, near


@pytest.mark.parametrize("target", [TARGETS, "all"], ids=["one class", "every class"])
def test_double_backward_and_central_difference_agree(classifier, bert, batch, settings, target):
    exact, near = _both(classifier, batch, settings, target)
    torch.testing.assert_close(near, exact)
    error = _relative(_gradient(bert, near), _gradient(bert, exact))
    print(f"{settings.method}: relative error of the gradient {error:.1e}")
    assert error < 1e-3, f"relative error {error:.1e}"


def test_the_error_falls_with_the_square_of_the_step(classifier, bert, batch):
    errors = []
    for step in (4e-2, 2e-2, 1e-2):
        torch.manual_seed(1)
        exact, near = _both(classifier, batch, SETTINGS["gradient x input"], step=step)
        errors.append(_relative(_gradient(bert, near), _gradient(bert, exact)))
    print("relative errors", errors)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) and errors[1] / errors[2] == pytest.approx(4, rel=0.2)


def test_double_backward_is_the_slope_of_the_distance(classifier, bert, batch, settings):
    """Against the distance itself, at parameters moved along a random direction."""
    teachers = _teachers(classifier, batch, settings, TARGETS)
    direction = torch.randn(sum(parameter.numel() for parameter in bert.parameters())).double()
    start = parameters_to_vector(bert.parameters()).detach()

    def at(moved):
        vector_to_parameters(start + moved * direction, bert.parameters())
        scores = gradient_attribution(classifier, batch, settings, target=TARGETS, create_graph=True)
        return distance(scores, teachers, batch["attention_mask"])

    along = _gradient(bert, at(0.0)) @ direction
    slope = (at(1e-6) - at(-1e-6)).detach() / 2e-6
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-9)


def test_in_fp32_both_agree_to_two_in_a_thousand(classifier, bert, batch):
    bert.float()
    exact, near = _both(classifier, batch, SETTINGS["gradient x input"])
    error = _relative(_gradient(bert, near), _gradient(bert, exact))
    print(f"fp32: relative error of the gradient {error:.1e}")
    assert error < 2e-3


def test_autocast_changes_nothing(classifier, bert, batch):
    """A difference of two bf16 passes would be rounding."""
    bert.float()
    settings = SETTINGS["summed"]
    teachers = _teachers(classifier, batch, settings, TARGETS)

    def apart(scores):
        return distance(scores, teachers, batch["attention_mask"])

    expected = central_difference(classifier, batch, settings, apart, target=TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = central_difference(classifier, batch, settings, apart, target=TARGETS)
    torch.testing.assert_close(_gradient(bert, loss), _gradient(bert, expected))


def _with_dropout(bert):
    for module in bert.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return bert.train()


def test_a_watched_forward_saves_one(classifier, bert, batch):
    """A training step's own forward, dropout and all: the explanation is of what the step computed."""
    settings = SETTINGS["gradient x input"]
    teachers = _teachers(classifier, batch, settings, TARGETS)
    _with_dropout(bert)
    with classifier.watch() as seen, second_order.twice_differentiable():
        logits = bert(**batch).logits
    forwards = []
    bert.bert.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))

    def apart(scores):
        return distance(scores, teachers, batch["attention_mask"])

    near = central_difference(classifier, batch, settings, apart, target=TARGETS, watched=(seen, logits))
    score = logits.log_softmax(1).gather(1, TARGETS[:, None]).sum()
    [pull] = torch.autograd.grad(score, seen.embeddings, create_graph=True)
    scores = (pull * seen.embeddings).norm(dim=-1).masked_fill(batch["attention_mask"] == 0, 0)
    exact = apart(scores / scores.norm(dim=1, keepdim=True))
    torch.testing.assert_close(near, exact)
    assert _relative(_gradient(bert, near), _gradient(bert, exact)) < 2e-3
    assert len(forwards) == 2
    logits.sum().backward()  # the step's own graph is still there


def test_the_passes_of_a_difference_run_in_the_backward_and_leave_no_graph_and_no_draws(classifier, bert, batch):
    """However many classes are explained, there is the graph of one pass at a time."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    saved, beside = weakref.WeakSet(), []
    _with_dropout(bert)
    torch.manual_seed(3)
    loss = central_difference(classifier, batch, SETTINGS["summed"], torch.sum, target="all")
    bert.bert.encoder.register_forward_pre_hook(lambda *_: beside.append(len(saved)))
    bert.bert.encoder.register_forward_hook(lambda *_: beside.append(len(saved)))
    torch.rand(5)  # as something between forward and backward may draw
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor):
        loss.backward()
    before, after = beside[::2], beside[1::2]
    assert before == [0] * 6 and after[0] > 20 and len({*after}) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_of_any_function_learn_from_a_difference(batch):
    """It need be no module: what learns is found where its graph ends."""
    table, weight, frozen = torch.randn(30, 4).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    table.requires_grad_(), weight.requires_grad_()

    def model(inputs_embeds, attention_mask):
        return torch.tanh(inputs_embeds * attention_mask[..., None]).sum(1) @ weight.T + frozen

    inputs = {"inputs_embeds": table[batch["input_ids"]], "attention_mask": batch["attention_mask"]}
    gradients = [
        torch.autograd.grad(loss, [table, weight], retain_graph=True)
        for loss in _both(Classifier(model), inputs, SETTINGS["gradient x input"])
    ]
    for exact, near in zip(*gradients, strict=True):
        assert exact.norm() > 1e-4 and _relative(near, exact) < 1e-3


def test_parameters_that_some_passes_only_reach_learn_from_those(batch):
    """An expert that is skipped where nothing needs it, by some of the steps from the baseline, or by one sign."""
    table, first, second = (torch.randn(size).double().requires_grad_() for size in ((30, 4), (4, 3), (4, 3)))

    def model(inputs_embeds, attention_mask):
        calls.append(len(inputs_embeds))
        pooled = torch.tanh(inputs_embeds * attention_mask[..., None]).sum(1)
        logits = pooled @ first
        return logits + pooled @ second if len(calls) in reaching else logits

    inputs = {"inputs_embeds": table[batch["input_ids"]], "attention_mask": batch["attention_mask"]}
    for reaching in ({2}, {1, 3}, {2, 4, 6}):  # of the path of 2 chunks, then with each sign
        calls = []
        settings = GradientSettings("integrated_gradients", steps=2)
        loss = central_difference(
            Classifier(model), inputs, settings, lambda a: a.square().sum(), target=TARGETS, batch_size=1
        )
        found = torch.autograd.grad(loss, [first, second], retain_graph=True, allow_unused=True)
        assert len(calls) == 6 and found[0].norm() > 1e-3
        assert (found[1] is not None and found[1].norm() > 1e-3) == any(call > 2 for call in reaching), reaching


def test_a_distance_whose_slope_is_not_finite_gives_a_loss_that_is_not(classifier, batch):
    loss = central_difference(classifier, batch, SETTINGS["summed"], lambda a: (a - a.detach()).norm().sqrt())
    assert loss.isnan()


def test_moved_passes_that_are_not_finite_add_nothing(batch):
    table, weight = torch.randn(30, 4).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()

    def model(inputs_embeds, attention_mask):
        far = (inputs_embeds - table[batch["input_ids"]]).detach() != 0
        return torch.tanh(inputs_embeds.masked_fill(far, torch.inf) * inputs_embeds).sum(1) @ weight

    inputs = {"inputs_embeds": table[batch["input_ids"]], "attention_mask": batch["attention_mask"]}
    loss = central_difference(Classifier(model), inputs, SETTINGS["summed"], lambda a: a.square().sum(), target=TARGETS)
    loss.backward()
    assert loss.isfinite() and table.grad.norm() > 0 and table.grad.isfinite().all() and not weight.grad.any()


def test_double_backward_through_a_watched_forward_is_that_through_one_of_its_own(classifier, bert, batch):
    settings = SETTINGS["gradient x input"]
    teachers = _teachers(classifier, batch, settings, TARGETS)
    with classifier.watch() as seen, second_order.twice_differentiable():
        logits = bert(**batch).logits
    forwards = []
    bert.bert.encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    gradients = []
    for watched in ((seen, logits), None):
        scores = gradient_attribution(classifier, batch, settings, target=TARGETS, create_graph=True, watched=watched)
        gradients.append(_gradient(bert, distance(scores, teachers, batch["attention_mask"])))
    assert len(forwards) == 1
    torch.testing.assert_close(*gradients)
    logits.sum().backward()  # the step's own graph is still there


def test_all_passes_of_a_difference_have_the_same_dropout(classifier, bert, batch):
    settings = SETTINGS["summed"]
    teachers = _teachers(classifier, batch, settings, TARGETS)
    _with_dropout(bert)

    def gradient(step):
        torch.manual_seed(7)
        loss = central_difference(
            classifier,
            batch,
            settings,
            lambda a: distance(a, teachers, batch["attention_mask"]),
            target=TARGETS,
            step=step,
        )
        return _gradient(bert, loss)

    assert _relative(gradient(1e-2), gradient(1e-3)) < 2e-3


def test_the_fused_path_has_no_second_derivative_and_the_other_has(classifier, bert, batch):
    def twice(vectors):
        [slope] = torch.autograd.grad(classifier.logits(batch, vectors)[:, 0].sum(), vectors, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), vectors)[0]

    vectors = classifier.embed(batch).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        twice(vectors)
    with second_order.twice_differentiable():
        assert twice(vectors).isfinite().all()


def test_only_the_attribution_pass_leaves_the_fused_path_and_the_log_says_so_once(classifier, batch, caplog):
    second_order._tell_once.cache_clear()
    before = torch.backends.cuda.flash_sdp_enabled()
    with caplog.at_level(logging.INFO, logger="fastkd"):
        for _ in range(2):
            gradient_attribution(classifier, batch, create_graph=True)
            assert torch.backends.cuda.flash_sdp_enabled() == before
    assert len([record for record in caplog.records if "mathematical path" in record.message]) == 1


def test_only_the_attribution_pass_runs_recurrent_layers_without_cudnn():
    before = torch.backends.cudnn.enabled
    with second_order.twice_differentiable():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before


def test_a_student_of_another_kind_has_both(batch):
    class BiLstm(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(30, 8)
            self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
            self.head = nn.Linear(12, 3)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask):
            states, _ = self.lstm(self.embedding(input_ids))
            return self.head((states * attention_mask[..., None]).mean(1))

    student = BiLstm().double()
    exact, near = _both(Classifier(student), batch, SETTINGS["gradient x input"])
    assert _relative(_gradient(student, near), _gradient(student, exact)) < 2e-3


def test_a_saturated_student_gives_no_gradient_and_no_nan(linear, batch):
    with torch.no_grad():
        linear.model.weight.zero_()
    for loss in _both(linear, batch, SETTINGS["gradient x input"]):
        assert not _gradient(linear.model, loss).any()


def test_nan_scores_give_a_loss_by_which_the_step_can_be_skipped(classifier, bert, batch):
    teachers = _teachers(classifier, batch, SETTINGS["summed"], TARGETS)
    with torch.no_grad():
        bert.classifier.weight[0, 0] = torch.nan
    loss = central_difference(
        classifier, batch, SETTINGS["summed"], lambda a: distance(a, teachers, batch["attention_mask"]), target=TARGETS
    )
    assert loss.isnan()


def test_a_step_that_is_not_positive_is_refused(classifier, batch):
    with pytest.raises(ValueError, match="step=0; a positive, finite number is needed"):
        central_difference(classifier, batch, GradientSettings(), torch.sum, step=0)


def test_a_watched_forward_serves_one_step_only(classifier, batch):
    settings = SETTINGS["3 steps from zero"]
    with pytest.raises(ValueError, match="steps=3"):
        central_difference(classifier, batch, settings, torch.sum, watched=(None, None))
    with pytest.raises(ValueError, match="steps=3"):
        gradient_attribution(classifier, batch, settings, watched=(None, None))


@pytest.mark.parametrize("form", ["exact", "central differences"])
def test_a_sequence_whose_gradient_is_not_finite_has_nan_scores_and_spoils_no_parameter(
    classifier, batch, form, monkeypatch
):
    """Left out of the distance, it leaves the others' gradient as it was without it."""

    def gradients_of(*args, **kwargs):
        return original(*args, **kwargs).index_fill(0, torch.tensor([1]), torch.inf)

    def apart(scores):
        bad = scores.isnan().any(1, keepdim=True)
        assert bad[:, 0].tolist() == [False, True, False]
        return distance(scores.masked_fill(bad, 0), wanted.masked_fill(bad, 0), batch["attention_mask"])

    settings = SETTINGS["gradient x input"]
    wanted = _teachers(classifier, batch, settings, TARGETS)
    original = gradient.gradients_of
    monkeypatch.setattr(gradient, "gradients_of", gradients_of)
    if form == "exact":
        scores = gradient_attribution(classifier, batch, settings, target=TARGETS, create_graph=True)
        loss = apart(scores)
    else:
        loss = central_difference(classifier, batch, settings, apart, target=TARGETS)
    loss.backward()
    grads = [p.grad for p in classifier.model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads) and any((grad != 0).any() for grad in grads)
