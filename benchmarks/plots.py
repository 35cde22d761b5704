"""Plots of measured rows: time and memory against length, and ratios as bars."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from fastkd.benchmarks.report import by_case, ratios, title_of


def save_plots(rows: list[dict], folder: Path, stem: str) -> list[Path]:
    """Write STEM-time.png, STEM-memory.png and STEM-ratio.png from rows of one allocator; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    timed = [row for row in rows if "both_ms" in row]
    if not timed:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _against_length(timed, lambda row: 1e3 * row["both_ms"] / row["tokens"], "µs per valid token",
                        folder / f"{stem}-time.png"),
        _against_length(timed, lambda row: row["peak_extra_bytes"] / row["tokens"], "peak extra bytes per valid token",
                        folder / f"{stem}-memory.png"),
        _ratio_bars(timed, folder / f"{stem}-ratio.png"),
    ]  # fmt: skip


def _against_length(rows: list[dict], value: Callable[[dict], float], label: str, path: Path) -> Path:
    """One panel for each combination of the other dimensions; per token, so that the batch may differ."""
    from matplotlib import pyplot

    panels = defaultdict(lambda: defaultdict(list))
    for row in rows:
        other = {name: size for name, size in row["shape"].items() if name not in ("length", "sequences")}
        title = ", ".join(f"{name} {size}" for name, size in other.items()) + f", {row['dtype']}"
        panels[title][row["provider"]].append((row["length"], value(row)))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], sorted(panels.items()), strict=True):
        for provider, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
        axis.set(
            title=title, xlabel="length", ylabel=label, xscale="log", yscale="symlog" if "bytes" in label else "log"
        )
        axis.title.set_fontsize(8)
    axes[0][-1].legend(fontsize=8)
    return _saved(figure, path)


def _ratio_bars(rows: list[dict], path: Path) -> Path:
    from matplotlib import pyplot

    bars = [
        (f"{title_of(row)}: {row['provider']}", ratios(group)[row["provider"]])
        for group in by_case(rows)
        for row in group
        if row["role"] == "baseline" and row["provider"] in ratios(group)
    ]
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(bars)), layout="constrained")
    axis.barh([name for name, _ in bars], [ratio for _, ratio in bars])
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xlabel="times as long as fastkd, forward and backward (left of the line fastkd loses)")
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    return _saved(figure, path)


def _saved(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
