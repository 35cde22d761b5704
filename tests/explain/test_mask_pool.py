"""Mask pools: which masks, and the linear map that explains."""

import itertools
import math

import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import LimeBase
from sklearn.linear_model import Ridge

from fastkd.explain import MaskPool

KINDS = ["lime", "kernel_shap"]


def _shapley(value, tokens):
    """Shapley values of a function of subsets, by their definition."""
    found = []
    for i in range(tokens):
        others = [j for j in range(tokens) if j != i]
        total = 0.0
        for size in range(tokens):
            weight = math.factorial(size) * math.factorial(tokens - size - 1) / math.factorial(tokens)
            for subset in itertools.combinations(others, size):
                total += weight * (value({*subset, i}) - value(set(subset)))
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 17])
def test_every_length_has_as_many_masks_and_keeps_all_tokens_first(kind, tokens):
    pool = MaskPool(kind, samples=40).of(tokens)
    assert pool.masks.shape == (40, tokens) and pool.solve.shape == (tokens, 40)
    assert pool.masks[0].all() and pool.solve.isfinite().all()


def test_limes_masks_keep_the_share_that_was_asked():
    kept = MaskPool(samples=400, keep=(0.5, 0.9)).of(20).masks[1:].sum(1)
    assert kept.min() == 10 and kept.max() == 18 and kept.unique().numel() == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_is_its_settings(kind):
    settings = MaskPool(kind, samples=30, seed=3)
    assert torch.equal(settings.of(9).masks, MaskPool(kind, samples=30, seed=3).of(9).masks)
    assert not torch.equal(settings.of(9).masks, MaskPool(kind, samples=30, seed=4).of(9).masks)


def test_lime_is_a_weighted_ridge_regression_with_intercept():
    pool = MaskPool(samples=50, ridge=0.3, width=0.4)
    masks, outputs = pool.of(6).masks, torch.randn(50, dtype=torch.float64)
    weights = torch.exp(-(((1 - (masks.sum(1) / 6).sqrt()) / 0.4) ** 2))
    model = Ridge(alpha=0.3).fit(masks.numpy(), outputs.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close(pool.of(6).scores(outputs), torch.from_numpy(model.coef_))


def test_lime_is_captums_on_the_same_masks():
    pool = MaskPool(samples=50, ridge=0.3, width=0.4)
    masks = iter(pool.of(6).masks.double())

    def classifier(kept):
        return (kept * torch.arange(6.0)).sum(1).sin() + kept[:, 0]

    explainer = LimeBase(
        classifier,
        SkLearnRidge(alpha=0.3),
        similarity_func=lambda whole, kept, z, **_: torch.exp(-(((1 - z.mean().sqrt()) / 0.4) ** 2)),
        perturb_func=lambda whole, **_: next(masks)[None],
        perturb_interpretable_space=True,
        from_interp_rep_transform=lambda z, whole, **_: z,
        to_interp_rep_transform=None,
    )
    expected = explainer.attribute(torch.ones(1, 6), n_samples=50)[0]
    found = pool.of(6).scores(classifier(pool.of(6).masks.double()))
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 4, 6])
def test_kernel_shap_with_all_subsets_gives_shapley_values(tokens):
    draws = torch.randn(2**tokens, dtype=torch.float64)
    pool = MaskPool("kernel_shap", samples=70).of(tokens)
    place = 2 ** torch.arange(tokens)
    expected = _shapley(lambda subset: draws[sum(2**i for i in subset)].item(), tokens)
    torch.testing.assert_close(pool.scores(draws[(pool.masks * place).sum(1)]), expected)


def test_kernel_shap_with_some_subsets_is_near_and_adds_up_exactly():
    weights = torch.randn(12, 12, dtype=torch.float64) / 6
    linear = torch.randn(12, dtype=torch.float64)

    def value(masks):
        return masks @ linear + ((masks @ weights) * masks).sum(1) + 3

    pool = MaskPool("kernel_shap", samples=600).of(12)
    scores = pool.scores(value(pool.masks.double()))
    whole, none = value(torch.ones(1, 12).double()), value(torch.zeros(1, 12).double())
    torch.testing.assert_close(scores.sum(), (whole - none)[0])
    expected = linear + weights.diag() + (weights + weights.T - 2 * weights.diag().diag()).sum(1) / 2
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=0.08)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 15])
def test_a_linear_function_is_explained_by_its_weights(kind, tokens):
    weights = torch.randn(tokens, dtype=torch.float64)
    pool = MaskPool(kind, samples=80, ridge=1e-9).of(tokens)
    torch.testing.assert_close(pool.scores(pool.masks.double() @ weights + 5), weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_is_explained_by_nothing(kind):
    pool = MaskPool(kind, samples=31).of(8)
    torch.testing.assert_close(pool.scores(torch.full((31,), 7.0).double()), torch.zeros(8).double())


def test_masks_lie_on_what_may_be_masked():
    maskable = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    pool = MaskPool(samples=12)
    kept = pool.spread(maskable)
    assert kept.shape == (4, 12, 6)
    assert kept[~maskable[:, None].expand_as(kept)].all()
    for row, tokens in enumerate((3, 3, 2, 0)):
        assert torch.equal(kept[row][:, maskable[row]], pool.of(tokens).masks)


def test_single_masks_can_be_asked_for():
    maskable = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]).bool()
    which = torch.tensor([[3, 7], [0, 11]])
    pool = MaskPool(samples=12)
    expected = pool.spread(maskable)[torch.arange(2)[:, None], which]
    assert torch.equal(pool.spread(maskable, which), expected)


def test_scores_lie_on_what_may_be_masked_and_are_differentiable():
    maskable = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    pool = MaskPool(samples=12)
    outputs = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    scores = pool.scores(outputs, maskable)
    assert scores.shape == (3, 2, 6) and not scores[~maskable[:, None].expand_as(scores)].any()
    torch.testing.assert_close(scores[1, 0, maskable[1]], pool.of(4).solve @ outputs[1, 0])
    torch.testing.assert_close(pool.scores(outputs[:, 0], maskable), scores[:, 0])
    assert torch.autograd.gradcheck(lambda f: pool.scores(f, maskable), outputs)


def test_a_pool_for_another_length_is_refused():
    maskable = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    with pytest.raises(ValueError, match="this mask pool is for 3 tokens, sequence 1 has 2 that can be masked"):
        MaskPool().of(3).spread(maskable)
    assert MaskPool().of(3).spread(maskable[:1]).equal(MaskPool().spread(maskable[:1]))


def test_outputs_for_another_number_of_masks_are_refused():
    with pytest.raises(ValueError, match="outputs for 32 masks; the pool for 5 tokens has 64 masks"):
        MaskPool(samples=64).of(5).scores(torch.ones(32))


@pytest.mark.parametrize(
    "settings",
    [{"kind": "anchor"}, {"samples": 3}, {"keep": (0.9, 0.5)}, {"keep": (0.5,)}, {"width": 0.0}, {"ridge": -1.0}],
)
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        MaskPool(**settings)
