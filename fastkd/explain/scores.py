"""Scores of tokens, as far as they need a mask; how they are normalised and compared stands beside the fused op."""

import torch
from torch import Tensor

from fastkd.ops.attribution_scores import (
    DISTANCES,
    NORMS,
    check_distance,
    check_norm,
    distance,
    length,
    normalise,
)

__all__ = ["DISTANCES", "NORMS", "check_distance", "check_norm", "distance", "length", "normalise", "on_tokens"]


def on_tokens(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (B, K, L) with 0 where the mask (B, L) is not set."""
    return torch.where(mask[:, None], scores, torch.zeros((), dtype=scores.dtype, device=scores.device))
