"""How alike the explanations of two models are, and how alike unrelated ones would be."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from fastkd.explain.arguments import as_mask, check_share, check_type
from fastkd.explain.selection import chosen_counts


@dataclass(frozen=True)
class Consistency:
    """Means over sequences, each in [-1, 1] (overlap: [0, 1]), 1 for equal explanations; NaN where there is none.

    What unrelated explanations have is not 0 in all of them; `by_chance` says what it is.

    Attributes:
        cosine: of the scores: whether the same tokens have large scores, of the same sign. The largest tokens decide.
            Where all scores have one sign (lengths, `reduce="norm"`) it is large between any two explanations, and
            where special tokens are compared too it is their agreement: leave them out of the mask.
        spearman: rank correlation of the scores: whether the tokens have the same order, however far apart they are.
            0 by chance.
        overlap: share that the two sets of top tokens have in common: whether both name the same most important tokens.
            By chance it is the share of tokens in a top set, more in short sequences, where k is rounded up.
        sequences: how many there are.
        undefined: of these, those left out of cosine and Spearman: fewer than two tokens, or scores that are all equal.
    """

    cosine: float
    spearman: float
    overlap: float
    sequences: int
    undefined: int


def consistency(student: Tensor, teacher: Tensor, mask: Tensor, top: float = 0.2) -> Consistency:
    """Cosine, Spearman and top-k overlap of two attributions.

    student, teacher: (B, L) scores of the same tokens.
    mask: (B, L), nonzero at the tokens that are compared, such as `Classifier.maskable(inputs)`.
    top: share of tokens in a top set, in (0, 1], k rounded up; of equal scores the first tokens. For overlap, scores
        are compared as they are: a strong token against the class is not at the top.

    Raises TypeError for what is no tensor, ValueError for other shapes and for scores that are NaN or infinite.
    """
    valid = _checked(mask, top, student=student, teacher=teacher)
    counts = chosen_counts(valid, top).tolist()
    cosines, ranks, overlaps = [], [], []
    for row, k in enumerate(counts):
        pair = [scores[row][valid[row]].double().cpu() for scores in (student, teacher)]
        if k:
            tops = [set(scores.argsort(descending=True, stable=True)[:k].tolist()) for scores in pair]
            overlaps.append(len(tops[0] & tops[1]) / k)
        if len(pair[0]) > 1 and all((scores != scores[0]).any() for scores in pair):
            cosines.append(F.cosine_similarity(*pair, dim=0).item())
            ranks.append(float(spearmanr(*(scores.numpy() for scores in pair)).statistic))
    means = [float(np.mean(values)) if values else float("nan") for values in (cosines, ranks, overlaps)]
    return Consistency(*means, len(counts), len(counts) - len(cosines))


def by_chance(teacher: Tensor, mask: Tensor, top: float = 0.2, *, seed: int = 0) -> Consistency:
    """The level of unrelated explanations: `consistency` of the teacher's scores with themselves in an order shuffled
    within each sequence, drawn from `seed`. Arguments and errors as `consistency`."""
    valid = _checked(mask, top, teacher=teacher)
    shuffled, draw = teacher.clone(), torch.Generator().manual_seed(seed)
    for row, here in enumerate(valid):
        places = here.nonzero()[:, 0]
        order = torch.randperm(len(places), generator=draw).to(places.device)
        shuffled[row, places] = teacher[row, places[order]]
    return consistency(shuffled, teacher, valid, top)


def _checked(mask: Tensor, top: float, **sides: Tensor) -> Tensor:
    """The mask (B, L) bool, where the scores of each side fit it."""
    check_share("top", top)
    valid = as_mask("mask", mask)
    for name, scores in sides.items():
        check_type(f"{name}: scores", scores, Tensor)
        if scores.shape != valid.shape:
            raise ValueError(f"the {name}'s scores are {tuple(scores.shape)}, the mask is {tuple(valid.shape)}")
        bad = (~scores.isfinite() & valid).any(1).nonzero()
        if len(bad):
            raise ValueError(f"the {name}'s scores of sequence {int(bad[0])} are NaN or infinite ({len(bad)} such)")
    return valid
