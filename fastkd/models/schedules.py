"""Replacement schedules: the probability that a student layer takes its predecessors' place, by optimizer step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReplacementSchedule:
    """Replacement rate p(t) after t finished optimizer steps; 1 from step `end` on, which is then plain fine-tuning.

        linear    p(t) = start + (1 - start) · t / end
        cosine    p(t) = 1 - (1 - start) · (1 + cos(π t / end)) / 2
        constant  p(t) = start

    BERT-of-Theseus (arXiv 2002.02925) writes the linear one as min(1, slope · t + start): see `from_slope`.

    Raises ValueError unless 0 < start <= 1 and end >= 0.
    """

    shape: Literal["linear", "cosine", "constant"]
    start: float
    end: float

    def __post_init__(self):
        if self.shape not in ("linear", "cosine", "constant"):
            raise ValueError(f"shape={self.shape!r}: give 'linear', 'cosine' or 'constant'")
        if not 0 < self.start <= 1:
            raise ValueError(f"start={self.start}: a replacement rate lies in (0, 1]; at 0 nothing would be trained")
        if not 0 <= self.end < math.inf:
            raise ValueError(f"end={self.end}: the step at which the rate reaches 1, 0 or more, is needed")

    @classmethod
    def from_slope(cls, start: float, slope: float) -> "ReplacementSchedule":
        """Linear, p(t) = min(1, slope · t + start): 0.3 and 6e-4 reach 1 at step 1167."""
        if slope <= 0:
            raise ValueError(f"slope={slope}: the rate must rise, so a positive number is needed")
        return cls("linear", start, (1 - start) / slope)

    @classmethod
    def from_total(cls, total_steps: int, shape: str = "linear", start: float = 0.3, reach: float = 0.6):
        """Reach 1 after the fraction `reach` of the run's optimizer steps."""
        if not 0 <= reach <= 1:
            raise ValueError(f"reach={reach}: the part of the run after which the rate is 1 lies in [0, 1]")
        return cls(shape, start, reach * total_steps)

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return 1.0
        if self.shape == "constant":
            return self.start
        if self.shape == "linear":
            return self.start + (1 - self.start) * step / self.end
        return 1 - (1 - self.start) * (1 + math.cos(math.pi * step / self.end)) / 2


def effective_rate(rate: float, modules: int) -> float:
    """The rate that is really trained with when a draw without any replacement is repeated: p / (1 - (1 - p)^M)."""
    return rate / (1 - (1 - rate) ** modules)
