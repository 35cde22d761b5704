"""What is explained: the score of a class."""

from typing import Literal

import torch
from torch import Tensor

from fastkd.explain.arguments import check_type, check_whole
from fastkd.explain.classifier import Classifier, Inputs, valid_tokens

SCORES = ("logit", "log_probability")

Target = Tensor | Literal["predicted", "all"]


def target_classes(logits: Tensor, target: Target) -> Tensor:
    """(B, K) int64, the classes whose score is explained.

    logits: (B, C).
    target: "predicted", the class of the largest logit; (B,) integers, a class for each example, such as labels or the
        teacher's predictions; "all", every class, K = C. A regression has the one class 0.

    Raises as `check_target`, and ValueError, on the CPU, for a class out of range.
    """
    batch, classes = logits.shape
    check_target(target, batch)
    if isinstance(target, str):
        if target == "predicted":
            return logits.detach().argmax(1, keepdim=True)
        return torch.arange(classes, device=logits.device).expand(batch, classes)
    if target.device.type == "cpu" and batch:
        low, high = (int(bound) for bound in target.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"target class {low if low < 0 else high} is out of range; the model has {classes} classes: "
                f"0 to {classes - 1}"
            )
    return target.to(logits.device, torch.int64)[:, None]


def check_target(target: Target, batch: int) -> None:
    """Raise a TypeError for a target that is neither a text nor a tensor, a ValueError for another text, another length
    than the `batch` has examples, and other numbers than integers."""
    if isinstance(target, Tensor):
        if target.shape != (batch,) or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(
                f"target is {target.dtype} of shape {tuple(target.shape)}; integers, one for each of the {batch} "
                "examples, are needed"
            )
        return
    allowed = f"allowed are 'predicted', 'all' and a tensor of {batch} classes, such as torch.full(({batch},), 1)"
    if not isinstance(target, str):
        raise TypeError(f"target is of type {type(target).__name__}; {allowed}")
    if target not in ("predicted", "all"):
        raise ValueError(f"target={target!r}; {allowed}")


def check_explained(
    classifier: Classifier, inputs: Inputs, target: Target = "predicted", batch_size: int = 1
) -> Tensor:
    """The tokens (B, L), bool, of what an explainer was given. Raises a TypeError or a ValueError where one of these is
    not what it should be, before anything runs."""
    check_type("classifier", classifier, Classifier, ": Classifier(model)")
    valid = valid_tokens(inputs)
    check_target(target, len(valid))
    check_whole("batch_size", batch_size)
    return valid


def class_scores(logits: Tensor, classes: Tensor, score: str) -> Tensor:
    """f (B, K): the score of each class, its "logit" or "log_probability" (log softmax). The one column of a
    regression is its score either way.

    logits: (B, C); classes: (B, K) int64.
    """
    check_score(score)
    if score == "log_probability" and logits.shape[1] > 1:
        logits = logits.log_softmax(1)
    return logits.gather(1, classes)


def single(target: Target) -> bool:
    """Whether one class is explained for each example: attributions are then (B, L), else (B, K, L)."""
    return not isinstance(target, str) or target == "predicted"


def check_score(score: str) -> None:
    if score not in SCORES:
        raise ValueError(f"score={score!r}; allowed are {', '.join(SCORES)}")
