"""Attributions from perturbed inputs: occlusion, and linear explainers over a pool of masks.

A token that is taken away has the baseline's embedding: with z in {0, 1}^L the classifier sees z ⊙ e + (1 - z) ⊙ e₀, e₀
zero or the embedding of [MASK] in its place. Special tokens and padding are never taken away.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.explain.arguments import as_mask, check_type
from fastkd.explain.classifier import Classifier, Inputs, check_embeddings, rows_of, valid_tokens
from fastkd.explain.mask_pool import MaskPool
from fastkd.explain.scores import check_norm, normalise
from fastkd.explain.target import Target, check_explained, check_score, class_scores, single, target_classes


def masked_logits(
    classifier: Classifier,
    inputs: Inputs,
    kept: Tensor,
    *,
    baseline: str = "zero",
    batch_size: int = 256,
    embeddings: Tensor | None = None,
) -> Tensor:
    """z (B, S, C), the logits under S masks for each sequence, in the dtype of the model's logits; differentiable where
    gradients are on.

    kept: (B, S, L), nonzero where a token stays; or floats in [0, 1].
    batch_size: masked sequences of one forward at most.
    embeddings: (B, L, D), those of `inputs` where they are known, such as from `Classifier.watch`.

    Raises, before anything runs, TypeError for a model in the place of its `Classifier` and for what is no tensor,
    ValueError for masks or embeddings of another shape and a batch_size below 1.
    """
    kept = _checked_masks(kept, check_explained(classifier, inputs, batch_size=batch_size))
    if embeddings is not None:
        check_embeddings(embeddings, inputs)
    batch, masks, _ = kept.shape
    embeddings = classifier.embed(inputs) if embeddings is None else embeddings
    rows = torch.arange(batch, device=embeddings.device).repeat_interleave(masks)
    kept = kept.flatten(0, 1)
    logits = list(_logits_of_rows(classifier, inputs, embeddings, rows, kept, baseline, batch_size))
    return torch.cat(logits).unflatten(0, (batch, masks))


@torch.no_grad()
def occlusion(
    classifier: Classifier,
    inputs: Inputs,
    *,
    target: Target = "predicted",
    baseline: str = "zero",
    score: str = "logit",
    norm: str | None = None,
    batch_size: int = 256,
) -> Tensor:
    """a_i = f(x) - f(x without token i): (B, L), or (B, C, L) for every class, in the dtype of the model's scores; 0 at
    special tokens and padding.

    Arguments as `GradientSettings` and `gradient_attribution`; as many rows run as there are tokens to take away.
    Raises as `gradient_attribution`.
    """
    check_explained(classifier, inputs, target, batch_size)
    check_score(score)
    check_norm(norm)
    maskable = classifier.maskable(inputs)
    whole = classifier.logits(inputs)
    classes = target_classes(whole, target)
    rows, places = maskable.nonzero().unbind(1)
    kept = torch.ones(len(rows), maskable.shape[1], dtype=torch.bool, device=maskable.device)
    kept[torch.arange(len(rows), device=rows.device), places] = False
    own = class_scores(whole, classes, score)  # under autocast a log-probability has more digits than a logit
    scores = own.new_zeros(*classes.shape, maskable.shape[1])
    if len(rows):
        embeddings = classifier.embed(inputs)
        parts = list(_logits_of_rows(classifier, inputs, embeddings, rows, kept, baseline, batch_size))
        scores[rows, :, places] = own[rows] - class_scores(torch.cat(parts), classes[rows], score)
    scores = normalise(scores, norm)
    return scores[:, 0] if single(target) else scores


def linear_explanation(
    classifier: Classifier,
    inputs: Inputs,
    pool: MaskPool,
    *,
    target: Target = "predicted",
    baseline: str = "zero",
    score: str = "logit",
    norm: str | None = None,
    batch_size: int = 256,
) -> Tensor:
    """LIME or KernelSHAP over a fixed pool: (B, L), or (B, C, L) for every class; 0 at special tokens and padding.

    Differentiable where gradients are on: a fixed linear map of S ordinary forwards. Arguments as `masked_logits` and
    `explanation_of_logits`; S forwards of B sequences, `batch_size` of them at once. Raises as `gradient_attribution`,
    and TypeError for what is no `MaskPool`.
    """
    check_explained(classifier, inputs, target, batch_size)
    check_type("pool", pool, MaskPool)
    check_score(score)
    check_norm(norm)
    maskable = classifier.maskable(inputs)
    logits = masked_logits(classifier, inputs, pool.spread(maskable), baseline=baseline, batch_size=batch_size)
    return explanation_of_logits(logits, pool, maskable, target=target, score=score, norm=norm)


def explanation_of_logits(
    logits: Tensor,
    pool: MaskPool,
    maskable: Tensor,
    *,
    target: Target = "predicted",
    score: str = "logit",
    norm: str | None = None,
) -> Tensor:
    """`linear_explanation` of logits (B, S, C) that `masked_logits` has given for `pool.spread(maskable)`, such as
    stored ones of a teacher. The class "predicted" is that of the first mask, which keeps every token.

    maskable: (B, L), nonzero at the tokens that could be masked. Logits do not tell how many tokens theirs had: that is
        for the caller to keep together, as stored results do by their fingerprint.

    Raises TypeError for what is no tensor or no pool, ValueError for logits of another number of masks or sequences and
    a target out of range.
    """
    check_type("logits", logits, Tensor)
    check_type("pool", pool, MaskPool)
    maskable = as_mask("maskable", maskable)
    check_norm(norm)
    if logits.dim() != 3 or logits.shape[:2] != (len(maskable), pool.samples):
        raise ValueError(
            f"logits {tuple(logits.shape)} do not belong to this mask pool: {(len(maskable), pool.samples, 'C')} are "
            f"needed, {pool.samples} masks for each of {len(maskable)} sequences"
        )
    classes = target_classes(logits[:, 0], target)
    chosen = class_scores(logits.flatten(0, 1), classes.repeat_interleave(pool.samples, 0), score)
    outputs = chosen.unflatten(0, logits.shape[:2]).transpose(1, 2)
    scores = normalise(pool.scores(outputs, maskable), norm)
    return scores[:, 0] if single(target) else scores


def _checked_masks(kept: Tensor, valid: Tensor) -> Tensor:
    """kept (B, S, L), bool or floats, where it is of these tokens (B, L)."""
    check_type("kept", kept, Tensor)
    batch, tokens = valid.shape
    if kept.dim() != 3 or kept.shape[::2] != valid.shape:
        raise ValueError(
            f"kept is {tuple(kept.shape)}; ({batch}, S, {tokens}) is needed, S masks of {tokens} tokens for each of "
            f"{batch} sequences"
        )
    return kept if kept.is_floating_point() else kept != 0


def replaced(embeddings: Tensor, baseline: Tensor, kept: Tensor) -> Tensor:
    """z ⊙ e + (1 - z) ⊙ e₀, (B, L, D); kept z (B, L) bool, or a float in [0, 1] and differentiable."""
    if kept.dtype == torch.bool:
        return torch.where(kept[..., None], embeddings, baseline)
    return torch.lerp(baseline, embeddings, kept[..., None].to(embeddings.dtype))


def _logits_of_rows(
    classifier: Classifier, inputs: Inputs, embeddings: Tensor, rows: Tensor, kept: Tensor, baseline: str, size: int
) -> Iterator[Tensor]:
    """Logits (≤ size, C) of the examples `rows` (R,), each under its mask (R, L). Padding stays as it is."""
    nothing = classifier.baseline(inputs, baseline, embeddings)
    padding = ~valid_tokens(inputs)
    for here, z in zip(rows.split(size), kept.split(size), strict=True):
        z = z.masked_fill(padding[here], 1)
        # The backward of an index, unlike that of index_select, adds number by number.
        points, without = embeddings.index_select(0, here), nothing.index_select(0, here)
        yield classifier.logits(rows_of(inputs, here), replaced(points, without, z))
