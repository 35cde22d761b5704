"""Runs each file of tests/kernels/interpreted in a process of its own, on Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_the_kernels_are_right_in_the_interpreter(file):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[3])
    if finished.returncode:
        pytest.fail(finished.stdout[-20000:] + finished.stderr[-4000:], pytrace=False)
