"""Plots of measured rows: time, memory and fraction of the limit against length, and ratios as bars."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from fastkd.benchmarks.report import by_case, ratios, title_of


def save_plots(rows: list[dict], folder: Path, stem: str) -> list[Path]:
    """Write STEM-time.png, STEM-memory.png and STEM-ratio.png from rows of one allocator, and STEM-limit.png where they
    have a fraction of the limit; returns the paths.
    """
    import matplotlib

    matplotlib.use("Agg")
    timed = [row for row in rows if "both_ms" in row]
    if not timed:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    limited = [row for row in timed if "fraction_of_limit" in row]
    return [
        _against_length(timed, lambda row: 1e3 * row["both_ms"] / row["tokens"], "µs per valid token",
                        folder / f"{stem}-time.png"),
        _against_length(timed, lambda row: row["peak_extra_bytes"] / row["tokens"], "peak extra bytes per valid token",
                        folder / f"{stem}-memory.png"),
        _ratio_bars(timed, folder / f"{stem}-ratio.png"),
        *([_against_length(limited, lambda row: row["fraction_of_limit"], "fraction of the limit",
                           folder / f"{stem}-limit.png", yscale="linear")] if limited else []),
    ]  # fmt: skip


def _against_length(
    rows: list[dict], value: Callable[[dict], float], label: str, path: Path, yscale: str = "log"
) -> Path:
    """One panel for each combination of the other dimensions; per token, so that the batch may differ."""
    from matplotlib import pyplot

    panels = defaultdict(lambda: defaultdict(list))
    for row in rows:
        other = {name: size for name, size in row["shape"].items() if name not in ("length", "sequences")}
        title = ", ".join(f"{name} {size}" for name, size in other.items()) + f", {row['dtype']}"
        panels[title][row["provider"]].append((row["length"], value(row)))
    columns = min(4, len(panels))
    lines_of_panels = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines_of_panels, columns, figsize=(4.5 * columns, 3.6 * lines_of_panels), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.flat, sorted(panels.items()), strict=False):
        for provider, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="length", ylabel=label, yscale=yscale)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0 if yscale == "linear" else None)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return _saved(figure, path)


def _ratio_bars(rows: list[dict], path: Path) -> Path:
    from matplotlib import pyplot

    cases = [(title_of(group[0]), ratios(group)) for group in by_case(rows) if ratios(group)]
    providers = list(dict.fromkeys(row["provider"] for row in rows if row["role"] == "baseline"))
    figure, axis = pyplot.subplots(figsize=(10, 2 + 0.16 * len(cases) * (len(providers) + 1)), layout="constrained")
    for nth, provider in enumerate(providers):
        places = [case * (len(providers) + 1) + nth for case in range(len(cases))]
        axis.barh(places, [relative.get(provider, 0) for _, relative in cases], height=0.9, label=provider)
    middles = [case * (len(providers) + 1) + (len(providers) - 1) / 2 for case in range(len(cases))]
    axis.set_yticks(middles, [title for title, _ in cases], fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xlabel="time, forward and backward, as a multiple of fastkd's (below 1 fastkd loses)")
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    return _saved(figure, path)


def _saved(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
