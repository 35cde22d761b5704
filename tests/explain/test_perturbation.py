"""Attributions from perturbed inputs, against closed forms on a linear model and against captum on a BERT."""

import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValues, ShapleyValueSampling

from fastkd.explain import Classifier, MaskPool, explanation_of_logits, linear_explanation, masked_logits, occlusion

TARGETS = torch.tensor([2, 0, 1])
EXACT = MaskPool("kernel_shap", samples=130)  # all subsets of up to 7 tokens


def _contributions(linear, batch):
    """What each word adds to the target's score of the linear model: ⟨w_i, e_i⟩."""
    products = (linear.model.weight[TARGETS] * linear.embed(batch)).sum(-1)
    return products.masked_fill(~linear.maskable(batch), 0).detach()


def test_occlusion_of_a_linear_model_is_what_a_word_adds(linear, batch):
    torch.testing.assert_close(occlusion(linear, batch, target=TARGETS), _contributions(linear, batch))


def test_kernel_shap_of_a_linear_model_is_what_a_word_adds(linear, batch):
    torch.testing.assert_close(
        linear_explanation(linear, batch, EXACT, target=TARGETS).detach(), _contributions(linear, batch)
    )


def test_lime_of_a_linear_model_is_what_a_word_adds(linear, batch):
    scores = linear_explanation(linear, batch, MaskPool(ridge=1e-9), target=TARGETS).detach()
    torch.testing.assert_close(scores, _contributions(linear, batch), rtol=1e-5, atol=1e-6)


def test_a_mask_baseline_measures_against_mask_tokens(linear, batch):
    difference = linear.embed(batch) - linear.baseline(batch, "mask", linear.embed(batch))
    expected = (linear.model.weight[TARGETS] * difference).sum(-1).detach()
    torch.testing.assert_close(occlusion(linear, batch, target=TARGETS, baseline="mask"), expected)


def _peer(explainer, classifier, batch, row, **how):
    """captum's scores (9,) of one sentence, its words as features; special tokens and padding are a feature that the
    baseline does not change."""
    one = {name: value[row : row + 1] for name, value in batch.items()}
    embeddings, maskable = classifier.embed(one).detach(), classifier.maskable(one)
    groups = torch.where(maskable, maskable.cumsum(1) - 1, maskable.sum())
    given = explainer(lambda vectors: classifier.logits(one, vectors)[:, TARGETS[row]]).attribute(
        embeddings,
        baselines=torch.where(maskable[..., None], 0, embeddings),
        feature_mask=groups[..., None].expand_as(embeddings).contiguous(),
        **how,
    )
    return given[0, :, 0].masked_fill(~maskable[0], 0)


def test_occlusion_is_captums_ablation(classifier, batch):
    scores = occlusion(classifier, batch, target=TARGETS)
    for row in range(3):
        torch.testing.assert_close(scores[row], _peer(FeatureAblation, classifier, batch, row))


def test_kernel_shap_gives_captums_shapley_values(classifier, batch):
    scores = linear_explanation(classifier, batch, EXACT, target=TARGETS).detach()
    expected = _peer(ShapleyValues, classifier, batch, 2)  # captum gives fp32
    torch.testing.assert_close(scores[2].float(), expected, rtol=1e-5, atol=1e-6)


def test_kernel_shap_of_a_longer_sentence_is_near_captums_sampled_values(classifier, batch):
    scores = linear_explanation(classifier, batch, EXACT, target=TARGETS).detach()
    sampled = _peer(ShapleyValueSampling, classifier, batch, 0, n_samples=60)
    assert torch.corrcoef(torch.stack([scores[0], sampled]))[0, 1] > 0.95


def test_masked_logits_of_known_embeddings_run_nothing_below_them(classifier, batch):
    kept = MaskPool(samples=5).spread(classifier.maskable(batch))
    moved = 1.5 * classifier.embed(batch)
    expected = torch.stack([classifier.logits(batch, moved * kept[:, s, :, None]) for s in range(5)], 1)
    torch.testing.assert_close(masked_logits(classifier, batch, kept, embeddings=moved), expected)


@pytest.mark.parametrize("baseline", ["zero", "mask"])
def test_masked_logits_are_those_of_the_masked_input(classifier, bert, batch, baseline):
    kept = MaskPool(samples=5).spread(classifier.maskable(batch))
    logits = masked_logits(classifier, batch, kept, baseline=baseline)
    assert logits.shape == (3, 5, 3)
    if baseline == "mask":
        for s in range(5):
            ids = torch.where(kept[:, s], batch["input_ids"], 3)
            torch.testing.assert_close(logits[:, s], bert(ids, batch["attention_mask"]).logits)
    torch.testing.assert_close(logits[:, 0], bert(**batch).logits)


def test_padding_stays_as_it_is_whatever_a_mask_says_of_it(linear, batch):
    """Stored masks hold nothing for padding, and a model may look at it."""
    table = linear.model.embedding

    def model(input_ids, attention_mask):
        return table(input_ids).sum(1)

    classifier = Classifier(model, table)
    nothing = (batch["attention_mask"] != 0)[:, None]
    torch.testing.assert_close(masked_logits(classifier, batch, nothing)[:, 0], classifier.logits(batch))


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_the_batch_size_changes_nothing(classifier, batch, batch_size):
    pool = MaskPool(samples=6)
    torch.testing.assert_close(
        linear_explanation(classifier, batch, pool, batch_size=batch_size), linear_explanation(classifier, batch, pool)
    )
    torch.testing.assert_close(occlusion(classifier, batch, batch_size=batch_size), occlusion(classifier, batch))


def _rows_of_each_forward(bert):
    rows = []
    bert.bert.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def test_all_masks_run_in_one_forward(classifier, bert, batch):
    rows = _rows_of_each_forward(bert)
    linear_explanation(classifier, batch, MaskPool(samples=6))
    assert rows == [18]


def test_occlusion_runs_no_row_for_padding(classifier, bert, batch):
    rows = _rows_of_each_forward(bert)
    occlusion(classifier, batch)
    assert rows == [3, 7 + 5 + 4]


@pytest.mark.parametrize(
    "explain", [occlusion, lambda *given, **how: linear_explanation(*given, MaskPool(samples=6), **how)], ids=["o", "l"]
)
def test_every_class_can_be_explained_and_only_words_score(classifier, batch, explain):
    every = explain(classifier, batch, target="all", norm="l2")
    assert every.shape == (3, 3, 9)
    for c in range(3):
        torch.testing.assert_close(every[:, c], explain(classifier, batch, target=torch.full((3,), c), norm="l2"))
    assert not every[~classifier.maskable(batch)[:, None].expand_as(every)].any()
    with pytest.raises(ValueError, match="target class 5 is out of range"):
        explain(classifier, batch, target=torch.tensor([0, 5, 1]))


def test_stored_logits_of_a_pool_give_the_same_explanation(classifier, batch):
    pool, maskable = MaskPool(samples=10), classifier.maskable(batch)
    logits = masked_logits(classifier, batch, pool.spread(maskable))
    expected = linear_explanation(classifier, batch, pool)
    torch.testing.assert_close(explanation_of_logits(logits, pool, maskable), expected)


def test_logits_of_another_pool_are_refused(classifier, batch):
    with pytest.raises(ValueError, match="64 masks for each of 3 sequences"):
        explanation_of_logits(torch.zeros(3, 32, 3), MaskPool(samples=64), classifier.maskable(batch))


def test_the_students_linear_explanation_is_differentiable(classifier, bert, batch):
    """By ordinary first-order passes: fused attention stays."""
    scores = linear_explanation(classifier, batch, MaskPool(samples=5), norm="l2")
    scores.square().sum().backward()
    scores = linear_explanation(classifier, batch, MaskPool(samples=5))
    scores.square().sum().backward()
    assert bert.bert.embeddings.word_embeddings.weight.grad.any()


def test_a_sentence_of_special_tokens_alone_scores_zero(classifier):
    batch = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert not occlusion(classifier, batch).any()
    assert not linear_explanation(classifier, batch, MaskPool(samples=4)).any()


def test_a_model_that_offers_no_embeddings_is_named(batch):
    def model(input_ids, attention_mask):
        return torch.zeros(3, 3)

    with pytest.raises(ValueError, match="model offers no embeddings"):
        occlusion(Classifier(model), batch)
