"""Rows of measurements as a CSV file, and as a table that a person reads."""

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastkd.benchmarks.fastest_backends import orders_by_replay
from fastkd.benchmarks.harness import PHASES
from fastkd.whole_file import whole_file

COLUMNS = [
    "op", "shape", "length", "tokens", "dtype", "width", "provider", "role", "status",
    *(f"{phase}{part}_ms" for phase in PHASES for part in ("", "_p20", "_p80")),
    "replay_status", "rounds", "peak_extra_bytes", "loss_error", "gradient_error",
    "fraction_of_limit", "limit", "limit_goal", "compared_with", "multiple", "goal",
    "allocator", "load", "anyway", "date", "device", "cpu", "cpu_capability", "threads", "platform", "python", "torch",
    "triton", "fastkd", "commit",
]  # fmt: skip
_HEADINGS = dict(
    zip(PHASES, ("forward", "backward", "both", "no grad", "both, replayed", "no grad, replayed"), strict=True)
)


def write_csv(path: Path, rows: list[dict]) -> None:
    """All rows at once: a run that is stopped leaves the file of the run before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row | {"shape": json.dumps(row["shape"])} for row in rows)


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
    """The row that ratios are taken against: the fastest backend of fastkd, by replay where any is replayed."""
    timed = [row for row in rows if row["role"] == "fastkd" and "both_ms" in row]
    phase = "replay_ms" if any("replay_ms" in row for row in timed) else "both_ms"
    return min((row for row in timed if phase in row), key=lambda row: row[phase], default=None)


def ratios(rows: list[dict], phases: tuple[str, ...] = ("replay", "both")) -> dict[str, float]:
    """How many times as long as fastkd each provider of one case takes, in the first of the phases that both have."""
    own = fastest_fastkd(rows)
    relative = {}
    for row in rows if own else ():
        phase = next((f"{name}_ms" for name in phases if f"{name}_ms" in row and f"{name}_ms" in own), None)
        if phase is not None:
            relative[row["provider"]] = row[phase] / own[phase]
    return relative


def losses_of(rows: list[dict]) -> list[str]:
    """One sentence for every baseline that is faster than fastkd at the training step or at evaluation."""
    sentences = []
    for group in by_case(rows):
        own = fastest_fastkd(group)
        for row in group if own else ():
            for phase in ("both", "no_grad", "replay", "replay_no_grad") if row["role"] == "baseline" else ():
                theirs, ours = row.get(f"{phase}_ms"), own.get(f"{phase}_ms")
                if theirs is not None and ours is not None and theirs < ours:
                    sentences.append(
                        f"{title_of(row)}, {phase}: {row['provider']} {theirs:.3g} ms, {own['provider']} {ours:.3g} ms"
                    )
    return sentences


def shares_of_the_limit(rows: list[dict]) -> list[str]:
    """One sentence for every case with a goal for it: how much faster the limit is, and how near fastkd comes to it."""
    sentences = []
    for group in by_case(rows):
        own = fastest_fastkd(group)
        if own is not None and own.get("limit_goal") is not None:
            relative, share = ratios(group), own["fraction_of_limit"]
            faster = ", ".join(
                f"{relative[row['provider']] / share:.2f}× over {row['provider']}"
                for row in group
                if row["role"] == "baseline" and row["provider"] in relative
            )
            sentences.append(
                f"{title_of(own)}: {own['limit']} {faster}; {own['provider']} has {share:.0%} of that speed"
                f" (goal: {own['limit_goal']:.0%})"
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
    _print_list(console, "The limit:", shares_of_the_limit(quoted))
    _print_list(console, "The fastest backend by replay:", orders_by_replay(quoted))
    _print_list(console, "[bold]fastkd is slower here:[/bold]", slower := losses_of(quoted))
    if not slower and any(ratios(group) for group in by_case(quoted)):
        evaluated = any("no_grad_ms" in row for row in quoted)
        console.print(f"fastkd is faster in every case{', also without grad' if evaluated else ''}.")


def _print_list(console: Console, heading: str, sentences: list[str]) -> None:
    if sentences:
        console.print(heading)
    for sentence in sentences:
        console.print(f"  {sentence}", highlight=False, soft_wrap=True)


def _medians(group: list[dict]) -> Table:
    table = Table(title=f"{group[0]['op']}: {title_of(group[0])}", title_justify="left")
    table.add_column("provider", no_wrap=True)
    phases = [phase for phase in PHASES if any(f"{phase}_ms" in row for row in group)]
    for heading in (*(f"{_HEADINGS[phase]} ms" for phase in phases), "peak extra MB", "largest error"):
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
            row["provider"], *(f"{row[f'{phase}_ms']:.3g}" if f"{phase}_ms" in row else "" for phase in phases),
            f"{row['peak_extra_bytes'] / 1e6:.1f}", f"{max(errors):.1e}" if errors else "",
            *([_multiple(row)] if unit is not None else []),
        )  # fmt: skip
    table.caption = "\n".join(
        f"{row['provider']}: {row['replay_status']}" for row in group if row.get("replay_status", "ok") != "ok"
    )
    return table


def _multiples(rows: list[dict]) -> dict[str, float]:
    return {row["provider"]: row["multiple"] for row in rows if "multiple" in row}


def _multiple(row: dict) -> str:
    goal = "" if row["goal"] is None else f" (≤ {row['goal']:.2g})"
    return f"{row['multiple']:.2f}{goal}"


def _ratios_of_all(measured: dict[str, list[dict]]) -> Table:
    quoted, *others = measured
    first_row = measured[quoted][0]
    what, beside, views = "both", "", [(rows, ("replay", "both")) for rows in measured.values()]
    if any("replay_ms" in row for row in measured[quoted]):
        what, beside = "both by replay", " (in brackets: as the host launches it)"
        views.append((measured[quoted], ("both",)))
    elif others:
        beside = f" (in brackets: {', '.join(others)} malloc)"
    units = dict.fromkeys(row.get("compared_with", "fastkd") for row in measured[quoted])
    table = Table(
        title=f"{what}, as a multiple of the time of {' or '.join(units)}; {quoted}{beside}", title_justify="left"
    )
    for heading in (*first_row["shape"], "dtype"):
        table.add_column(heading)
    names = list(dict.fromkeys(row["provider"] for row in measured[quoted]))
    for name in names:
        table.add_column(name, justify="right")
    for groups in zip(*(by_case(rows) for rows, _ in views), strict=True):
        relative = [_multiples(group) or ratios(group, views[i][1]) for i, group in enumerate(groups)]
        cells = []
        for name in names:
            first, *rest = (f"{of[name]:.2f}" if name in of else "" for of in relative)
            cells.append(f"{first} ({', '.join(rest)})" if any(rest) else first)
        table.add_row(*map(str, groups[0][0]["shape"].values()), groups[0][0]["dtype"], *cells)
    return table
