"""Runs tests/kernels/interpreted in a process of its own, on Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    folder = Path(__file__).parent / "interpreted"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parents[2])
    if finished.returncode:
        pytest.fail(finished.stdout[-20000:] + finished.stderr[-4000:], pytrace=False)
