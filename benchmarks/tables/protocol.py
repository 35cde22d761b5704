"""The protocol that every result table shares: cells on disk, means with their errors, paired bootstrap intervals.

A cell is one trained model, read once on one split: a line of JSON with its score and, example by example, whether it
was right (or its prediction, for scores). Choices are made on 5 % of train held out by seed 0; the validation split is
read once for each final model; every seed that was run counts.
"""

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.stats import bootstrap


class Cells:
    """Finished cells in a file of JSON lines. A cell is added whole, when it is finished."""

    def __init__(self, path: Path):
        self.path = path

    def all(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []

    def find(self, row: str, split: str) -> list[dict]:
        """The cells of a row, by seed."""
        return sorted((c for c in self.all() if (c["row"], c["split"]) == (row, split)), key=lambda c: c["seed"])

    def has(self, row: str, seed: int, split: str, settings: dict) -> bool:
        """Whether the cell is finished. A ValueError where it was made with other settings.

        On held-out data settings are compared: there a row has as many cells as settings were tried.
        """
        found = [c for c in self.find(row, split) if c["seed"] == seed]
        if split == "held-out":
            return any(c["settings"] == settings for c in found)
        if found and found[0]["settings"] != settings:
            raise ValueError(
                f"{self.path} holds {row!r} (seed {seed}) made with {found[0]['settings']}, asked for are {settings}: "
                "use those settings, or move the file away to start the table anew"
            )
        return bool(found)

    def add(self, row: str, seed: int, split: str, *, settings: dict, **record) -> None:
        """Of two commands that made the same cell the first one's stays."""
        if self.has(row, seed, split, settings):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cell = {"row": row, "seed": seed, "split": split} | record | {"settings": settings} | circumstances()
        line = json.dumps(cell)
        with self.path.open("a") as file:  # one write of one line: two commands may fill one table
            file.write(line + "\n")


def circumstances() -> dict:
    """On what and with what a cell was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def right(cells: Sequence[dict]) -> np.ndarray:
    """(seeds, examples) of 0 and 1 from cells that hold `correct`, a text of these digits."""
    return np.array([[int(digit) for digit in cell["correct"]] for cell in cells], dtype=float)


def mean_and_error(cells: Sequence[dict]) -> tuple[float, float]:
    """Mean score over the seeds in points, and its standard error (nan for one seed)."""
    scores = 100 * np.array([cell["score"] for cell in cells])
    return scores.mean(), scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")


def resampled(
    samples: Sequence[np.ndarray], statistic: Callable, resamples: int = 10_000, batch: int | None = None
) -> tuple[float, np.ndarray]:
    """`statistic(*samples, axis=-1)`, and its values over resampled examples, the same ones in every sample.

    samples: arrays (examples,). batch: resamples in memory at a time.
    """
    found = bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=batch,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(statistic(*samples, axis=-1)), found.bootstrap_distribution


def interval(distribution: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of resampled values."""
    low, high = np.percentile(distribution, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(rows: Sequence[Sequence[dict]], statistic, resamples: int = 10_000) -> tuple[float, float, float]:
    """`statistic` of the rows' accuracies, and its 95 % interval over resampled examples, the same for every row.

    Each example's correctness is averaged over a row's seeds first: the interval covers the choice of examples, not of
    seeds (three are too few to resample).
    """
    samples = [100 * right(cells).mean(0) for cells in rows]
    value, distribution = resampled(samples, lambda *s, axis=-1: statistic(*(x.mean(axis=axis) for x in s)), resamples)
    return value, *interval(distribution)


def paired_difference(
    metric: str, labels: np.ndarray, one: np.ndarray, other: np.ndarray, resamples: int = 10_000
) -> tuple[float, np.ndarray]:
    """How many points `one` scores above `other`, and the same over resampled examples.

    labels, one, other: (examples,) labels and two models' predictions. metric: accuracy, matthews or pearson.
    """
    score = _SCORES[metric]
    return resampled(
        (labels, one, other),
        lambda labels, one, other, axis: 100 * (score(labels, one, axis) - score(labels, other, axis)),
        resamples,
        batch=500,
    )


def _accuracy(labels: np.ndarray, predictions: np.ndarray, axis: int) -> np.ndarray:
    return (labels == predictions).mean(axis)


def _correlation(labels: np.ndarray, predictions: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's; of two classes this is Matthews'. 0 where all predictions (or labels) are the same."""
    labels, predictions = (x - x.mean(axis, keepdims=True) for x in (labels, predictions))
    norm = np.sqrt((labels**2).sum(axis) * (predictions**2).sum(axis))
    return (labels * predictions).sum(axis) / np.where(norm > 0, norm, 1)


_SCORES = {"accuracy": _accuracy, "matthews": _correlation, "pearson": _correlation}


def share_recovered(method, baseline, teacher):
    """Share of the gap between baseline and teacher that the method closes."""
    return (method - baseline) / (teacher - baseline)
