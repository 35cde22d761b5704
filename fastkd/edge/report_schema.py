"""What a report holds, and report.json: docs/edge_report_schema.md describes every field."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastkd.edge.machine import Machine

SCHEMA = 1


@dataclass
class Cell:
    """Times of one artifact at one batch size, length in tokens and number of threads; milliseconds per call.

    `spread` is (p90 - p10) / p50; `speedup` the teacher's p50 over this one. Where `failed` says why, the figures are
    None, or of the calls before.
    """

    batch: int
    length: int
    threads: int
    calls: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    mean_ms: float | None = None
    spread: float | None = None
    sentences_per_second: float | None = None
    tokenize_ms: float | None = None
    speedup: float | None = None
    failed: str | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        return self.batch, self.length, self.threads


@dataclass
class Process:
    """Start and memory of the process that ran an artifact's cells of this many threads.

    `cold_start_s` runs from the start of the process to the first answer; importing and loading are parts of it.
    Memory is the high-water mark of the resident set: when everything was imported, and after all cells.
    """

    threads: int
    import_s: float | None = None
    load_s: float | None = None
    cold_start_s: float | None = None
    memory_imports_bytes: int | None = None
    memory_peak_bytes: int | None = None
    failed: str | None = None


@dataclass
class Difference:
    """Points (hundredths) of the task's first metric above another artifact, negative for a loss; with the paired
    bootstrap's 95 % interval where that metric is accuracy."""

    points: float
    low: float | None = None
    high: float | None = None


@dataclass
class Accuracy:
    """The task's metrics over its validation split."""

    metrics: dict[str, float] = field(default_factory=dict)
    examples: int = 0
    against_teacher: Difference | None = None
    against_fp32: Difference | None = None
    failed: str | None = None


@dataclass
class Row:
    """One artifact, in one mode if it is a transformers folder. `fp32` names the row of its own fp32 self."""

    name: str
    path: str
    format: str
    precision: str
    mode: str | None
    sha256: str
    bytes: dict[str, int]
    smaller: float | None
    parameters: dict[str, int]
    fp32: str | None = None
    verification: dict | None = None
    runtime: str | None = None
    accuracy: Accuracy | None = None
    processes: list[Process] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def cell(self, key: tuple[int, int, int]) -> Cell | None:
        return next((cell for cell in self.cells if cell.key == tuple(key)), None)

    def process(self, threads: int) -> Process | None:
        return next((process for process in self.processes if process.threads == threads), None)

    @property
    def metric(self) -> float | None:
        """The first metric of the task, where it was measured."""
        return next(iter(self.accuracy.metrics.values()), None) if self.accuracy else None


@dataclass
class Report:
    """Every figure of one run; the first artifact is the teacher."""

    created: str
    settings: dict
    machine: Machine
    versions: dict[str, str]
    artifacts: list[Row]
    warnings: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def teacher(self) -> Row:
        return self.artifacts[0]

    def main_cell(self) -> tuple[int, int, int]:
        """The cell that one figure is quoted from: batch 1, or the smallest, the longest text, the fewest threads."""
        return min(self.settings["batches"]), max(self.settings["lengths"]), min(self.settings["threads"])


def to_json(report: Report) -> str:
    """The text of report.json."""
    found = asdict(report)
    return json.dumps({"schema": found.pop("schema"), **found}, indent=1, ensure_ascii=False) + "\n"


def read_report(path: str | Path) -> Report:
    """The report in a report.json. Raises ValueError on another file, and on a report of another schema version."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is no file; a report.json is needed, as `fastkd report` writes it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found["schema"]
        found["artifacts"], found["settings"]  # what other JSON files with a schema lack
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report ({error!r}); `fastkd report` writes one") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema version {schema}, this fastkd reads version {SCHEMA}: run `fastkd report` again"
        )
    try:
        return Report(
            **found | {"machine": Machine(**found["machine"]), "artifacts": [_row(row) for row in found["artifacts"]]}
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is no report of schema version {SCHEMA} ({error})") from error


def _row(found: dict) -> Row:
    accuracy = found["accuracy"]
    if accuracy is not None:
        differences = {
            name: accuracy[name] and Difference(**accuracy[name]) for name in ("against_teacher", "against_fp32")
        }
        accuracy = Accuracy(**accuracy | differences)
    parts = {
        "processes": [Process(**process) for process in found["processes"]],
        "cells": [Cell(**cell) for cell in found["cells"]],
    }
    return Row(**found | parts | {"accuracy": accuracy})
