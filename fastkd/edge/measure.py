"""Runs artifacts against each other: each in a process of its own, all alive, one measured at a time in turn."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastkd.edge.machine import THREAD_VARIABLES
from fastkd.edge.measure_statistics import latency
from fastkd.edge.report_schema import Cell, Process, Row

# glibc gives large tensors back to the system on every free; eager code, which allocates the most, is then timed by its
# page faults. With these settings every artifact reuses its pages.
_PAGE_REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
_WORKER = "fastkd.edge.measure_worker"
_WITHOUT_TORCH = Path(__file__).with_name("measure_without_torch.py")


class MeasurementError(RuntimeError):
    """What an artifact's process said when it failed, or how it ended."""


@dataclass
class Plan:
    """Cells to measure, `rounds` turns at each; the texts of the cells, and the columns of texts to predict, if any."""

    batches: Sequence[int]
    lengths: Sequence[int]
    threads: Sequence[int]
    rounds: int
    texts: Sequence[str]
    max_length: int = 128
    predict: Sequence[Sequence[str]] | None = None

    def empty_cells(self) -> list[Cell]:
        """One of each kind, not run yet."""
        kinds = product(self.threads, self.batches, self.lengths)
        return [Cell(batch, length, threads, failed="not run") for threads, batch, length in kinds]


class Worker:
    """The process of one artifact on a number of threads, which is fixed before any library is loaded.

    `first` is what it says of its start; empty where it gave no first answer, and then `lost` says why.
    """

    def __init__(self, row: Row, threads: int, plan: Plan, folder: Path):
        self._errors = folder / "errors.txt"
        job = {"path": row.path, "mode": row.mode, "threads": threads, "lengths": plan.lengths, "texts": plan.texts}
        limits = dict.fromkeys((*THREAD_VARIABLES, "RAYON_NUM_THREADS"), str(threads))
        # A pool of one thread would be another thread than the caller's, and time the switch to it.
        limits["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()
        file = folder / "job.json"
        file.write_text(json.dumps(job | {"started": time.time()}), encoding="utf-8")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                # -P: the file's own folder is no place to import from.
                [sys.executable, *(("-m", _WORKER) if row.format == "torch" else ("-P", _WITHOUT_TORCH)), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=os.environ | _PAGE_REUSE | limits,
            )
        self.first: dict = {}
        self.lost: str | None = None

    def start(self) -> None:
        """Wait for the first answer."""
        try:
            self.first = self._answer()
        except MeasurementError as error:
            self.lost = str(error)

    def ask(self, do: str, **request) -> dict:
        """The answer to a request. Raises MeasurementError with the process' own error, or with how it ended."""
        if self.lost is not None:
            raise MeasurementError(self.lost)
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # what it died of is told when its answer is missing
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self.lost = self._how_it_ended()
            raise MeasurementError(self.lost)
        found = json.loads(line)
        if "error" in found:
            raise MeasurementError(found["error"])
        return found

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        how = f"its process ended with status {status}"
        if status < 0:
            how = f"its process was killed ({signal.Signals(-status).name})"
        if status == -9:
            return f"{how}, as the system does where memory runs out"
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{how}: {lines[-1]}" if lines else how

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # a request that it did not read any more


@dataclass
class _Turns:
    """What one artifact has given for one cell so far."""

    ms: list[float] = field(default_factory=list)
    tokenize_ms: list[float] = field(default_factory=list)
    failed: str | None = None


def measure(rows: Sequence[Row], plan: Plan, outputs: dict[str, np.ndarray | str]) -> None:
    """Fill the processes and cells of `rows`, and with `plan.predict` in `outputs` each row's (N, labels) fp32 by its
    name, or why there are none. What was measured before an interruption is filled in as well.

    A new process is started for every number of threads, since no library changes it reliably once it runs.
    """
    for row in rows:
        row.processes, row.cells = [], plan.empty_cells()
    turns = len(rows) * plan.rounds * len(plan.empty_cells())
    with tqdm(total=turns, desc="measure", unit="turn", disable=None, leave=False) as progress:
        for threads in plan.threads:
            with ExitStack() as open_workers:
                folder = Path(open_workers.enter_context(tempfile.TemporaryDirectory()))
                workers = _start(rows, threads, plan, folder, open_workers)
                _take_turns(rows, workers, threads, plan, progress)
                if plan.predict is not None and threads == plan.threads[-1]:
                    for i, (row, worker) in enumerate(zip(rows, workers, strict=True)):
                        outputs[row.name] = _predict(worker, plan, folder / f"{i}.npy")


def _start(rows: Sequence[Row], threads: int, plan: Plan, folder: Path, open_workers: ExitStack) -> list[Worker]:
    """One after the other, so that each starts on a machine that does nothing else."""
    workers = []
    for i, row in enumerate(rows):
        own = folder / str(i)
        own.mkdir()
        worker = Worker(row, threads, plan, own)
        open_workers.callback(worker.close)
        worker.start()
        row.runtime = worker.first.pop("runtime", row.runtime)
        row.processes.append(Process(threads, **worker.first, failed=worker.lost))
        workers.append(worker)
    return workers


def _take_turns(rows: Sequence[Row], workers: Sequence[Worker], threads: int, plan: Plan, progress: tqdm) -> None:
    """Every round measures every cell, every cell every artifact, beginning with another one each round: a drift of the
    machine hits all alike."""
    cells = list(product(plan.batches, plan.lengths))
    found = {(i, *cell): _Turns() for i in range(len(rows)) for cell in cells}
    try:
        for turn in range(plan.rounds):
            for batch, length in cells:
                for step in range(len(rows)):
                    i = (turn + step) % len(rows)
                    _take_turn(workers[i], batch, length, found[i, batch, length])
                    progress.update()
        for row, worker in zip(rows, workers, strict=True):
            _read_memory(worker, row.process(threads))
    finally:
        for (i, batch, length), turns in found.items():
            _fill(rows[i].cell((batch, length, threads)), turns)


def _take_turn(worker: Worker, batch: int, length: int, turns: _Turns) -> None:
    if turns.failed is not None:
        return
    try:
        answer = worker.ask("time", batch=batch, length=length)
    except MeasurementError as error:
        turns.failed = str(error)
        return
    turns.ms += answer["ms"]
    turns.tokenize_ms.append(answer["tokenize_ms"])


def _read_memory(worker: Worker, process: Process) -> None:
    try:
        process.memory_peak_bytes = worker.ask("memory")["peak_bytes"]
    except MeasurementError as error:
        process.failed = str(error)


def _fill(cell: Cell, turns: _Turns) -> None:
    if turns.ms:
        for name, value in latency(turns.ms, cell.batch).items():
            setattr(cell, name, value)
        cell.tokenize_ms = statistics.median(turns.tokenize_ms)
        cell.failed = None
    cell.failed = turns.failed or cell.failed


def _predict(worker: Worker, plan: Plan, out: Path) -> np.ndarray | str:
    try:
        worker.ask("predict", out=str(out), columns=plan.predict, max_length=plan.max_length)
    except MeasurementError as error:
        return str(error)
    return np.load(out)
