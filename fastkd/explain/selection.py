"""The best k tokens of a sequence, drawn and relaxed so that they can be learned (L2X, Chen et al., ICML 2018).

With logits w of the n tokens that may be selected and k = ceil(ratio · n) independent Gumbel draws,

    s^(j) = softmax((w + g^(j)) / t),  j = 1..k          v_i = max_j s^(j)_i

v is near a mask with k ones for small t. Its gradient goes to the draw that is the largest, of equal ones the first.
What is stored at the end is hard: the k largest w.
"""

import torch
from torch import Tensor

from fastkd.explain.arguments import as_mask, check_positive, check_share, check_type


def chosen_counts(maskable: Tensor, ratio: float) -> Tensor:
    """(B,) int64, k = ceil(ratio · n) of the n maskable tokens (B, L), bool. Raises ValueError for a ratio that is not
    in (0, 1]."""
    check_share("ratio", ratio)
    # A ratio such as 0.1 is a little more than a tenth: of 30 tokens 3 are meant, not 4.
    return (maskable.sum(1).double() * ratio - 1e-9).ceil().long()


def relaxed_top_k(logits: Tensor, maskable: Tensor, ratio: float, temperature: float) -> Tensor:
    """v (B, L) in [0, 1], drawn with torch's generator and differentiable in the logits (B, L); 1 at tokens that are
    not maskable, which are always kept.

    maskable: (B, L), nonzero at the tokens that may be selected. ratio: share of them, in (0, 1]. temperature: t > 0.

    Raises TypeError for what is no tensor, ValueError for another shape, ratio or temperature.
    """
    check_positive("temperature", temperature)
    maskable = _maskable(logits, maskable)
    counts = chosen_counts(maskable, ratio)
    draws = int(counts.max()) if len(counts) else 0
    if not draws:
        return torch.ones_like(logits)
    uniform = torch.rand(len(logits), draws, logits.shape[1], dtype=logits.dtype, device=logits.device)
    gumbel = -(-uniform.clamp(min=torch.finfo(logits.dtype).tiny).log()).clamp(min=1e-20).log()
    noisy = ((logits[:, None] + gumbel) / temperature).masked_fill(~maskable[:, None], -torch.inf)
    empty = counts[:, None, None] == 0  # a sequence without a token to select has no softmax
    soft = noisy.masked_fill(empty, 0).softmax(-1)
    spare = torch.arange(draws, device=logits.device) >= counts[:, None]
    values = soft.masked_fill(spare[..., None], 0).max(1).values
    return torch.where(maskable, values, 1)


def hard_top_k(logits: Tensor, maskable: Tensor, ratio: float) -> Tensor:
    """(B, L) bool: the k tokens with the largest logits, of equal ones the first; also the tokens that are not
    maskable, which are always kept (padding among them). Arguments and errors as `relaxed_top_k`."""
    maskable = _maskable(logits, maskable)
    counts = chosen_counts(maskable, ratio)
    ranked = logits.masked_fill(~maskable, -torch.inf).argsort(stable=True, dim=1, descending=True)
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(logits.shape[1], device=logits.device).expand_as(ranked)
    )
    return (rank < counts[:, None]) | ~maskable


def _maskable(logits: Tensor, maskable: Tensor) -> Tensor:
    check_type("logits", logits, Tensor)
    return as_mask("maskable", maskable, logits.shape)
