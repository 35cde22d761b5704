"""Does an artifact stay within its budgets? For CI: every line that fails is told."""

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from fastkd.edge.artifact import open_artifact
from fastkd.edge.gate_budgets import Budgets
from fastkd.edge.gate_checks import Key, Line, check, named
from fastkd.edge.report_rows import digest
from fastkd.edge.report_run import measure_report
from fastkd.edge.report_schema import Report, Row, read_report
from fastkd.edge.report_settings import ReportSettings
from fastkd.edge.report_table import show_warnings, show_whole

_FRESH_CELL = (1, 128, 1)


@dataclass(frozen=True)
class Verdict:
    """The lines of a gate, those that passed and those that failed, and the report's warnings."""

    lines: list[Line]
    warnings: list[str]

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)


def gate(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    baseline: str | Path | None = None,
    mode: str = "eager",
    teacher: str | Path | None = None,
    task: str | None = None,
    data: str | Path | None = None,
    max_length: int = 128,
    **budgets,
) -> Verdict:
    """Hold an artifact against budgets, by a report or by measuring it now; prints and returns the verdict.

    Args:
        artifact: a model folder or an exported file.
        against: the report.json whose figures count. Its artifact is found by path, else by name, and must be the same
            file: one that has changed since is refused, as its figures are another's.
        baseline: a report.json to compare with, in relation to each report's own teacher, so that machines of different
            speed can share it; the artifact is found there by its name. Needs `max_ratio`.
        mode: in which a model folder was or is run.
        teacher, task, data, max_length: without `against`, what is measured beside the artifact.
        budgets: of `Budgets`: p50, p90, p95, p99, size, memory, max_drop, max_ratio, cell.

    Raises:
        ValueError: before anything is measured, for budgets that are none, a report of another schema version or
            without the artifact or cell, and an artifact that is not what the report measured.
    """
    limits = Budgets(**budgets)
    if (baseline is None) != (limits.max_ratio is None):
        raise ValueError("baseline and max_ratio go together: what to compare with, and how far it may be above it")
    before = None if baseline is None else read_report(baseline)
    if against is None:
        key = limits.cell or _FRESH_CELL
        settings = _settings(artifact, mode, teacher, task, data, max_length, limits, key)
        then = None if before is None else _found(before, baseline, artifact, mode, key)
        report = measure_report(settings)
        row = _found(report, "this measurement", artifact, mode, key)
    else:
        given = {"teacher": teacher, "task": task, "data": data}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{unused[0]}: {against} says what it was; leave it out, or leave out --against")
        report = read_report(against)
        key = limits.cell or report.main_cell()
        row = _found(report, against, artifact, mode, key)
        then = None if before is None else _found(before, baseline, artifact, mode, key)
        _check_unchanged(row, artifact, against)
    if before is not None and before.teacher.sha256 != report.teacher.sha256:
        raise ValueError(
            f"{baseline} was made with another teacher ({before.teacher.name}) than this report's "
            f"({report.teacher.name}); ratios to it do not compare"
        )
    lines = check(report, row, key, limits, None if before is None else (before, then))
    verdict = Verdict(lines, report.warnings)
    _show(verdict, row.name, key, limits.cell is None)
    return verdict


def _settings(artifact, mode, teacher, task, data, max_length: int, limits: Budgets, key: Key) -> ReportSettings:
    """What has to be measured where there is no report."""
    if limits.max_drop is not None and (teacher is None or task is None):
        raise ValueError("max_drop: without a report (--against) a teacher and a task are needed to measure it")
    if limits.max_ratio is not None and teacher is None:
        raise ValueError("max_ratio: without a report (--against) a teacher is needed to measure the ratio to it")
    batch, length, threads = key
    return ReportSettings(
        [artifact] if teacher is None else [teacher, artifact],
        task=task,
        data=data,
        max_length=max_length,
        batches=[batch],
        lengths=[length],
        threads=[threads],
        modes=[mode],
    )


def _found(report: Report, where: str | Path, artifact: str | Path, mode: str, key: Key) -> Row:
    """The artifact's row, by path and else by name; it has the cell `key`."""
    path = Path(artifact).expanduser().resolve()
    if not path.exists():
        raise ValueError(f"{artifact}: no such file or folder")
    run_so = [row for row in report.artifacts if row.mode in (None, mode)]
    rows = [row for row in run_so if Path(row.path).expanduser().resolve() == path]
    rows = rows or [row for row in run_so if Path(row.path).name == path.name]
    if len(rows) != 1:
        how = "no" if not rows else "more than one"
        what = f"{path.name} in mode {mode}" if path.is_dir() else path.name
        raise ValueError(f"{where} has {how} {what}; it has {', '.join(row.name for row in report.artifacts)}")
    [row] = rows
    if row.cell(key) is None:
        cells = "; ".join("{},{},{}".format(*cell.key) for cell in row.cells)
        raise ValueError(f"{where} has no cell {named(key)} (--cell); it has {cells}")
    return row


def _check_unchanged(row: Row, artifact: str | Path, against: str | Path) -> None:
    now = digest(open_artifact(artifact))
    if now != row.sha256:
        raise ValueError(
            f"{artifact} is not what {against} measured (sha256 {now[:12]} now, {row.sha256[:12]} then): run "
            "`fastkd report` again, or leave out --against to measure it now"
        )


def _show(verdict: Verdict, name: str, key: Key, by_default: bool) -> None:
    table = Table(box=box.SIMPLE, title=escape(name), title_justify="left")
    for column in ("", "budget", "measured", "allowed"):
        table.add_column(column)
    for line in verdict.lines:
        words = map(escape, (line.what, line.measured, line.allowed))
        table.add_row("pass" if line.passed else "FAIL", *words, style="green" if line.passed else "bold red")
    show_whole(table)
    if by_default:
        print(f"cell: {named(key)}; --cell chooses another")
    show_warnings(verdict.warnings)
    for line in verdict.lines:
        if not line.passed:
            print(f"FAIL {name}: {line.what} is {line.measured}, allowed {line.allowed}")
