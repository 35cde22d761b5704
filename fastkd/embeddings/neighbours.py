"""The nearest rows by cosine: the same on every run, whatever the tiles of a matrix product do to the last digit."""

import math

import torch
from torch import Tensor

SPARE_CANDIDATES = 8


class Neighbours:
    """The nearest of some candidate rows (M, D) by cosine, of equal ones the first."""

    def __init__(self, candidates: Tensor):
        self.unit, self.norm = _unit(candidates)
        self.blank = self.norm == 0

    def nearest(self, x: Tensor, k: int) -> Tensor:
        """(N, D) -> (N, k) int64, the nearest first. A row of zeros has no cosine: to x = 0 the shortest rows are the
        nearest ones, and to any other x the rows of zeros are the farthest."""
        unit, norm = _unit(x)
        similarity = (unit @ self.unit.mT).masked_fill_(self.blank, -math.inf)
        similarity[norm == 0] = -self.norm
        top, ids = similarity.topk(min(k + SPARE_CANDIDATES, len(self.unit)))
        # The product above rounds differently from tile to tile. What decides is a sum of fixed order, and of equal
        # ones the smaller id; the spare candidates cover all that rounding may have put out of place.
        ids = ids.sort(1).values
        exact = self.unit[ids].mul_(unit[:, None]).sum(2)
        exact.masked_fill_(self.blank[ids], -math.inf)
        exact[norm == 0] = -self.norm[ids[norm == 0]]
        chosen = ids.gather(1, exact.argsort(dim=1, descending=True, stable=True)[:, :k])
        if top.shape[1] < len(self.unit):
            last = top[:, k - 1]
            rounding = 2 * x.shape[1] * torch.finfo(x.dtype).eps * last.abs().clamp(min=1)
            for row in (top[:, -1] >= last - rounding).nonzero()[:, 0].tolist():
                chosen[row] = self._nearest_of_all(unit[row], norm[row], k)
        return chosen

    def _nearest_of_all(self, unit: Tensor, norm: Tensor, k: int) -> Tensor:
        exact = (unit * self.unit).sum(1).masked_fill_(self.blank, -math.inf)
        return (exact if norm else -self.norm).argsort(descending=True, stable=True)[:k]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one (zeros stay zeros) and their lengths; squares neither overflow nor vanish."""
    largest = x.abs().amax(1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1), (norm * largest)[:, 0]
