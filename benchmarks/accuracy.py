"""The one rule by which a result counts as right, for tests and benchmarks alike.

A result passes when its largest error against fp64 is at most twice the error of the eager formulation in the same
dtype, plus a floor: FLOORS[dtype] times the largest magnitude of the truth, plus the op's rounding noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A few units in the last place: what one final rounding and another order of summation cost.
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Verdict:
    """Largest absolute errors, and the bound the first of them must keep."""

    error: float
    eager_error: float
    allowed: float

    def __bool__(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"error {self.error:.2e}, eager {self.eager_error:.2e}, allowed {self.allowed:.2e}"


def largest_error(result: Tensor, truth: Tensor) -> float:
    """max |result − truth|; a NaN, an infinity or another shape counts as infinite."""
    if result.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    return (result.double() - truth.double()).abs().nan_to_num(nan=float("inf")).max().item()


def largest(truth: Tensor) -> float:
    return truth.abs().max().item() if truth.numel() else 0.0


def judge(result: Tensor, eager: Tensor, truth: Tensor, noise: float = 0.0) -> Verdict:
    """Apply the rule to `result`.

    Args:
        result: what is judged; its dtype chooses the floor.
        eager: the eager formulation in the inputs' dtype. Where it overflows, its fp32 form must be given.
        truth: the same in fp64.
        noise: absolute error of rounding that the magnitude of the truth does not show, because it cancels.
    """
    eager_error = largest_error(eager, truth)
    return Verdict(
        largest_error(result, truth), eager_error, 2 * eager_error + FLOORS[result.dtype] * largest(truth) + noise
    )
