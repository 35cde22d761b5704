"""A folder of benchmarks as one command: every name on its shapes, as tables, a CSV file and plots.

A file in the folder gives SHAPES, by the name of the set, and cases(shapes, device), which yields `harness.Case`s;
nothing else has to know of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch

from fastkd.benchmarks import machine
from fastkd.benchmarks.plots import save_plots
from fastkd.benchmarks.report import print_tables, write_csv

SHAPE_SETS = ("tiny", "small", "full")


@dataclass(frozen=True)
class Suite:
    """folder: beside this file. option: what a name in it is called, on the command line too. ending: of file names."""

    folder: str
    option: str
    ending: str = ""

    @cached_property
    def names(self) -> tuple[str, ...]:
        found = (file.name for file in files(f"fastkd.benchmarks.{self.folder}").iterdir())
        return tuple(sorted(
            name.removesuffix(".py") for name in found if name.endswith(".py") and not name.startswith("_")
        ))  # fmt: skip

    def add_arguments(self, parser) -> None:
        parser.add_argument(f"--{self.option}", dest="name", choices=self.names, help="this one only; default: all")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument(
            "--shapes", choices=SHAPE_SETS, default="small", help="tiny proves the benchmark, not the speed"
        )
        parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
        parser.add_argument("--anyway", action="store_true", help="measure although the machine is busy; recorded")

    def run(self, options) -> int:
        """`main` for parsed `add_arguments`."""
        return self.main(options.name, options.device, options.shapes, options.out, options.threads, options.anyway)

    def main(
        self, name: str | None = None, device: str = "cpu", shapes: str = "small", out: Path = Path("runs/bench"),
        threads: int | None = None, anyway: bool = False,
    ) -> int:  # fmt: skip
        """Measure, print, and write OUT/NAME-DEVICE.csv and plots. Returns 1 if a backend's result was wrong.

        Raises:
            ValueError: an unknown name, no CUDA device, or a load average above 0.5 without `anyway`.
        """
        if name is not None and name not in self.names:
            raise ValueError(f"{self.option}={name!r}; allowed are {', '.join(self.names)}")
        if shapes not in SHAPE_SETS:
            raise ValueError(f"shapes={shapes!r}; allowed are {', '.join(SHAPE_SETS)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no CUDA device")
        load = machine.checked_load(anyway)
        threads = threads or torch.get_num_threads()
        facts = machine.facts(device, threads)
        wrong = False
        for each in self.names if name is None else (name,):
            environments = machine.allocators(device)
            rows = []
            for allocator, environment in environments.items():
                found = self._in_own_process(each, device, shapes, threads, allocator, environment)
                rows += [row | facts | {"allocator": allocator, "load": load, "anyway": anyway} for row in found]
            stem = f"{each}{self.ending}-{device}"
            write_csv(Path(out) / f"{stem}.csv", rows)
            quoted = next(iter(environments))
            save_plots([row for row in rows if row["allocator"] == quoted], Path(out), stem)
            print_tables(rows, list(environments))
            print(f"written to {Path(out).resolve()}")
            wrong |= any(row["role"] == "fastkd" and row["status"].startswith("refused") for row in rows)
        return int(wrong)

    def _in_own_process(self, name, device, shapes, threads, allocator, environment: dict) -> list[dict]:
        """glibc reads its settings when a process starts, so each allocator needs a process of its own."""
        print(f"{name} on {device}, {shapes} shapes, {threads} threads, allocator: {allocator}", file=sys.stderr)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            module = f"fastkd.benchmarks.{self.folder}.{name}"
            subprocess.run(
                [sys.executable, "-m", "fastkd.benchmarks._process", module, device, shapes, str(path)],
                # The profiler that counts memory announces itself below log level 6.
                env={**inherited, **environment, "OMP_NUM_THREADS": str(threads), "KINETO_LOG_LEVEL": "6"},
                check=True,
            )
            return json.loads(path.read_text(encoding="utf-8"))
