"""Rows of measurements as a CSV file, and as a table that a person reads."""

import csv
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastkd.benchmarks.harness import PHASES

COLUMNS = [
    "op", "shape", "length", "tokens", "dtype", "provider", "role", "status",
    *(f"{phase}{part}_ms" for phase in PHASES for part in ("", "_p20", "_p80")),
    "rounds", "peak_extra_bytes", "loss_error", "gradient_error", "fraction_of_limit",
    "compared_with", "multiple", "goal",
    "allocator", "load", "anyway", "date", "device", "cpu", "cpu_capability", "threads", "platform", "python", "torch",
    "triton", "fastkd", "commit",
]  # fmt: skip


def write_csv(path: Path, rows: list[dict]) -> None:
    """All rows at once: a run that is stopped leaves the file of the run before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row | {"shape": json.dumps(row["shape"])} for row in rows)
    os.replace(unfinished, path)


def case_of(row: dict) -> tuple:
    return row["op"], tuple(row["shape"].items()), row["dtype"]


def title_of(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["shape"].items()) + f", {row['dtype']}"


def by_case(rows: list[dict]) -> list[list[dict]]:
    """Rows of one shape and dtype together, in the order in which they were measured."""
    cases = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    return list(cases.values())


def fastest_fastkd(rows: list[dict]) -> dict | None:
    """The row that ratios are taken against: the fastest backend of fastkd in these rows."""
    timed = [row for row in rows if row["role"] == "fastkd" and "both_ms" in row]
    return min(timed, key=lambda row: row["both_ms"], default=None)


def ratios(rows: list[dict]) -> dict[str, float]:
    """How many times as long as fastkd each provider of one case takes for forward and backward."""
    own = fastest_fastkd(rows)
    return {row["provider"]: row["both_ms"] / own["both_ms"] for row in rows if own and "both_ms" in row}


def losses_of(rows: list[dict]) -> list[str]:
    """One sentence for every baseline that is faster than fastkd at the training step or at evaluation."""
    sentences = []
    for group in by_case(rows):
        own = fastest_fastkd(group)
        for row in group if own else ():
            for phase in ("both", "no_grad") if row["role"] == "baseline" and "both_ms" in row else ():
                theirs, ours = row.get(f"{phase}_ms"), own.get(f"{phase}_ms")
                if theirs is not None and theirs < ours:
                    sentences.append(
                        f"{title_of(row)}, {phase}: {row['provider']} {theirs:.3g} ms, {own['provider']} {ours:.3g} ms"
                    )
    return sentences


def print_tables(rows: list[dict], allocators: list[str], console: Console | None = None) -> None:
    """A table of medians for each case under the first allocator, then the ratios of all cases under each."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 160
    measured = {name: [row for row in rows if row["allocator"] == name] for name in allocators}
    quoted = measured[allocators[0]]
    for group in by_case(quoted):
        console.print(_medians(group))
    console.print(_ratios_of_all(measured))
    slower = losses_of(quoted)
    console.print(
        "[bold]fastkd is slower here:[/bold]" if slower else "fastkd is faster in every case, also without grad."
    )
    for sentence in slower:
        console.print(f"  {sentence}", highlight=False)


def _medians(group: list[dict]) -> Table:
    table = Table(title=f"{group[0]['op']}: {title_of(group[0])}", title_justify="left")
    table.add_column("provider", no_wrap=True)
    for heading in ("forward ms", "backward ms", "both ms", "no grad ms", "peak extra MB", "largest error"):
        table.add_column(heading, justify="right")
    unit = next((row["compared_with"] for row in group if "multiple" in row), None)
    if unit is not None:
        table.add_column(f"of {unit} (goal)", justify="right")
    for row in group:
        if row["status"] != "ok":
            table.add_row(row["provider"], f"[red]{row['status']}[/red]")
            continue
        errors = [row[name] for name in ("loss_error", "gradient_error") if name in row]
        table.add_row(
            row["provider"], *(f"{row[f'{phase}_ms']:.3g}" if f"{phase}_ms" in row else "" for phase in PHASES),
            f"{row['peak_extra_bytes'] / 1e6:.1f}", f"{max(errors):.1e}" if errors else "",
            *([_multiple(row)] if unit is not None else []),
        )  # fmt: skip
    return table


def _multiples(rows: list[dict]) -> dict[str, float]:
    return {row["provider"]: row["multiple"] for row in rows if "multiple" in row}


def _multiple(row: dict) -> str:
    goal = "" if row["goal"] is None else f" (≤ {row['goal']:.2g})"
    return f"{row['multiple']:.2f}{goal}"


def _ratios_of_all(measured: dict[str, list[dict]]) -> Table:
    quoted, *others = measured
    first_row = measured[quoted][0]
    beside = f" (in brackets: {', '.join(others)} malloc)" if others else ""
    units = dict.fromkeys(row.get("compared_with", "fastkd") for row in measured[quoted])
    table = Table(
        title=f"both, as a multiple of the time of {' or '.join(units)}; {quoted}{beside}", title_justify="left"
    )
    for heading in (*first_row["shape"], "dtype"):
        table.add_column(heading)
    names = list(dict.fromkeys(row["provider"] for row in measured[quoted]))
    for name in names:
        table.add_column(name, justify="right")
    for groups in zip(*(by_case(rows) for rows in measured.values()), strict=True):
        relative = [_multiples(group) or ratios(group) for group in groups]
        cells = []
        for name in names:
            first, *rest = (f"{of[name]:.2f}" if name in of else "" for of in relative)
            cells.append(f"{first} ({', '.join(rest)})" if any(rest) else first)
        table.add_row(*map(str, groups[0][0]["shape"].values()), groups[0][0]["dtype"], *cells)
    return table
