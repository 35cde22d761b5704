"""From single measurements to the figures of a report."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from fastkd.edge.report_schema import Difference

_RESAMPLES = 5000


def latency(milliseconds: Sequence[float], batch: int) -> dict[str, float | int]:
    """Percentiles and mean of the calls of one cell, as the fields of a `Cell`.

    Sentences per second are those of the median call. `spread` is (p90 - p10) / p50, 0 on a machine without noise.
    """
    p10, p50, p90, p95, p99 = np.percentile(milliseconds, [10, 50, 90, 95, 99]).tolist()
    return {
        "calls": len(milliseconds),
        "p50_ms": p50,
        "p90_ms": p90,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_ms": float(np.mean(milliseconds)),
        "spread": (p90 - p10) / p50,
        "sentences_per_second": 1000 * batch / p50,
    }


def difference(
    score: float, other: float, right: np.ndarray | None = None, other_right: np.ndarray | None = None
) -> Difference:
    """`score` less `other`, in points.

    right, other_right: (N,) whether each example was classified rightly, by both on the same examples: then the
        interval covers 95 % of resampled validation splits (paired percentile bootstrap). It says nothing about other
        seeds of training.
    """
    points = 100 * (score - other)
    if right is None or other_right is None or len(right) < 2:
        return Difference(points)
    change = 100 * (right.astype(np.float64) - other_right)
    # In batches: all resamples of a large task at once would fill the memory.
    found = stats.bootstrap((change,), np.mean, n_resamples=_RESAMPLES, batch=100, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Difference(points, float(low), float(high))
