"""Latency, memory, bytes and accuracy of artifacts side by side, on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from fastkd.data import Task, load_task
from fastkd.data.tasks import check_max_length
from fastkd.edge.artifact import Artifact, open_artifact
from fastkd.edge.machine import this_machine, versions
from fastkd.edge.measure import Plan, measure
from fastkd.edge.measure_texts import PROSE
from fastkd.edge.report_accuracy import check_task, fill_accuracy
from fastkd.edge.report_plots import draw
from fastkd.edge.report_rows import fill_speedups, rows_of
from fastkd.edge.report_schema import Report, to_json
from fastkd.edge.report_settings import ReportSettings
from fastkd.edge.report_table import PLOTS, show, to_markdown
from fastkd.edge.report_warnings import warnings_of
from fastkd.recipes.output_folder import check_out, whole_folder

_TEXTS = 200  # of the task's that fill the cells; more would only take longer to hand over


def report(artifacts: Sequence[str | Path], out: str | Path, *, overwrite: bool = False, **settings) -> Report:
    """Measure artifacts against the first of them, the teacher; print the tables and write `out`.

    Args:
        artifacts: model folders, or files that `fastkd export` wrote.
        out: a new or empty folder for report.json (see docs/edge_report_schema.md), report.md and plots.
        overwrite: replace what stands in `out`.
        settings: of `ReportSettings`: task, data, lengths, batches, threads, modes ...

    An artifact whose process fails has rows that say so; an interruption leaves a report of what was measured before.

    Raises:
        ValueError: before any work, for what is no artifact, lengths a model does not take, a task whose labels do not
            fit, more threads than the machine has, or an `out` that holds something.
    """
    chosen = ReportSettings(artifacts, **settings)
    for path in chosen.artifacts:
        check_out(out, overwrite, path)
    found = measure_report(chosen, keep=lambda report: _write(report, out))
    show(found)
    print(f"written to {out}")
    return found


def measure_report(settings: ReportSettings, keep: Callable[[Report], None] = lambda report: None) -> Report:
    """The report itself. `keep` is called with it at the end, however that comes, unless nothing was measured."""
    opened = [open_artifact(path) for path in settings.artifacts]
    task = None if settings.task is None else load_task(settings.task, settings.data)
    for artifact in opened:
        _check(artifact, settings, task)
    found = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=asdict(settings),
        machine=this_machine(),
        versions=versions(),
        artifacts=rows_of(settings.artifacts, opened, settings.modes),
    )
    outputs = {}
    try:
        measure(found.artifacts, _plan(settings, task), outputs)
    finally:
        fill_speedups(found.artifacts)
        if task is not None:
            fill_accuracy(found.artifacts, outputs, task)
        found.warnings = warnings_of(found)
        if any(cell.calls for row in found.artifacts for cell in row.cells):
            keep(found)
    return found


def _check(artifact: Artifact, settings: ReportSettings, task: Task | None) -> None:
    tokenizer = artifact.tokenizer()
    positions = getattr(artifact.config(), "max_position_embeddings", None)
    longest = positions if artifact.manifest is None else artifact.manifest.max_length
    if longest is not None and settings.lengths[-1] > longest:
        raise ValueError(f"lengths={settings.lengths[-1]}, but {artifact.path} takes at most {longest} tokens")
    for length in (settings.lengths[0], settings.lengths[-1]):
        try:
            check_max_length(length, tokenizer)
        except ValueError as error:
            raise ValueError(f"lengths={length} for {artifact.path}: {error}") from error
    if task is not None:
        check_task(artifact, task)
        check_max_length(settings.max_length, tokenizer, pair=len(task.text_columns) == 2)


def _plan(settings: ReportSettings, task: Task | None) -> Plan:
    texts, columns = list(PROSE), None
    if task is not None:
        columns = [list(task.validation[column]) for column in task.text_columns]
        texts = [text for text in columns[0][:_TEXTS] if text.strip()] or texts
    return Plan(
        batches=settings.batches,
        lengths=settings.lengths,
        threads=settings.threads,
        rounds=settings.rounds,
        texts=texts,
        max_length=settings.max_length,
        predict=columns,
    )


def _write(found: Report, out: str | Path) -> None:
    with whole_folder(out) as folder:
        (folder / "report.json").write_text(to_json(found), encoding="utf-8")
        (folder / "report.md").write_text(to_markdown(found, []), encoding="utf-8")
    # Apart, so that no plot that fails takes the figures with it.
    folder = Path(out).expanduser()
    drawn = draw(found, folder)
    (folder / "report.md").write_text(to_markdown(found, [name for name in PLOTS if name in drawn]), encoding="utf-8")
