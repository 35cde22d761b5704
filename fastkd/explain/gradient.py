"""Attributions from gradients: saliency, gradient × input, integrated gradients.

With f the score of a class, e the embeddings (B, L, D), e₀ a baseline and m steps,

    G = 1/m Σ_{k=1..m} ∂f/∂e at e₀ + k/m (e - e₀)
    saliency               a_i = ‖G_i‖₂                 (m = 1; Simonyan et al. 2014)
    gradient × input       a_i = r(G_i ⊙ e_i)           (m = 1, e₀ = 0)
    integrated gradients   a_i = r(G_i ⊙ (e_i - e₀_i))  (Sundararajan et al. 2017, right Riemann sum as AD-KD takes it)

where r is the Euclidean norm ("norm", AD-KD) or the sum over dimensions ("sum"; integrated gradients then add up to
f(e) - f(e₀)). With one step and e₀ = 0 integrated gradients are gradient × input.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastkd.explain.arguments import check_type, check_whole
from fastkd.explain.classifier import BASELINES, Classifier, Draws, Inputs, Watched, check_embeddings, rows_of
from fastkd.explain.scores import check_norm, length, normalise, on_tokens
from fastkd.explain.second_order import twice_differentiable
from fastkd.explain.target import Target, check_explained, check_score, class_scores, single, target_classes

METHODS = ("saliency", "gradient_x_input", "integrated_gradients")
REDUCTIONS = ("norm", "sum")


@dataclass(frozen=True)
class GradientSettings:
    """What is explained, and how.

    Args:
        method: "saliency", "gradient_x_input" or "integrated_gradients".
        steps: m, of integrated gradients.
        baseline: e₀ of integrated gradients: "zero" or "mask".
        reduce: r, "norm" or "sum"; saliency has the norm.
        score: f, the "logit" of a class or its "log_probability".
        norm: None, "l1" or "l2": over what the scores of a sequence are normalised.

    Raises ValueError for anything else, and for steps or a baseline that the method does not have.
    """

    method: Literal["saliency", "gradient_x_input", "integrated_gradients"] = "gradient_x_input"
    steps: int = 1
    baseline: Literal["zero", "mask"] = "zero"
    reduce: Literal["norm", "sum"] = "norm"
    score: Literal["logit", "log_probability"] = "logit"
    norm: Literal["l1", "l2"] | None = None

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("baseline", BASELINES), ("reduce", REDUCTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        check_score(self.score)
        check_norm(self.norm)
        check_whole("steps", self.steps)
        if self.method != "integrated_gradients" and (self.steps, self.baseline) != (1, "zero"):
            raise ValueError(
                f"method={self.method!r} has no steps={self.steps} and baseline={self.baseline!r}; "
                "integrated_gradients has"
            )
        if self.method == "saliency" and self.reduce != "norm":
            raise ValueError(f"method='saliency' has no reduce={self.reduce!r}; it is the norm of the gradient")


def saliency(
    classifier: Classifier,
    inputs: Inputs,
    *,
    target: Target = "predicted",
    score: str = "logit",
    norm: str | None = None,
    create_graph: bool = False,
) -> Tensor:
    """‖∂f/∂e_i‖₂: (B, L) or (B, C, L). Arguments and errors as `GradientSettings` and `gradient_attribution`."""
    settings = GradientSettings("saliency", score=score, norm=norm)
    return gradient_attribution(classifier, inputs, settings, target=target, create_graph=create_graph)


def gradient_x_input(
    classifier: Classifier,
    inputs: Inputs,
    *,
    target: Target = "predicted",
    reduce: str = "norm",
    score: str = "logit",
    norm: str | None = None,
    create_graph: bool = False,
) -> Tensor:
    """r(∂f/∂e_i ⊙ e_i): (B, L) or (B, C, L). Arguments and errors as `GradientSettings` and `gradient_attribution`."""
    settings = GradientSettings("gradient_x_input", reduce=reduce, score=score, norm=norm)
    return gradient_attribution(classifier, inputs, settings, target=target, create_graph=create_graph)


def integrated_gradients(
    classifier: Classifier,
    inputs: Inputs,
    *,
    steps: int,
    target: Target = "predicted",
    baseline: str = "zero",
    reduce: str = "norm",
    score: str = "logit",
    norm: str | None = None,
    create_graph: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """r(G_i ⊙ (e_i - e₀_i)): (B, L) or (B, C, L). Arguments and errors as `GradientSettings` and
    `gradient_attribution`."""
    settings = GradientSettings("integrated_gradients", steps, baseline, reduce, score, norm)
    return gradient_attribution(
        classifier, inputs, settings, target=target, create_graph=create_graph, batch_size=batch_size
    )


def gradient_attribution(
    classifier: Classifier,
    inputs: Inputs,
    settings: GradientSettings = GradientSettings(),
    *,
    target: Target = "predicted",
    create_graph: bool = False,
    batch_size: int = 256,
    watched: tuple[Watched, Tensor] | None = None,
) -> Tensor:
    """Scores (B, L) of the tokens, 0 in padding; (B, C, L) where every class is explained. In the dtype of the
    embeddings, which under autocast may be a wider one than the logits'.

    Args:
        classifier: the model. Its parameters get no gradient here, and need none.
        inputs: input_ids (B, L) or inputs_embeds (B, L, D), attention_mask (B, L) and whatever else the model takes.
        target: the class, as `target_classes` takes it.
        create_graph: the scores can be differentiated with respect to the parameters, by a second backward through
            the first. Attention then runs on the mathematical path (`twice_differentiable`).
        batch_size: sequences of one forward at most, where there are several steps.
        watched: what `Classifier.watch` saw of a forward of the same inputs, and that forward's logits (B, C), with
            their graphs, which stay. The scores then need no forward of their own, only a backward to the embeddings.
            With `create_graph` that forward must have run within `twice_differentiable`. For methods of one step.

    Raises, all but the last before anything runs:
        TypeError: a model in the place of its `Classifier`, inputs that are no mapping of tensors, a target that is
            neither a text nor a tensor, a mapping in the place of `GradientSettings`.
        ValueError: inputs or a target of another shape, a batch_size below 1, watched forwards where there are several
            steps, or of other inputs; a model that offers no embeddings; a target out of range.
    """
    check_type("settings", settings, GradientSettings)
    valid = check_explained(classifier, inputs, target, batch_size)
    with torch.enable_grad(), twice_differentiable() if create_graph else nullcontext():
        if watched is None:
            before = Draws(valid.device)
            embeddings = classifier.embed(inputs)
            embeddings = with_gradient(embeddings if create_graph else embeddings.detach())
        else:
            seen = check_watched(watched, settings, inputs)
            embeddings, before = seen.embeddings, seen.before
        baseline = classifier.baseline(inputs, settings.baseline, embeddings, before)
        if watched is None:
            gradient, _ = mean_gradient(
                classifier, inputs, settings, embeddings, baseline, target, create_graph=create_graph,
                batch_size=batch_size,
            )  # fmt: skip
        else:
            gradient, _ = gradient_of_watched(watched, settings, target, create_graph=create_graph)
        scores = scores_of(settings, gradient, embeddings, baseline, valid)
    scores = scores if create_graph else scores.detach()
    return scores[:, 0] if single(target) else scores


def mean_gradient(
    classifier: Classifier,
    inputs: Inputs,
    settings: GradientSettings,
    embeddings: Tensor,
    baseline: Tensor,
    target: Target,
    *,
    create_graph: bool = False,
    batch_size: int = 256,
    draws: Draws | None = None,
    learning: set[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """G (B, K, L, D), of embeddings that require grad, and the classes (B, K). `learning` gets the parameters that the
    passes reach."""
    classes, total = None, 0
    for inputs_here, points in path(inputs, settings.steps, embeddings, baseline, batch_size):
        points = points if create_graph else points.detach().requires_grad_()
        logits = classifier.logits(inputs_here, points, draws)
        if learning is not None:
            learning |= leaves_of(logits) - {points}
        if classes is None:
            classes = target_classes(logits[: len(embeddings)], target)  # the path begins at the embeddings themselves
        steps = len(points) // len(embeddings) if len(embeddings) else 1
        gradients = gradients_of_classes(logits, classes.repeat(steps, 1), settings.score, points, create_graph)
        total = total + gradients.unflatten(0, (steps, len(embeddings))).sum(0)
    return total / settings.steps, classes


def check_watched(watched: tuple[Watched, Tensor], settings: GradientSettings, inputs: Inputs) -> Watched:
    """What was seen of a forward that can serve the explanation; a ValueError where it cannot, a TypeError where it is
    no pair of what was seen and logits."""
    if settings.steps != 1:
        raise ValueError(f"steps={settings.steps} need passes of their own: a watched forward is one step")
    if not isinstance(watched, tuple) or len(watched) != 2 or not isinstance(watched[0], Watched):
        raise TypeError("watched: a pair is needed, what classifier.watch() gave and the logits of that forward")
    seen, _ = watched
    if seen.embeddings is None:
        raise ValueError("watched: no forward of the model ran inside classifier.watch()")
    check_embeddings(seen.embeddings, inputs)
    return seen


def gradient_of_watched(
    watched: tuple[Watched, Tensor], settings: GradientSettings, target: Target, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """`mean_gradient` of one step, whose forward has run; its graph stays."""
    seen, logits = watched
    classes = target_classes(logits, target)
    gradients = gradients_of_classes(logits, classes, settings.score, seen.embeddings, create_graph, keep_graph=True)
    return gradients, classes


def gradients_of_classes(
    logits: Tensor, classes: Tensor, score: str, points: Tensor, create_graph: bool = False, keep_graph: bool = False
) -> Tensor:
    """∂f/∂points of the scores f (B, K) of the classes, (B, K, L, D); logits (B, C).

    Log-probabilities of all C classes take C - 1 backwards: with d_k = ∂(z_k - z_r)/∂points of the classes k other than
    r, ∂ log p_c = Σ_k (1[k = c] - p_k) d_k. r is the class with the largest logit, so that no 1 - p_k is a small
    difference.
    """
    if score != "log_probability" or not 1 < classes.shape[1] == logits.shape[1]:
        return gradients_of(class_scores(logits, classes, score), points, create_graph, keep_graph)
    likeliest = logits.detach().argmax(1, keepdim=True)
    others = (likeliest + torch.arange(1, logits.shape[1], device=logits.device)) % logits.shape[1]
    apart = logits.gather(1, others) - logits.gather(1, likeliest)
    gradients = gradients_of(apart, points, create_graph, keep_graph)
    with torch.autocast(logits.device.type, enabled=False):
        shares = logits.to(gradients.dtype).softmax(1).gather(1, others)
        weights = (classes[..., None] == others[:, None]).to(gradients.dtype) - shares[:, None]
        return torch.einsum("bck,bkld->bcld", weights, gradients)


def gradients_of(scores: Tensor, points: Tensor, create_graph: bool = False, keep_graph: bool = False) -> Tensor:
    """∂scores_bk/∂points_b, (B, K, L, D), from one forward and a backward for each of the K classes."""
    columns = scores.sum(0).unbind()
    gradients = [
        torch.autograd.grad(
            column,
            points,
            create_graph=create_graph,
            retain_graph=create_graph or keep_graph or k + 1 < len(columns),
        )[0]
        for k, column in enumerate(columns)
    ]
    return torch.stack(gradients, 1)


def leaves_of(output: Tensor) -> set[Tensor]:
    """Where the graph of `output` ends: the parameters that learn, whatever kind of function has them."""
    leaves, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [before for before, _ in node.next_functions]
    return leaves


def path(
    inputs: Inputs, steps: int, embeddings: Tensor, baseline: Tensor, batch_size: int
) -> Iterator[tuple[Inputs, Tensor]]:
    """The points e₀ + k/m (e - e₀) for k = m, ..., 1: whole steps, as many as fit into `batch_size` rows, and beside
    them the inputs, as often."""
    if steps == 1:
        yield inputs, embeddings
        return
    batch = len(embeddings)
    together = max(1, batch_size // max(batch, 1))
    parts = torch.arange(steps, 0, -1, device=embeddings.device, dtype=embeddings.dtype) / steps
    for part in parts.split(together):
        points = torch.lerp(baseline, embeddings, part[:, None, None, None]).flatten(0, 1)
        yield rows_of(inputs, torch.arange(batch, device=embeddings.device).repeat(len(part))), points


def scores_of(
    settings: GradientSettings, gradient: Tensor, embeddings: Tensor, baseline: Tensor, mask: Tensor
) -> Tensor:
    """a (B, K, L), normalised, of G (B, K, L, D), e and e₀ (B, L, D) and the tokens (B, L); 0 in padding.
    Where G is not finite, the scores of the sequence are NaN and give no gradient: they can be left out of a step."""
    gradient = gradient.masked_fill(~mask[:, None, :, None], 0)
    bad = ~gradient.isfinite().all(-1).all(-1, keepdim=True)
    gradient = gradient.masked_fill(bad[..., None], 0)
    if settings.method != "saliency":
        gradient = gradient * (embeddings - baseline)[:, None]
    scores = gradient.sum(-1) if settings.reduce == "sum" else length(gradient)
    return normalise(on_tokens(scores, mask), settings.norm).masked_fill(bad, torch.nan)


def with_gradient(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()
