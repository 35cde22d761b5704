"""A report's figures. Drawn without pyplot, so that nothing global is touched and no display is needed."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastkd.edge.report_schema import Report, Row

_DPI = 120


def draw(report: Report, folder: Path) -> list[str]:
    """Draw what there are figures for; returns the names of the files."""
    batch, length, threads = report.main_cell()
    cell = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
    measured = {
        row.name: row.cell(report.main_cell()).p50_ms
        for row in report.artifacts
        if row.cell(report.main_cell()).p50_ms is not None
    }
    sizes = {row.name: row.bytes["total"] / 1e6 for row in report.artifacts}
    drawn = []
    if any(row.metric is not None and row.name in measured for row in report.artifacts):
        label = f"p50 latency of {length} tokens, {cell} (ms)"
        drawn.append(_accuracy_against(report, measured, label, folder / "accuracy_latency.png"))
    if any(row.metric is not None for row in report.artifacts):
        drawn.append(_accuracy_against(report, sizes, "on disk (MB)", folder / "accuracy_bytes.png"))
    if measured:
        drawn.append(_latency_against_length(report, cell, folder / "latency_length.png"))
    return drawn


def _accuracy_against(report: Report, x: dict[str, float], label: str, path: Path) -> str:
    figure, axes = _figure()
    for i, row in enumerate(report.artifacts):
        if row.metric is not None and row.name in x:
            axes.plot(x[row.name], 100 * row.metric, _marker(i), label=row.name)
    metric = next(name for row in report.artifacts if row.metric is not None for name in row.accuracy.metrics)
    axes.set(xscale="log", xlabel=label, ylabel=f"{report.settings['task']} {metric} (%)")
    return _saved(figure, axes, path)


def _latency_against_length(report: Report, cell: str, path: Path) -> str:
    figure, axes = _figure()
    batch, _, threads = report.main_cell()
    for i, row in enumerate(report.artifacts):
        axes.plot(*_by_length(row, batch, threads), f"{_marker(i)}-", label=row.name)
    axes.set(yscale="log", xlabel="length (tokens)", ylabel=f"p50 latency, {cell} (ms)")
    return _saved(figure, axes, path)


def _by_length(row: Row, batch: int, threads: int) -> tuple[list[int], list[float]]:
    cells = [cell for cell in row.cells if (cell.batch, cell.threads) == (batch, threads) and cell.p50_ms is not None]
    return [cell.length for cell in cells], [cell.p50_ms for cell in cells]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    return figure, figure.subplots()


def _marker(i: int) -> str:
    return "osD^vPX*<>"[i % 10]


def _saved(figure: Figure, axes: Axes, path: Path) -> str:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)
    return path.name
