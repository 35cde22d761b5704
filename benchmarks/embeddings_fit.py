"""`python -m fastkd.benchmarks.embeddings_fit`: seconds and memory that the fit of a sparse code takes, at the sizes of
BERT (30,522 x 768) and XLM-R (250,002 x 768). The rows are random: the time does not depend on what they hold.

Each size runs in a process of its own, whose peak memory includes Python, torch and the table itself.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastkd.benchmarks import machine

SIZES = ((30_522, 768), (250_002, 768))


def fit(vocabulary: int, width: int, keep: float, atoms: int, threads: int) -> dict:
    """Fit one table in this process."""
    from fastkd import SparseCode

    torch.set_num_threads(threads)
    table = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(vocabulary).flip(0)
    start, cpu_start = time.perf_counter(), time.process_time()
    code = SparseCode.fit(table, counts, keep, atoms, rows="float16")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "vocabulary": vocabulary,
        "width": width,
        "keep": keep,
        "atoms": atoms,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": peak,
        "code_bytes": code.nbytes,
        "table_bytes": table.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m fastkd.benchmarks.embeddings_fit", description=__doc__.split("\n\n")[0])
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--atoms", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, metavar=("V", "D"), help="this table alone, here, as JSON")
    parser.add_argument("--out", type=Path, help="write a line of JSON for each size")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is busy")
    args = parser.parse_args()
    if args.size:
        print(json.dumps(fit(*args.size, args.keep, args.atoms, args.threads)))
        return
    try:
        load = machine.checked_load(args.anyway)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    rows = []
    for size in SIZES:
        options = {"--keep": args.keep, "--atoms": args.atoms, "--threads": args.threads}
        words = [word for name, value in options.items() for word in (name, str(value))]
        command = [sys.executable, "-m", __spec__.name, "--size", *map(str, size), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout) | {"load": load} | machine.facts("cpu", args.threads))
        print(
            "{vocabulary:,} x {width}: {seconds} s ({cpu_seconds} s of CPU), peak memory {peak_bytes:,} bytes".format(
                **rows[-1]
            ),
            flush=True,
        )
    if args.out:
        args.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
