"""How alike the explanations of two models are."""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from fastkd.explain.selection import chosen_counts


@dataclass(frozen=True)
class Consistency:
    """Means over sequences, each in [-1, 1] (overlap: [0, 1]), 1 for equal explanations; NaN where there is none.

    Attributes:
        cosine: of the scores.
        spearman: rank correlation of the scores.
        overlap: share that the two sets of top tokens have in common.
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
    mask: (B, L), nonzero at the tokens that are compared.
    top: share of tokens in a top set, in (0, 1], k rounded up; of equal scores the first tokens. For overlap, scores
        are compared as they are: a strong token against the class is not at the top.

    Raises ValueError for other shapes and for scores that are NaN or infinite.
    """
    valid = mask != 0
    for name, scores in (("student", student), ("teacher", teacher)):
        if scores.shape != valid.shape:
            raise ValueError(f"the {name}'s scores are {tuple(scores.shape)}, the mask is {tuple(valid.shape)}")
        bad = (~scores.isfinite() & valid).any(1).nonzero()
        if len(bad):
            raise ValueError(f"the {name}'s scores of sequence {int(bad[0])} are NaN or infinite ({len(bad)} such)")
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
