"""`make gpu` is the one command for a machine with a GPU; elsewhere it says why it does nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_make_gpu_says_so_and_fails_before_it_builds():
    run = subprocess.run(["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "make gpu: torch sees no CUDA device" in run.stderr
    assert "pip" not in run.stdout
