"""Which code to take for a number of bytes, or for a drop that may be afforded: codes of many settings, their bytes and
what they cost, and the Pareto front between the two."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastkd.embeddings.code import SparseCode


@dataclass(frozen=True)
class Candidate:
    """One setting of the fit and what came of it.

    setting: the arguments that `SparseCode.fit` was given beside table, counts and special ids.
    nbytes: bytes of the coded table.
    quality: more is better: a score on held-out examples, or minus the reconstruction error.
    """

    setting: dict
    nbytes: int
    quality: float


def sweep(
    settings: Iterable[dict], fit: Callable[..., SparseCode], quality: Callable[[SparseCode], float]
) -> list[Candidate]:
    """Fit and judge a code for each setting, by ascending bytes.

    fit: called with a setting's entries as keywords.
    quality: the larger the better; called once per code.
    """
    candidates = []
    for setting in tqdm(list(settings), desc="codes", unit="code"):
        code = fit(**setting)
        candidates.append(Candidate(setting, code.nbytes, quality(code)))
    return sorted(candidates, key=lambda candidate: (candidate.nbytes, -candidate.quality))


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """Those for which no other is as small and as good, by ascending bytes."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.nbytes, -candidate.quality)):
        if not front or candidate.quality > front[-1].quality:
            front.append(candidate)
    return front


def best_within(candidates: list[Candidate], nbytes: int) -> Candidate:
    """The best of at most `nbytes`, the smallest if several are as good. Raises ValueError where none is so small."""
    fitting = [candidate for candidate in pareto_front(candidates) if candidate.nbytes <= nbytes]
    if not fitting:
        least = min(candidate.nbytes for candidate in candidates)
        raise ValueError(f"budget={nbytes:,} bytes: the smallest code tried has {least:,} bytes")
    return fitting[-1]


def smallest_above(candidates: list[Candidate], quality: float) -> Candidate:
    """The smallest that is at least as good as `quality`. Raises ValueError where none is."""
    good = [candidate for candidate in pareto_front(candidates) if candidate.quality >= quality]
    if not good:
        best = max(candidate.quality for candidate in candidates)
        raise ValueError(f"no code tried reaches {quality:.4g}; the best has {best:.4g}")
    return good[0]


def plot_front(
    candidates: list[Candidate], chosen: Candidate, path: Path, *, label: str, dense: Candidate | None = None
) -> None:
    """Write a PNG of quality against bytes: every candidate, the front as a line, the chosen one and the dense table.

    label: what `quality` is, for the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    front = pareto_front(candidates)
    for points, style in (
        (candidates, {"marker": ".", "linestyle": "", "color": "0.6", "label": "tried"}),
        (front, {"marker": "o", "markersize": 4, "drawstyle": "steps-post", "label": "Pareto front"}),
        ([chosen], {"marker": "*", "linestyle": "", "markersize": 14, "label": "chosen"}),
    ):
        axes.plot([point.nbytes / 1e6 for point in points], [point.quality for point in points], **style)
    if dense is not None:
        axes.axhline(dense.quality, color="black", linewidth=1, label=f"dense, {dense.nbytes / 1e6:.3g} MB")
    axes.set(xlabel="bytes of the table (MB)", ylabel=label, xscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def reconstruction_error(weight: Tensor, code: SparseCode, counts: Tensor) -> float:
    """Relative error of the rows as a text meets them, √(Σ c_t ‖e_t − ê_t‖² / Σ c_t ‖e_t‖²).

    weight: (V, D) the table that was coded. counts: (V,) how often each token stands in the text.
    """
    weight, counts = weight.detach().float(), counts.to(weight.device, torch.float64)
    missed = (weight - code.dense().to(weight.device)).square().sum(1).double()
    return float(((counts @ missed) / (counts @ weight.square().sum(1).double())).sqrt())
