"""`fastkd bench kernels`: every op on its shapes against its peers, as a table, a CSV file and plots.

A file beside this one is one op. It gives SHAPES, by the name of the set, and cases(shapes, device), which yields
`harness.Case`s; nothing else has to know of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from fastkd.benchmarks import machine
from fastkd.benchmarks.plots import save_plots
from fastkd.benchmarks.report import print_tables, write_csv

OPS = tuple(sorted(
    file.name.removesuffix(".py") for file in files(__package__).iterdir()
    if file.name.endswith(".py") and not file.name.startswith("_")
))  # fmt: skip
SHAPE_SETS = ("tiny", "small", "full")


def add_arguments(parser) -> None:
    parser.add_argument("--op", choices=OPS, help="one op only; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", choices=SHAPE_SETS, default="small", help="tiny proves the benchmark, not the speed"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is busy; recorded")


def run(options) -> int:
    """Run for parsed `add_arguments`."""
    return main(options.op, options.device, options.shapes, options.out, options.threads, options.anyway)


def main(
    op: str | None = None, device: str = "cpu", shapes: str = "small", out: Path = Path("runs/bench"),
    threads: int | None = None, anyway: bool = False,
) -> int:  # fmt: skip
    """Measure, print, and write OUT/OP-DEVICE.csv and plots. Returns 1 if the result of a fastkd backend was wrong.

    Raises:
        ValueError: an unknown name, no CUDA device, or a load average above 0.5 without `anyway`.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op={op!r}; allowed are {', '.join(OPS)}")
    if shapes not in SHAPE_SETS:
        raise ValueError(f"shapes={shapes!r}; allowed are {', '.join(SHAPE_SETS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device")
    load = machine.checked_load(anyway)
    threads = threads or torch.get_num_threads()
    facts = machine.facts(device, threads)
    wrong = False
    for name in OPS if op is None else (op,):
        environments = machine.allocators(device)
        rows = []
        for allocator, environment in environments.items():
            found = _in_own_process(name, device, shapes, threads, allocator, environment)
            rows += [row | facts | {"allocator": allocator, "load": load, "anyway": anyway} for row in found]
        write_csv(Path(out) / f"{name}-{device}.csv", rows)
        quoted = next(iter(environments))
        save_plots([row for row in rows if row["allocator"] == quoted], Path(out), f"{name}-{device}")
        print_tables(rows, list(environments))
        print(f"written to {Path(out).resolve()}")
        wrong |= any(row["role"] == "fastkd" and row["status"].startswith("refused") for row in rows)
    return int(wrong)


def _in_own_process(op: str, device: str, shapes: str, threads: int, allocator: str, environment: dict) -> list[dict]:
    """glibc reads its settings when a process starts, so each allocator needs a process of its own."""
    print(f"{op} on {device}, {shapes} shapes, {threads} threads, allocator: {allocator}", file=sys.stderr)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        subprocess.run(
            [sys.executable, "-m", "fastkd.benchmarks.kernels._process", op, device, shapes, str(path)],
            # The profiler that counts memory announces itself below log level 6.
            env={**inherited, **environment, "OMP_NUM_THREADS": str(threads), "KINETO_LOG_LEVEL": "6"},
            check=True,
        )
        return json.loads(path.read_text(encoding="utf-8"))
