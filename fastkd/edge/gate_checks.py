"""One line for each budget: what was measured, what is allowed, and whether it passes."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastkd.edge.gate_budgets import PERCENTILES, Budgets
from fastkd.edge.report_schema import Cell, Report, Row

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    """A budget held against a figure, both as text. `passed` is False as well where there is no figure."""

    what: str
    measured: str
    allowed: str
    passed: bool


def check(report: Report, row: Row, key: Key, budgets: Budgets, baseline: tuple[Report, Row] | None) -> list[Line]:
    """The lines of every budget that is set, for `row` of `report` at the cell `key`.

    Raises ValueError where the report cannot say: it scored no task, `row` is the teacher itself, or the baseline has
    no figure.
    """
    lines = [*_times(row, key, budgets), *_space(row, key, budgets)]
    if budgets.max_drop is not None:
        lines.append(_drop(report, row, budgets.max_drop))
    if baseline is not None:
        lines += _ratios(report, row, key, baseline, budgets.max_ratio)
    return lines


def named(key: Key) -> str:
    return "batch {}, length {}, threads {}".format(*key)


def _times(row: Row, key: Key, budgets: Budgets) -> Iterator[Line]:
    cell = row.cell(key)
    for name in PERCENTILES:
        allowed = getattr(budgets, name)
        if allowed is not None:
            yield _line(f"{name} at {named(key)}", _time_of(cell, name), allowed, "{:.3g} ms", cell.failed)


def _space(row: Row, key: Key, budgets: Budgets) -> Iterator[Line]:
    if budgets.size is not None:
        yield _line("size", row.bytes["total"], budgets.size, "{:,} bytes")
    if budgets.memory is not None:
        process = row.process(key[2])
        peak = process and process.memory_peak_bytes
        yield _line("peak memory", peak, budgets.memory, "{:,} bytes", process.failed if process else "not run")


def _drop(report: Report, row: Row, allowed: float) -> Line:
    if report.settings["task"] is None:
        raise ValueError("max_drop: the report scored no task; make it with one (--task)")
    if row is report.teacher:
        raise ValueError(f"max_drop: {row.name} is the teacher of its report, which it cannot lose against")
    accuracy = row.accuracy
    reason = (accuracy and accuracy.failed) or (report.teacher.accuracy and report.teacher.accuracy.failed)
    against = accuracy and accuracy.against_teacher
    drop = None if against is None else -against.points
    what = f"{report.settings['task']} drop against {report.teacher.name}"
    return _line(what, drop, allowed, "{:.2f} points", reason)


def _ratios(report: Report, row: Row, key: Key, baseline: tuple[Report, Row], allowed: float) -> Iterator[Line]:
    if row is report.teacher:
        raise ValueError(f"max_ratio: {row.name} is the teacher of its report, which it is held against")
    form = "{:.3f} times the baseline"
    before, row_before = baseline
    now, then = (
        _ratio(_time_of(of.cell(key), "p50"), _time_of(teacher.cell(key), "p50"))
        for of, teacher in ((row, report.teacher), (row_before, before.teacher))
    )
    if then is None:
        raise ValueError(f"max_ratio: the baseline has no p50 of {row_before.name} and its teacher at {named(key)}")
    failed = next((cell.failed for cell in (row.cell(key), report.teacher.cell(key)) if cell.failed), None)
    yield _line(f"p50 in relation to the teacher's at {named(key)}", _ratio(now, then), allowed, form, failed)
    now, then = (
        of.bytes["total"] / teacher.bytes["total"]
        for of, teacher in ((row, report.teacher), (row_before, before.teacher))
    )
    yield _line("size in relation to the teacher's", now / then, allowed, form)


def _time_of(cell: Cell, name: str) -> float | None:
    # A cell that failed half way has figures of the calls before; they are no measurement of it.
    return None if cell.failed else getattr(cell, f"{name}_ms")


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below is not None else None


def _line(what: str, measured: float | None, allowed: float, form: str, failed: str | None = None) -> Line:
    if measured is None:
        return Line(what, f"not measured: {failed or 'not run'}", form.format(allowed), False)
    # A hundredth of a point is lost in the representation of a difference of scores.
    return Line(what, form.format(measured), form.format(allowed), measured <= allowed + 1e-9 * abs(allowed))
