"""One benchmark measured in this process, as `fastkd.benchmarks.suite` starts it: MODULE DEVICE SHAPES FILE."""

import importlib
import json
import sys
from pathlib import Path

from fastkd.benchmarks.harness import measure


def rows_of(module: str, device: str, shapes: str) -> list[dict]:
    rows = []
    for case in importlib.import_module(module).cases(shapes, device):
        print(f"  {case.shape} {case.dtype}", file=sys.stderr)
        rows += measure(case, budget=0.2 if shapes == "tiny" else 30.0)
    return rows


if __name__ == "__main__":
    *what, path = sys.argv[1:]
    Path(path).write_text(json.dumps(rows_of(*what)), encoding="utf-8")
