"""The official metrics of GLUE and JGLUE, by scikit-learn and SciPy, as plain floats between -1 and 1.

Where a metric is undefined because every prediction (or every label) is the same, it is 0 and the log says why: a
collapsed model is a bad model, and NaN would poison means and the choice of the best checkpoint.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk

log = logging.getLogger(__name__)


def _correlation(name: str, function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        for what, values in (("prediction", predictions), ("label", labels)):
            if np.ptp(values) == 0:
                log.warning("%s is undefined when every %s is the same (%g); reported as 0", name, what, values[0])
                return 0.0
        return float(function(predictions, labels).statistic)

    return metric


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    if np.ptp(predictions) == 0:
        log.warning("matthews is undefined when every prediction is the same (%d); reported as 0", predictions[0])
    return float(sk.matthews_corrcoef(labels, predictions))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda labels, predictions: float(sk.accuracy_score(labels, predictions)),
    "balanced_accuracy": lambda labels, predictions: float(
        sk.recall_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0)
    ),
    "f1": lambda labels, predictions: float(sk.f1_score(labels, predictions, pos_label=1, zero_division=0)),
    "matthews": _matthews,
    "pearson": _correlation("pearson", stats.pearsonr),
    "spearman": _correlation("spearman", stats.spearmanr),
}


def score(names: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The named metrics of (N,) predictions (class indices, or values for a regression) against (N,) labels.

    Raises:
        ValueError: an unknown metric, shapes that differ, no example, or a prediction that is NaN or infinite.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ValueError(f"predictions have shape {predictions.shape} and labels {labels.shape}; both must be (N,)")
    if not len(labels):
        raise ValueError("there is no example to score")
    bad = np.flatnonzero(~np.isfinite(predictions))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(labels)} predictions are NaN or infinite, the first at row {bad[0]}")
    if predictions.dtype.kind == "f":  # half precision is too coarse for sums of squares
        predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    return {name: METRICS[name](labels, predictions) for name in names}
