"""What explainers refuse by name before anything runs, and what they take although it is not of the usual kind."""

import numpy as np
import pytest
import torch

from fastkd.explain import (
    Classifier,
    DistanceTo,
    GradientSettings,
    MaskPool,
    SelectorSettings,
    by_chance,
    central_difference,
    compute_results,
    consistency,
    explanation_of_logits,
    gradient_attribution,
    gradient_x_input,
    hard_top_k,
    integrated_gradients,
    linear_explanation,
    maskable_tokens,
    masked_logits,
    occlusion,
    relaxed_top_k,
    saliency,
    train_selector,
    valid_tokens,
)

POOL = MaskPool(samples=4)


def _one_mask(classifier, inputs, **how):
    return masked_logits(classifier, inputs, torch.ones(3, 1, 9, dtype=torch.bool), **how)


EXPLAINERS = {
    "saliency": saliency,
    "gradient_x_input": gradient_x_input,
    "integrated_gradients": lambda *given, **how: integrated_gradients(*given, steps=2, **how),
    "gradient_attribution": gradient_attribution,
    "central_difference": lambda *given, **how: central_difference(*given, GradientSettings(), torch.sum, **how),
    "occlusion": occlusion,
    "linear_explanation": lambda *given, **how: linear_explanation(*given, POOL, **how),
    "masked_logits": _one_mask,
}
TAKE_TARGETS = [name for name in EXPLAINERS if name != "masked_logits"]
TAKE_SIZES = [name for name in EXPLAINERS if name not in ("saliency", "gradient_x_input")]


@pytest.fixture
def nothing_runs(bert):
    bert.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_model_in_the_place_of_its_classifier_is_refused(name, bert, batch, nothing_runs):
    with pytest.raises(
        TypeError, match=r"classifier is of type BertFor\w+; a Classifier is needed: Classifier\(model\)"
    ):
        EXPLAINERS[name](bert, batch)


def test_a_selector_needs_a_classifier_and_batches_it_can_go_through_again(classifier, bert, batch, nothing_runs):
    with pytest.raises(TypeError, match=r"teacher is of type BertFor\w+; a Classifier is needed"):
        train_selector(bert, [batch])
    with pytest.raises(TypeError, match="batches is of type dict; a list or a loader of batches is needed"):
        train_selector(classifier, batch)
    with pytest.raises(ValueError, match="batches can be gone through once, and 3 times are needed"):
        train_selector(classifier, iter([batch]))
    with pytest.raises(TypeError, match="settings is of type dict; a SelectorSettings is needed"):
        train_selector(classifier, [batch], {"epochs": 1})


def test_a_trained_selector_needs_a_classifier_too(classifier, bert, batch):
    selector = train_selector(classifier, [batch], SelectorSettings(epochs=1, hidden=4))
    with pytest.raises(TypeError, match="a Classifier is needed"):
        selector.select(bert, batch, 0.3)


@pytest.mark.parametrize("name", TAKE_TARGETS)
@pytest.mark.parametrize("target", [1, [0, 1, 2], np.array([0, 1, 2]), None], ids=["int", "list", "array", "None"])
def test_a_target_is_a_word_or_a_tensor(name, target, classifier, batch, nothing_runs):
    with pytest.raises(
        TypeError, match=r"target is of type \w+; allowed are 'predicted', 'all' and a tensor of 3 classes"
    ):
        EXPLAINERS[name](classifier, batch, target=target)


@pytest.mark.parametrize("name", TAKE_TARGETS)
@pytest.mark.parametrize("target", [torch.tensor([0, 1]), torch.tensor(1), torch.zeros(3), torch.zeros(3, 1).long()])
def test_a_target_has_an_integer_for_each_example(name, target, classifier, batch, nothing_runs):
    with pytest.raises(ValueError, match="integers, one for each of the 3 examples, are needed"):
        EXPLAINERS[name](classifier, batch, target=target)


@pytest.mark.parametrize("name", TAKE_SIZES)
@pytest.mark.parametrize("size", [0, -3, 2.5, True, "8"])
def test_a_batch_size_is_a_whole_number(name, size, classifier, batch, nothing_runs):
    with pytest.raises(ValueError, match=f"batch_size={size!r}; a whole number is needed, 1 at least"):
        EXPLAINERS[name](classifier, batch, batch_size=size)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.ones(3, 9).long(), TypeError, "inputs is of type Tensor; a mapping with input_ids"),
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids is of type list; .* tokenizer\(..., return_tensors="),
        ({"input_ids": torch.ones(9).long()}, ValueError, r"input_ids is \(9,\)"),
        ({"attention_mask": torch.ones(3, 9)}, ValueError, "inputs holds attention_mask; input_ids"),
        ({"input_ids": torch.ones(3, 9).long(), "attention_mask": torch.ones(3, 8)}, ValueError, r"\(3, 9\) is needed"),
    ],
)
def test_inputs_are_a_mapping_of_tensors(inputs, error, message, classifier, nothing_runs):
    for explain in EXPLAINERS.values():
        with pytest.raises(error, match=message):
            explain(classifier, inputs)
    for function in (valid_tokens, classifier.embed, classifier.logits, lambda given: maskable_tokens(given, [0])):
        with pytest.raises(error, match=message):
            function(inputs)


@pytest.mark.parametrize("shape", [(3, 1, 8), (2, 1, 9), (3, 9), (3, 9, 1)])
def test_masks_of_other_sequences_are_refused(shape, classifier, batch, nothing_runs):
    with pytest.raises(ValueError, match=rf"kept is \({', '.join(map(str, shape))}\); \(3, S, 9\) is needed"):
        masked_logits(classifier, batch, torch.ones(shape))
    with pytest.raises(TypeError, match="kept is of type list; a Tensor is needed"):
        masked_logits(classifier, batch, [[1]])


def test_masked_logits_take_embeddings_of_these_sequences(classifier, batch, nothing_runs):
    with pytest.raises(ValueError, match=r"the embeddings are \(3, 8, 16\)"):
        _one_mask(classifier, batch, embeddings=torch.ones(3, 8, 16).double())


def test_other_things_in_the_place_of_settings_pools_and_distances_are_refused(classifier, batch, nothing_runs):
    for given, message in (
        (lambda: gradient_attribution(classifier, batch, {"method": "saliency"}), "settings is of type dict"),
        (lambda: central_difference(classifier, batch, None, torch.sum), "settings is of type NoneType"),
        (
            lambda: central_difference(classifier, batch, GradientSettings(), torch.ones(3, 9)),
            "distance is of type Tensor",
        ),
        (lambda: DistanceTo([1.0]), "teacher is of type list"),
        (lambda: linear_explanation(classifier, batch, POOL.of(7)), "pool is of type LengthPool; a MaskPool is needed"),
        (lambda: explanation_of_logits(torch.ones(3, 4, 3), None, torch.ones(3, 9)), "pool is of type NoneType"),
        (lambda: explanation_of_logits([1.0], POOL, torch.ones(3, 9)), "logits is of type list"),
        (lambda: compute_results(batch, None, per_example={}, per_token={}), "batches is of type dict"),
        (lambda: Classifier(None), "model is of type NoneType"),
        (lambda: Classifier(classifier), "model is of type Classifier"),
        (lambda: Classifier(classifier.model, "bert.embeddings"), "embeddings is of type str; a Module is needed"),
        (lambda: Classifier(classifier.model, special_ids=3), "special_ids=3; a list of ids is needed"),
        (lambda: Classifier(classifier.model, special_ids=[0, None]), r"special_ids=\[0, None\]"),
    ):
        with pytest.raises(TypeError, match=message):
            given()
    with pytest.raises(ValueError, match="distance='l3'"):
        DistanceTo(torch.ones(3, 9), "l3")


def test_what_was_watched_is_given_with_its_logits_and_is_of_these_inputs(classifier, bert, batch):
    with classifier.watch() as seen:
        logits = bert(**batch).logits
    for watched in (seen, (None, logits), (seen,)):
        with pytest.raises(TypeError, match="watched: a pair is needed"):
            gradient_attribution(classifier, batch, watched=watched)
    short = {name: value[:, :7] for name, value in batch.items()}
    with pytest.raises(ValueError, match=r"the embeddings are \(3, 9, 16\)"):
        gradient_attribution(classifier, short, watched=(seen, logits))


# Masks of integers, such as attention_mask

MASK = torch.tensor([[1, 1, 1, 0], [2, 1, 0, 0]])


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_a_mask_of_numbers_is_true_where_it_is_not_zero(kind):
    logits, teacher = torch.randn(2, 4), torch.randn(2, 4)

    def drawn(mask):
        torch.manual_seed(0)
        return relaxed_top_k(logits, mask, 0.5, 0.5)

    for function in (
        lambda mask: hard_top_k(logits, mask, 0.5),
        drawn,
        POOL.spread,
        lambda mask: POOL.of(3).spread(mask[:1]),
        lambda mask: POOL.scores(logits, mask),
        lambda mask: explanation_of_logits(torch.arange(16.0).view(2, 4, 2), POOL, mask),
        lambda mask: torch.tensor(list(vars(consistency(logits, teacher, mask)).values())),
        lambda mask: torch.tensor(list(vars(by_chance(teacher, mask)).values())),
    ):
        assert torch.equal(function(MASK.to(kind)), function(MASK != 0))


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8])
def test_whole_numbers_keep_a_token_where_they_are_not_zero(kind, classifier, batch):
    kept = POOL.spread(classifier.maskable(batch))
    torch.testing.assert_close(
        masked_logits(classifier, batch, 2 * kept.to(kind)), masked_logits(classifier, batch, kept)
    )


def test_a_mask_is_a_tensor_of_the_scores_shape():
    for function in (
        lambda mask: hard_top_k(torch.ones(2, 4), mask, 0.5),
        lambda mask: relaxed_top_k(torch.ones(2, 4), mask, 0.5, 0.5),
    ):
        with pytest.raises(ValueError, match=r"maskable is \(2, 3\); \(2, 4\) is needed"):
            function(torch.ones(2, 3))
        with pytest.raises(TypeError, match="maskable is of type list; a Tensor is needed"):
            function([[1]])
    with pytest.raises(ValueError, match=r"maskable is \(4,\); \(B, L\) is needed"):
        POOL.spread(torch.ones(4))
    with pytest.raises(TypeError, match="student: scores is of type list"):
        consistency([1.0], torch.ones(2, 4), torch.ones(2, 4))


@pytest.mark.parametrize("temperature", [0, -1.0, torch.nan, torch.inf, "cold"])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature!r}; a positive, finite number is needed"):
        relaxed_top_k(torch.ones(2, 4), MASK, 0.5, temperature)


# Settings


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (MaskPool, {"keep": 0.5}),
        (MaskPool, {"keep": "ab"}),
        (MaskPool, {"keep": ("a", "b")}),
        (MaskPool, {"samples": 8.5}),
        (MaskPool, {"samples": "8"}),
        (MaskPool, {"seed": 0.5}),
        (MaskPool, {"seed": -1}),
        (MaskPool, {"width": "wide"}),
        (MaskPool, {"ridge": torch.inf}),
        (GradientSettings, {"method": "integrated_gradients", "steps": 1.5}),
        (GradientSettings, {"method": "integrated_gradients", "steps": True}),
        (SelectorSettings, {"ratio": "half"}),
        (SelectorSettings, {"epochs": 1.5}),
        (SelectorSettings, {"hidden": "64"}),
        (SelectorSettings, {"learning_rate": None}),
        (SelectorSettings, {"seed": 0.5}),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused_by_name(settings, given):
    name, value = list(given.items())[-1]
    with pytest.raises(ValueError, match=f"{name}=") as caught:
        settings(**given)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("tokens", [-1, 2.0, "3"])
def test_a_pool_is_for_a_number_of_tokens(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens!r}; a whole number is needed, 0 at least"):
        POOL.of(tokens)


def test_masks_that_a_pool_does_not_have_are_refused():
    for which, message in (
        (torch.tensor([[0, 4], [1, 2]]), "which names the masks 0 to 4; the pool has 0 to 3"),
        (torch.tensor([[0, -1], [1, 2]]), "which names the masks -1 to 2"),
        (torch.tensor([0, 1]), r"which is torch.int64 of shape \(2,\); integers \(2, M\) are needed"),
        (torch.zeros(2, 1), "which is torch.float32"),
        (torch.zeros(3, 1).long(), r"integers \(2, M\) are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            POOL.spread(MASK, which)
    with pytest.raises(ValueError, match=r"outputs \(3, 4\) do not belong to this mask pool: 4 masks for each of 2"):
        POOL.scores(torch.ones(3, 4), MASK)
