"""The finished cells of sparse-coded embeddings as Markdown tables and a plot."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fastkd.benchmarks.tables.protocol import Cells, interval, paired_difference
from fastkd.benchmarks.tables.stored_embeddings import METHODS, candidates

SUBJECTS = {"sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B", "arc": "ARC student (SST-2)"}
AVERAGED = ("sst2", "mrpc", "stsb")  # of CoLA the teacher knows too little
RATIOS = (14, 6, 28, 20, 3.9)  # times fewer bytes than the dense table; in this order they are made
GRID_KEPT, GRID_ATOMS = (0.05, 0.1, 0.2, 0.3, 0.5), (4, 8, 16)
_PAIRS = (
    ("sparse", "unknown"),
    ("sparse", "svd"),
    ("sparse", "random"),
    ("sparse", "pq"),
    ("residual", "sparse"),
    ("residual", "pq"),
    ("residual", "pq_rare"),
    ("pq_rare", "pq"),
)
NOT_RUN, TOO_SMALL = "not run", "does not fit"


def encoded(predictions: np.ndarray) -> str | list[float]:
    """Predictions for a line of JSON: a digit for each class, scores to three decimals."""
    if predictions.dtype.kind == "f":
        return [round(float(value), 3) for value in predictions]
    return "".join(str(int(value)) for value in predictions)


def decoded(predictions: str | list[float]) -> np.ndarray:
    """(examples,) of what `encoded` wrote."""
    return np.array([float(value) for value in predictions])


class Finished:
    """The cells by row, each read once."""

    def __init__(self, cells: Cells):
        self._rows = {cell["row"]: cell for cell in cells.all() if cell["split"] == "validation"}

    def cell(self, row: str) -> dict | None:
        return self._rows.get(row)

    def drop(self, subject: str, rest: str) -> float | None:
        """Points lost, None where a cell is missing."""
        dense, cell = self.cell(f"{subject}/dense"), self.cell(f"{subject}/{rest}")
        return None if dense is None or cell is None else 100 * (dense["score"] - cell["score"])

    def mean_drop(self, rest: str, subjects: Sequence[str] = AVERAGED) -> float | None:
        drops = [self.drop(subject, rest) for subject in subjects]
        return None if None in drops else float(np.mean(drops))

    def missing(self, subject: str, method: str, ratio: float) -> str:
        """What stands in the place of a score that is not there."""
        dense = self.cell(f"{subject}/dense")
        if dense is not None and not candidates(method, *dense["table"], int(dense["bytes"] / ratio), dense["special"]):
            return TOO_SMALL
        return NOT_RUN

    def difference(self, subject: str, one: str, other: str) -> tuple[float, np.ndarray] | None:
        """Points by which a subject's cell `one` scores above `other`, and the same over resampled examples."""
        dense, *two = (self.cell(f"{subject}/{rest}") for rest in ("dense", one, other))
        if dense is None or None in two:
            return None
        return paired_difference(
            dense["metric"], decoded(dense["labels"]), *(decoded(cell["predictions"]) for cell in two)
        )


def show(cells: Cells) -> str:
    """All tables as Markdown."""
    done = Finished(cells)
    parts = [_goals(done), *(_scores(done, ratio) for ratio in sorted(RATIOS)), _comparisons(done)]
    return "\n\n".join([*parts, _grid(done), _general(done), _japanese(done), _choices(cells)])


def _number(value: float | None, form: str = ".1f") -> str:
    return NOT_RUN if value is None else f"{value:{form}}"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _goals(done: Finished) -> str:
    rows = []
    for what, rest in (
        ("10 % kept, k = 8, fp16", "kept 0.1/8"),
        ("30 % kept, k = 8, fp16", "kept 0.3/8"),
        *(
            (f"{METHODS[method]}, {ratio}x", f"{method}/{ratio}")
            for method in ("residual", "pq_rare", "pq")
            for ratio in (14, 20, 28)
        ),
    ):
        cell, dense = done.cell(f"sst2/{rest}"), done.cell("sst2/dense")
        times = _number(dense["bytes"] / cell["bytes"] if cell and dense else None)
        drops = [_number(done.drop(subject, rest), "+.2f") for subject in SUBJECTS]
        means = [_number(done.mean_drop(rest, s), "+.2f") for s in (AVERAGED, ("cola", *AVERAGED))]
        rows.append([what, times, *drops, *means])
    heads = ["points lost", "times fewer bytes", *SUBJECTS.values(), "mean without CoLA", "mean with CoLA"]
    return _table("Points lost", heads, rows)


def _scores(done: Finished, ratio: float) -> str:
    dense = [done.cell(f"{subject}/dense") for subject in SUBJECTS]
    rows = [["dense table", *(_number(cell and 100 * cell["score"]) for cell in dense), "", "1.0", "1.0"]]
    for method, name in METHODS.items():
        found = [done.cell(f"{subject}/{method}/{ratio}") for subject in SUBJECTS]
        scores = [
            done.missing(subject, method, ratio) if cell is None else f"{100 * cell['score']:.1f}"
            for subject, cell in zip(SUBJECTS, found, strict=True)
        ]
        drop = done.mean_drop(f"{method}/{ratio}")
        made = next(((c, d) for c, d in zip(found, dense, strict=True) if c is not None), None)
        times = [f"{made[1]['bytes'] / made[0][size]:.1f}" if made else "" for size in ("bytes", "disk_bytes")]
        absent = TOO_SMALL if TOO_SMALL in scores else NOT_RUN
        rows.append([name, *scores, absent if drop is None else f"{drop:+.2f}", *times])
    heads = ["", *SUBJECTS.values(), "mean points lost", "times fewer bytes", "on disk"]
    size = f", {dense[0]['bytes'] / ratio / 1e6:.2f} MB" if dense[0] else ""
    return _table(f"At most 1/{ratio:g} of the bytes{size}", heads, rows)


def _comparisons(done: Finished) -> str:
    rows = []
    for one, other in _PAIRS:
        for ratio in sorted(RATIOS):
            found = [done.difference(s, f"{one}/{ratio}", f"{other}/{ratio}") for s in AVERAGED]
            if None in found:
                rows.append([f"{one} − {other}", f"{ratio:g}", NOT_RUN, "", ""])
                continue
            # Each task's examples are drawn on their own.
            mean = float(np.mean([value for value, _ in found]))
            low, high = interval(np.mean([distribution for _, distribution in found], axis=0))
            verdict = "better" if low > 0 else "worse" if high < 0 else "no significant difference"
            rows.append([f"{one} − {other}", f"{ratio:g}", f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", verdict])
    heads = ["", "times fewer bytes", "points, mean of three tasks", "95 % interval", ""]
    return _table("Which is better at equal bytes", heads, rows)


def _grid(done: Finished) -> str:
    rows = []
    for keep in GRID_KEPT:
        found = [done.cell(f"sst2/kept {keep}/{atoms}") for atoms in GRID_ATOMS]
        rows.append(
            [f"{keep:.0%}"]
            + [NOT_RUN if c is None else f"{100 * c['score']:.1f} ({c['bytes'] / 1e6:.2f} MB)" for c in found]
        )
    heads = ["kept", *(f"k = {atoms}" for atoms in GRID_ATOMS)]
    return _table("Kept rows and atoms: SST-2, fp16", heads, rows)


def _general(done: Finished) -> str:
    rows = []
    for subject, name in SUBJECTS.items():
        if subject != "arc":
            found = [done.cell(f"{subject}/kept 0.1/8{counted}") for counted in ("", "/general text")]
            shares = [_number(c and 100 * c["rare_share"]) for c in found]
            rows.append([name, *shares, *(_number(c and 100 * c["score"]) for c in found)])
    counted = ("task", "general text")
    heads = ["", *(f"rare tokens, %: {c}" for c in counted), *(f"score: {c}" for c in counted)]
    return _table("Where frequencies are counted: 10 % kept, k = 8, fp16", heads, rows)


def _japanese(done: Finished) -> str:
    rows = []
    for row, name in (
        ("sparse/0.1", "sparse code, 10 % kept"),
        ("random/0.1", "random neighbours, 10 % kept"),
        ("sparse/0.3", "sparse code, 30 % kept"),
        ("sparse/0.5", "sparse code, 50 % kept"),
    ):
        cell = done.cell(f"japanese/{row}")
        if cell is None:
            rows.append([name, NOT_RUN, *[""] * 6])
            continue
        shown = [cell[key] for key in ("error_of_coded_rows", "error_in_text", "cosine", "cosine_of_coded_tokens")]
        masked = " → ".join(f"{100 * cell[f'masked_accuracy_{when}']:.1f}" for when in ("before", "after"))
        times = f"{cell['dense_bytes'] / cell['bytes']:.1f}"
        rows.append([name, times, *(f"{v:.3f}" for v in shown), f"{100 * cell['rare_share']:.1f}", masked])
    heads = ["k = 8, fp16", "times fewer bytes", "error of a coded row", "error over the text", "cosine, all tokens"]
    heads += ["cosine, rare tokens", "rare tokens, %", "masked tokens right, %"]
    return _table("Japanese", heads, rows)


def _choices(cells: Cells) -> str:
    """What was read on held-out data, and what was chosen there."""
    read: dict[str, list[dict]] = {}
    for cell in cells.all():
        if cell["split"] == "held-out":
            read.setdefault(cell["row"], []).append(cell)
    rows = []
    for row, tried in sorted(read.items()):
        best = min(tried, key=lambda cell: cell["distance"])
        setting = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in best["settings"]["setting"].items()
        )
        others = " ".join(f"{cell['distance']:.3g}" for cell in tried)
        rows.append([row, str(len(tried)), setting, f"{best['distance']:.3g}", others])
    heads = ["subject/method/times fewer bytes", "tried", "chosen", "distance of its logits", "of all"]
    return _table("Chosen on held-out data", heads, rows or [[NOT_RUN, *[""] * 4]])


def plot_scores(cells: Cells, path: Path) -> None:
    """Write a PNG with a panel for each subject: score against bytes of the table, a line for each method."""
    done = Finished(cells)
    subjects = [subject for subject in SUBJECTS if done.cell(f"{subject}/dense")]
    if not subjects:
        return
    figure = Figure(figsize=(3.6 * len(subjects), 4.2), layout="constrained")
    for axis, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        dense = done.cell(f"{subject}/dense")
        axis.axhline(100 * dense["score"], color="black", linewidth=1, label=f"dense, {dense['bytes'] / 1e6:.3g} MB")
        for method, name in METHODS.items():
            found = [done.cell(f"{subject}/{method}/{ratio}") for ratio in sorted(RATIOS)]
            points = [(cell["bytes"] / 1e6, 100 * cell["score"]) for cell in found if cell]
            axis.plot(*(zip(*points, strict=True) if points else ((), ())), marker="o", markersize=3, label=name)
        axis.set(title=SUBJECTS[subject], xlabel="bytes of the table (MB)", xscale="log")
        axis.set_ylabel(dense["metric"])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
