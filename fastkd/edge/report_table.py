"""A report as tables: on the terminal, and in Markdown for a model card."""

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd.edge.report_schema import Cell, Difference, Report, Row

PLOTS = {
    "accuracy_latency.png": "accuracy against latency",
    "accuracy_bytes.png": "accuracy against bytes",
    "latency_length.png": "latency against length",
}


@dataclass(frozen=True)
class _Grid:
    title: str
    columns: list[str]
    rows: list[list[str]]


def show(report: Report) -> None:
    """Print a report's tables and its warnings."""
    for grid in _grids(report):
        table = Table(box=box.SIMPLE, title=grid.title, title_justify="left")
        for i, column in enumerate(grid.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in grid.rows:
            table.add_row(*map(escape, row))
        show_whole(table)
    show_warnings(report.warnings)


def show_whole(table: Table) -> None:
    """Print a table as wide as it is: folded to a narrow terminal or to a log's 80 columns nobody can read it."""
    natural = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, natural)).print(table)


def show_warnings(warnings: list[str]) -> None:
    """Print one line for each."""
    for warning in warnings:
        Console(soft_wrap=True).print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def to_markdown(report: Report, plots: list[str]) -> str:
    """The same for a model card, with links to `plots`, names of files beside it."""
    machine, settings = report.machine, report.settings
    lines = ["## Measured", ""]
    for grid in _grids(report):
        lines += [f"**{grid.title}**", "", _line(grid.columns), _line(["---", *["---:"] * (len(grid.columns) - 1)])]
        lines += [*map(_line, grid.rows), ""]
    if report.warnings:
        lines += ["**What these figures do not say**", "", *(f"- {_escaped(text)}" for text in report.warnings), ""]
    lines += [f"![{PLOTS[name]}]({name})" for name in plots]
    load = "" if machine.load_average is None else f", load average {machine.load_average:.2f}"
    lines += [
        "" if plots else None,
        f"{machine.cpu} ({', '.join(machine.features) or 'features not known'}), {machine.cores} cores{load}, "
        f"{machine.platform}. " + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
        "",
        f"Each artifact in a process of its own, threads fixed, artifacts in turns, {settings['rounds']} rounds; times "
        "are milliseconds of a call, medians (p50) and percentiles over all calls. Cold start is from the start of the "
        "process, with the files in the system's cache. Made by `fastkd report`, "
        f"schema {report.schema}, {report.created}.",
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _grids(report: Report) -> list[_Grid]:
    grids = [_sizes(report), _latencies(report), _processes(report)]
    return [_scores(report), *grids] if report.settings["task"] else grids


def _scores(report: Report) -> _Grid:
    names = list(
        dict.fromkeys(name for row in report.artifacts for name in (row.accuracy and row.accuracy.metrics) or ())
    )
    task = report.settings["task"]
    examples = max((row.accuracy.examples for row in report.artifacts if row.accuracy), default=0)
    return _Grid(
        f"{task}, {examples:,} validation examples; scores times 100, differences in points with their 95 % interval",
        ["artifact", *names, "to the teacher", "to its fp32 self"],
        [
            [
                row.name,
                *(_number(row.accuracy, lambda of, name=name: _percent(of.metrics, name), "{:.2f}") for name in names),
                _difference(row.accuracy and row.accuracy.against_teacher),
                _difference(row.accuracy and row.accuracy.against_fp32),
            ]
            for row in report.artifacts
        ],
    )


def _sizes(report: Report) -> _Grid:
    parts = ["embedding", "encoder", "head", "other"]
    return _Grid(
        "bytes on disk (MB) and parameters (million)",
        ["artifact", "format", "precision", "MB", "smaller", *parts, "stored", "effective"],
        [
            [
                row.name,
                row.format,
                row.precision,
                _megabytes(row.bytes["total"]),
                f"{row.smaller:.1f}×",
                *(_megabytes(row.bytes[part]) for part in parts),
                *(f"{row.parameters[name] / 1e6:.2f}" for name in ("stored", "effective")),
            ]
            for row in report.artifacts
        ],
    )


def _latencies(report: Report) -> _Grid:
    columns: dict[str, Callable[[Cell], str]] = {
        "p50": lambda cell: _number(cell, lambda of: of.p50_ms, "{:.2f}"),
        "p90": lambda cell: _number(cell, lambda of: of.p90_ms, "{:.2f}"),
        "p95": lambda cell: _number(cell, lambda of: of.p95_ms, "{:.2f}"),
        "p99": lambda cell: _number(cell, lambda of: of.p99_ms, "{:.2f}"),
        "mean": lambda cell: _number(cell, lambda of: of.mean_ms, "{:.2f}"),
        "faster": lambda cell: _number(cell, lambda of: of.speedup, "{:.2f}×"),
        "sentences/s": lambda cell: _number(cell, lambda of: of.sentences_per_second, "{:,.0f}"),
        "tokenise": lambda cell: _number(cell, lambda of: of.tokenize_ms, "{:.2f}"),
        "spread": lambda cell: _number(cell, lambda of: of.spread, "{:.0%}"),
    }
    keys = [cell.key for cell in report.teacher.cells]
    return _Grid(
        "latency (ms per call)",
        ["artifact", "batch", "length", "threads", *columns],
        [
            [row.name, *map(str, key), *(show(row.cell(key)) for show in columns.values())]
            for key in keys
            for row in report.artifacts
        ],
    )


def _processes(report: Report) -> _Grid:
    def cells_of(row: Row, threads: int) -> list[str]:
        process = row.process(threads)
        return [
            *(
                _number(process, lambda of, name=name: getattr(of, name), "{:.2f}")
                for name in ("cold_start_s", "import_s", "load_s")
            ),
            *(_megabytes(process and getattr(process, name)) for name in ("memory_peak_bytes", "memory_imports_bytes")),
        ]

    return _Grid(
        "cold start (s) and memory (MB)",
        ["artifact", "runtime", "threads", "cold start", "of it imports", "load", "peak memory", "of it imports"],
        [
            [row.name, row.runtime or "", str(threads), *cells_of(row, threads)]
            for threads in report.settings["threads"]
            for row in report.artifacts
        ],
    )


def _number(of, value: Callable, form: str) -> str:
    """A figure; "failed" or "not run" in its place where there is none."""
    found = None if of is None else value(of)
    if found is not None:
        return form.format(found)
    failed = "not run" if of is None else of.failed
    return "" if failed is None else "not run" if failed == "not run" else "failed"


def _percent(metrics: dict[str, float], name: str) -> float | None:
    return 100 * metrics[name] if name in metrics else None


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    interval = "" if difference.low is None else f" ({difference.low:+.2f} to {difference.high:+.2f})"
    return f"{difference.points:+.2f}{interval}"


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:,.2f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
