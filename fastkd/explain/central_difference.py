"""The gradient of a distance between attributions, without a second derivative of the model.

A student's scores a(e, G) depend on its parameters θ through the embeddings e(θ) and the gradients G = ∂J/∂e (e(θ), θ),
J the score that is explained. With D the distance to the teacher's scores and u = ∂D/∂G,

    dD/dθ = ∂D/∂e · de/dθ + ⟨u, dG/dθ⟩
    ⟨u, dG/dθ⟩ = d/dθ ⟨ū, ∂J/∂e⟩ = d/dθ ∂/∂ε J(e(θ) + ε ū, θ) at ε = 0          ū = u, held constant
               = d/dθ [J(e(θ) + h ū, θ) - J(e(θ) - h ū, θ)] / 2h + O(h²)

The first term is an ordinary gradient with G held constant. The second is that of two forwards from moved embeddings,
each a first-order pass of the whole model, with whatever fused attention it has; both run in the backward, one after
the other, so that beside the step's own graph there is that of one pass. e(θ) stays in the graph: the embeddings learn
from both terms. For integrated gradients the same holds at each point of the path, whose dependence on e(θ) is kept
too; for several classes, for each class with its own u.

ū is scaled for each sequence and class to the size of its embeddings, h ū = s · rms(e) · u / rms(u), with s the
relative step: 3e-3 in fp32, a compromise between the error of the difference, of order s², which grows as the student
learns, and that of rounding, of order 2⁻²⁴ / s, which is largest before (docs/methods/egkd.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.explain.arguments import check_positive, check_type
from fastkd.explain.classifier import Classifier, Draws, Inputs, Watched
from fastkd.explain.gradient import (
    GradientSettings,
    check_watched,
    gradient_of_watched,
    leaves_of,
    mean_gradient,
    path,
    scores_of,
    with_gradient,
)
from fastkd.explain.scores import check_distance
from fastkd.explain.target import Target, check_explained, class_scores, single
from fastkd.ops import attribution_distance

STEP = 3e-3
_STEP_IN_HALF = 2**-6  # in bf16 or fp16 a smaller difference of J drowns in rounding


@dataclass(frozen=True)
class DistanceTo:
    """The `distance` of kind "l2", "l1" or "smooth_l1" to a teacher's scores (B, L), or (B, C, L) of every class, of
    the same settings: computed from e and G by the fused op `attribution_distance`. A sequence whose G is not finite
    makes it NaN and gets no gradient from it. Raises TypeError where the scores are no tensor, ValueError for another
    kind."""

    teacher: Tensor
    kind: str = "l2"

    def __post_init__(self):
        check_type("teacher", self.teacher, Tensor)
        check_distance(self.kind)


def central_difference(
    classifier: Classifier,
    inputs: Inputs,
    settings: GradientSettings,
    distance: DistanceTo | Callable[[Tensor], Tensor],
    *,
    target: Target = "predicted",
    step: float = STEP,
    batch_size: int = 256,
    watched: tuple[Watched, Tensor] | None = None,
) -> Tensor:
    """The distance of the scores, a scalar whose backward gives what double backward through `gradient_attribution(...,
    create_graph=True)` gives, up to O(step²), from two further first-order passes for each class.

        loss = central_difference(student, inputs, settings, DistanceTo(teacher_scores), target=classes)
        loss.backward()

    Args:
        classifier, inputs, settings, target, batch_size: as `gradient_attribution` takes them.
        distance: that to a teacher's scores; or any function of the scores, (B, L), or (B, C, L) where every class is
            explained, that gives a scalar.
        step: s, relative to the size of a sequence's embeddings; in bf16 and fp16 2⁻⁶ at least.
        watched: as `gradient_attribution` takes it, from any forward.

    All passes have the dropout of the first (or watched) forward above the embeddings, so that their difference is one
    of J alone, and run without autocast. Scores that are not finite give a loss that is not: skip the step then.

    The further passes run in the backward, with the model, its mode and the tensors of `inputs` as they are then. They
    may share parameters, but nothing that was computed from parameters beforehand. A hook on a parameter's gradient
    (`Tensor.register_hook`) is called for each of them too.

    Raises as `gradient_attribution`; TypeError for a `distance` of another kind, ValueError for a `step` that is not
    positive.
    """
    check_positive("step", step)
    check_type("settings", settings, GradientSettings)
    if not isinstance(distance, DistanceTo) and not callable(distance):
        raise TypeError(f"distance is of type {type(distance).__name__}; DistanceTo(scores) or a function is needed")
    valid = check_explained(classifier, inputs, target, batch_size)
    inputs = dict(inputs)
    with torch.enable_grad():
        if watched is None:
            before = Draws(valid.device)
            embeddings = with_gradient(classifier.embed(inputs))
            draws = Draws(embeddings.device)
        else:
            seen = check_watched(watched, settings, inputs)
            embeddings, draws, before = seen.embeddings, seen.draws, seen.before
        baseline = classifier.baseline(inputs, settings.baseline, embeddings, before)
        with torch.autocast(embeddings.device.type, enabled=False):
            learning: set[Tensor] = set()
            if watched is None:
                gradient, classes = mean_gradient(
                    classifier, inputs, settings, embeddings, baseline, target, batch_size=batch_size, draws=draws,
                    learning=learning,
                )  # fmt: skip
            else:
                gradient, classes = gradient_of_watched(watched, settings, target)
                learning = leaves_of(watched[1]) - {embeddings}
            gradient = gradient.detach().requires_grad_()
            loss = _distance(distance, settings, gradient, embeddings, baseline, valid, single(target))
            [pull] = torch.autograd.grad(loss, gradient, retain_graph=True)
            direction, rate = _scaled(pull, embeddings, valid, step)
            loss = loss.masked_fill(~(direction.isfinite().all() & rate.isfinite().all()), torch.nan)

    def difference(embeddings: Tensor, baseline: Tensor, weight: Tensor) -> Iterator[Tensor]:
        for k in range(classes.shape[1]):
            for sign in (1, -1):
                for inputs_here, points in path(inputs, settings.steps, embeddings, baseline, batch_size):
                    times = len(points) // max(len(embeddings), 1)
                    points = points + sign * direction[:, k].repeat(times, 1, 1)
                    values = classifier.logits(inputs_here, points, draws)
                    values = class_scores(values, classes[:, [k]].repeat(times, 1), settings.score)[:, 0]
                    yield sign * (weight * rate[:, k].repeat(times) * values).sum() / settings.steps

    return _WithDifference.apply(loss, difference, draws, embeddings, baseline, *learning)


class _WithDifference(torch.autograd.Function):
    """The distance as it is; its backward adds the gradient of the difference, or nothing where that of the embeddings
    is not finite. Each pass runs there, forward and backward: there is the graph of one at a time, however many
    classes and steps there are."""

    @staticmethod
    def forward(ctx, loss: Tensor, difference: Callable, draws: Draws, *moving: Tensor) -> Tensor:
        ctx.difference, ctx.draws = difference, draws
        ctx.save_for_backward(*moving)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, weight: Tensor):
        embeddings, baseline, *parameters = ctx.saved_tensors
        here = [tensor.detach().requires_grad_() for tensor in (embeddings, baseline)]
        moving = [*here, *parameters]
        total = [None] * len(moving)
        with torch.enable_grad(), torch.autocast(embeddings.device.type, enabled=False), ctx.draws.again():
            for part in ctx.difference(*here, weight):
                found = torch.autograd.grad(part, moving, allow_unused=True)
                total = [_sum(old, new) for old, new in zip(total, found, strict=True)]
        finite = total[0].isfinite().all()
        return weight, None, None, *(each if each is None else each.masked_fill(~finite, 0) for each in total)


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Of gradients, each None where a pass did not reach the parameter."""
    return new if old is None else old if new is None else old + new


def _distance(
    distance: DistanceTo | Callable[[Tensor], Tensor],
    settings: GradientSettings,
    gradient: Tensor,
    embeddings: Tensor,
    baseline: Tensor,
    mask: Tensor,
    alone: bool,
) -> Tensor:
    """Of G (B, K, L, D), e and e₀ (B, L, D) and the tokens (B, L); `alone`: K = 1, and the scores are (B, L)."""
    if not isinstance(distance, DistanceTo):
        scores = scores_of(settings, gradient, embeddings, baseline, mask)
        return distance(scores[:, 0] if alone else scores)
    moved = embeddings if settings.baseline == "zero" else embeddings - baseline
    return attribution_distance(
        gradient[:, 0] if alone else gradient,
        None if settings.method == "saliency" else moved,
        distance.teacher.detach(),
        mask=mask,
        reduce=settings.reduce,
        norm=settings.norm,
        kind=distance.kind,
    )


def _scaled(pull: Tensor, embeddings: Tensor, mask: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """h ū (B, K, L, D) and 1 / 2h (B, K), both without gradient; of u (B, K, L, D), e (B, L, D) and the tokens (B, L).
    Where u is 0 so are both."""
    if embeddings.dtype in (torch.bfloat16, torch.float16):
        step = max(step, _STEP_IN_HALF)
    wide = torch.promote_types(pull.dtype, torch.float32)
    pull, size = pull.to(wide), _rms(embeddings.detach().to(wide), mask)[:, None]
    strength = _rms(pull, mask[:, None])
    h = step * size / strength.masked_fill(strength == 0, 1)
    rate = torch.where(strength > 0, 0.5 / h.masked_fill(h == 0, 1), 0)
    return (h[..., None, None] * pull).to(embeddings.dtype), rate


def _rms(vectors: Tensor, mask: Tensor) -> Tensor:
    """Root mean square over tokens (..., L) and dimensions of (..., L, D)."""
    squares = vectors.masked_fill(~mask[..., None], 0).square().sum((-2, -1))
    return (squares / (mask.sum(-1).clamp(min=1) * vectors.shape[-1])).sqrt()
