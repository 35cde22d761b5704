"""Fixed pools of masks, and linear explainers as fixed maps of what a classifier gives for them.

A pool for n tokens has S masks z_s in {0, 1}^n; 1 keeps a token, 0 takes it away. With f_s the score of the sequence
under mask s, both explainers are a = E f with E (n, S) that depends on the masks alone, so it is solved once a length:

LIME (Ribeiro et al. 2016), a ridge regression of f on z with an intercept and the weights π_s = exp(-(1 - cos(z_s, 1))²
/ width²), where cos(z, 1) = √(|z| / n):

    E = (Z̃ᵀ Π Z̃ + ridge I)⁻¹ Z̃ᵀ Π                       Z̃ = Z less its mean under π

KernelSHAP (Lundberg and Lee 2017), the same with π_s = (n-1) / (C(n,|z|) |z| (n-|z|)), the intercept f(∅) and the
constraint Σ a = f(x) - f(∅). With A = Zᵀ Π Z + ridge I, and the two masks that keep all and none as rows of their own:

    a = P Zᵀ Π (f - f(∅)) + c (f(x) - f(∅))               c = A⁻¹1 / (1ᵀA⁻¹1),   P = A⁻¹ - c 1ᵀA⁻¹
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastkd.explain.arguments import as_mask, check_positive, check_type, check_whole, is_number

KINDS = ("lime", "kernel_shap")
_FEWEST = 4  # masks: all, none and a pair


@dataclass(frozen=True)
class MaskPool:
    """Masks for sequences of every length, drawn from a seed: a pool is its settings, and equal settings give equal
    masks on every machine.

    Args:
        kind: "lime" or "kernel_shap".
        samples: S, masks of each length. The first keeps every token; the second, of kernel_shap, none.
        keep: of lime, the least and the largest share of tokens that a mask keeps. kernel_shap draws sizes by its own
            weights, and where all 2ⁿ subsets fit into S it has them all and is exact.
        width: of lime's weights.
        ridge: added to the diagonal; kernel_shap with all subsets needs none and has none.
        seed: of the masks.

    Raises ValueError for settings outside their ranges.
    """

    kind: Literal["lime", "kernel_shap"] = "lime"
    samples: int = 64
    keep: tuple[float, float] = (0.5, 0.9)
    width: float = 0.25
    ridge: float = 0.01
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.keep, list):  # from YAML
            object.__setattr__(self, "keep", tuple(self.keep))
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}; allowed are {', '.join(KINDS)}")
        check_whole("samples", self.samples, _FEWEST)
        check_whole("seed", self.seed, 0)
        if not _are_shares(self.keep):
            raise ValueError(f"keep={self.keep!r}; two shares of kept tokens are needed, as in (0.5, 0.9)")
        for name in ("width", "ridge"):
            check_positive(name, getattr(self, name))

    def of(self, tokens: int) -> "LengthPool":
        """The pool for sequences with so many tokens to mask, made once. Raises ValueError for what is no
        number of tokens."""
        check_whole("tokens", tokens, 0)
        return _pool(self, tokens)

    def spread(self, maskable: Tensor, which: Tensor | None = None) -> Tensor:
        """(B, S, L) bool, the masks laid over the maskable tokens (B, L), those that are not zero; all other tokens are
        kept.

        which: (B, M) int64, the numbers of the masks that each sequence gets; by default all, in order.

        Raises TypeError for what is no tensor, ValueError for another shape and for masks that the pool does not have.
        """
        maskable = as_mask("maskable", maskable)
        if which is not None:
            self._check_which(which, len(maskable))
        count = self.samples if which is None else which.shape[1]
        kept = torch.ones(len(maskable), count, maskable.shape[1], dtype=torch.bool, device=maskable.device)
        for tokens, rows, places in _by_length(maskable):
            masks = self.of(tokens).masks.to(maskable.device)
            masks = masks.expand(len(rows), -1, -1) if which is None else masks[which[rows]]
            kept[rows] = kept[rows].scatter(2, places[:, None].expand(-1, count, -1), masks)
        return kept

    def scores(self, outputs: Tensor, maskable: Tensor) -> Tensor:
        """a (B, L) of scores f (B, S) under the masks of `spread(maskable)`, or (B, K, L) of (B, K, S), differentiable;
        0 at tokens that cannot be masked. Raises TypeError for what is no tensor, ValueError for outputs of another
        number of masks or sequences."""
        maskable = as_mask("maskable", maskable)
        check_type("outputs", outputs, Tensor)
        if outputs.dim() not in (2, 3) or (outputs.shape[0], outputs.shape[-1]) != (len(maskable), self.samples):
            raise ValueError(
                f"outputs {tuple(outputs.shape)} do not belong to this mask pool: {self.samples} masks for each of "
                f"{len(maskable)} sequences are needed"
            )
        flat = outputs if outputs.dim() == 3 else outputs[:, None]
        found = flat.new_zeros(len(maskable), flat.shape[1], maskable.shape[1])
        for tokens, rows, places in _by_length(maskable):
            values = self.of(tokens).scores(flat[rows])
            here = torch.zeros_like(found[rows]).scatter(2, places[:, None].expand_as(values), values)
            found = found.index_copy(0, rows, here)
        return found if outputs.dim() == 3 else found[:, 0]

    def _check_which(self, which: Tensor, batch: int) -> None:
        check_type("which", which, Tensor)
        if which.dim() != 2 or len(which) != batch or which.is_floating_point() or which.dtype == torch.bool:
            raise ValueError(f"which is {which.dtype} of shape {tuple(which.shape)}; integers ({batch}, M) are needed")
        if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < self.samples:
            raise ValueError(
                f"which names the masks {int(which.min())} to {int(which.max())}; the pool has 0 to {self.samples - 1}"
            )


@dataclass(frozen=True, eq=False)
class LengthPool:
    """The masks (S, n) bool of one length, and E (n, S) in fp64."""

    masks: Tensor
    solve: Tensor

    def scores(self, outputs: Tensor) -> Tensor:
        """a = E f, (..., n) of (..., S). Raises ValueError for outputs of another number of masks."""
        if outputs.shape[-1] != len(self.masks):
            raise ValueError(
                f"outputs for {outputs.shape[-1]} masks; the pool for {self.masks.shape[1]} tokens has "
                f"{len(self.masks)} masks. Use the pool that the outputs were computed with"
            )
        return outputs @ self.solve.to(outputs.device, outputs.dtype).T

    def spread(self, maskable: Tensor) -> Tensor:
        """(B, S, L) bool, the masks laid over sequences that all have n maskable tokens, those that are not zero.
        Raises TypeError for what is no tensor, ValueError where a sequence has another number of them."""
        maskable = as_mask("maskable", maskable)
        counts = maskable.sum(1)
        wrong = (counts != self.masks.shape[1]).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"this mask pool is for {self.masks.shape[1]} tokens, sequence {row} has {int(counts[row])} that can "
                "be masked; MaskPool.of gives the pool of each length"
            )
        kept = torch.ones(len(maskable), len(self.masks), maskable.shape[1], dtype=torch.bool, device=maskable.device)
        kept.transpose(1, 2)[maskable] = self.masks.T.repeat(len(maskable), 1).to(maskable.device)
        return kept


def _are_shares(keep) -> bool:
    pair = isinstance(keep, tuple) and len(keep) == 2 and all(map(is_number, keep))
    return pair and 0 <= keep[0] <= keep[1] <= 1


def _by_length(maskable: Tensor):
    """(n, rows with n maskable tokens, their places (R, n)) for every n that occurs."""
    counts = maskable.sum(1)
    for tokens in counts.unique().tolist():
        rows = (counts == tokens).nonzero()[:, 0]
        yield tokens, rows, maskable[rows].nonzero()[:, 1].view(len(rows), tokens)


@functools.lru_cache(maxsize=4096)
def _pool(pool: MaskPool, tokens: int) -> LengthPool:
    if tokens == 0:
        return LengthPool(torch.ones(pool.samples, 0, dtype=torch.bool), torch.zeros(0, pool.samples))
    draw = torch.Generator().manual_seed(pool.seed * 1_000_003 + tokens)
    if pool.kind == "lime":
        masks = _lime_masks(pool, tokens, draw)
        return LengthPool(masks, _lime_solve(masks.double(), pool))
    masks, weights, ridge = _shap_masks(pool, tokens, draw)
    return LengthPool(masks, _shap_solve(masks.double(), weights, ridge))


def _subsets(sizes: Tensor, tokens: int, draw: torch.Generator) -> Tensor:
    """(R, n) bool: in row r a random subset of sizes[r] tokens."""
    order = torch.rand(len(sizes), tokens, generator=draw).argsort(1).argsort(1)
    return order < sizes[:, None]


def _lime_masks(pool: MaskPool, tokens: int, draw: torch.Generator) -> Tensor:
    low, high = pool.keep
    share = low + (high - low) * torch.rand(pool.samples - 1, generator=draw)
    sizes = (share * tokens).round().long().clamp(min(1, tokens - 1), max(tokens - 1, 0))
    everything = torch.ones(1, tokens, dtype=torch.bool)
    return torch.cat([everything, _subsets(sizes, tokens, draw)])


def _lime_solve(masks: Tensor, pool: MaskPool) -> Tensor:
    tokens = masks.shape[1]
    weights = torch.exp(-(((1 - (masks.mean(1)).sqrt()) / pool.width) ** 2))
    if tokens == 1:  # the empty mask has no angle
        weights = torch.ones_like(weights)
    centred = masks - (weights @ masks / weights.sum())
    weighted = centred * weights[:, None]
    return torch.linalg.solve(weighted.T @ centred + pool.ridge * torch.eye(tokens, dtype=masks.dtype), weighted.T)


def _shap_masks(pool: MaskPool, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Masks, of which the first keeps all and the second none, their weights, and the ridge."""
    ends = torch.tensor([[True], [False]]).expand(2, tokens)
    free = pool.samples - 2
    if 2**tokens - 2 <= free:
        proper = (torch.arange(1, 2**tokens - 1)[:, None] >> torch.arange(tokens)) & 1 == 1
        kept = proper.sum(1).tolist()
        weights = [(tokens - 1) / (math.comb(tokens, k) * k * (tokens - k)) for k in kept]
        filling = ends[:1].expand(free - len(proper), tokens)  # every length has S masks; these weigh nothing
        weights = torch.tensor([0, 0, *weights, *[0] * len(filling)], dtype=torch.float64)
        return torch.cat([ends, proper, filling]), weights, 0.0
    sizes = torch.arange(1, tokens)
    drawn = torch.multinomial(1 / (sizes * (tokens - sizes)).double(), (free + 1) // 2, True, generator=draw) + 1
    half = _subsets(drawn, tokens, draw)
    # Each mask and its complement: half of the variance goes. Drawn by their weights, they all weigh the same.
    masks = torch.cat([ends, torch.stack([half, ~half], 1).flatten(0, 1)[:free]])
    weights = torch.ones(pool.samples, dtype=torch.float64)
    weights[:2] = 0
    return masks, weights, pool.ridge


def _shap_solve(masks: Tensor, weights: Tensor, ridge: float) -> Tensor:
    tokens = masks.shape[1]
    if tokens == 1:  # all that there is to explain is f(x) - f(∅)
        solve = masks.new_zeros(1, len(masks))
    else:
        weighted = masks * weights[:, None]
        inverse = torch.linalg.inv(weighted.T @ masks + ridge * torch.eye(tokens, dtype=masks.dtype))
        share = inverse.sum(1) / inverse.sum()
        solve = (inverse - torch.outer(share, inverse.sum(0))) @ weighted.T
        solve[:, 1] -= solve.sum(1)  # f(∅) is subtracted from every f
        solve[:, 0] += share
        solve[:, 1] -= share
        return solve
    solve[:, 0], solve[:, 1] = 1, -1
    return solve
