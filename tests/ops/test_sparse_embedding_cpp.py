"""The C++ kernel of every instruction set that this CPU has, and what a short call costs."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastkd.benchmarks.kernels.sparse_embedding import draw_ids, random_code
from fastkd.ops import backends, sparse_embedding

pytestmark = pytest.mark.skipif(backends.cpu_library_missing is not None, reason=str(backends.cpu_library_missing))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_library_of_a_lesser_instruction_set(capability):
    if backends.cpu_capability() in ("default", capability):
        pytest.skip(f"this CPU is served by the {backends.cpu_capability()} library")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    check = f"from fastkd.ops import backends; assert backends.cpu_library == '_cpu_{capability}', backends.cpu_library"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    here = Path(__file__).parent
    files = [here / f"test_sparse_embedding{part}.py" for part in ("", "_gradient", "_block", "_errors")]
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpp"]
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout


def test_python_adds_little_to_a_short_call():
    """The kernel needs most of the 25 µs that 128 tokens may take; a busy machine may take three times as long."""
    code = random_code(3052, 305, 768, 8)
    ids = draw_ids(code, 1, 128, rare_percent=15)
    one = ids[:, :1]

    def microseconds(compute):
        times = []
        for _ in range(200):
            start = time.perf_counter()
            compute()
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.quantiles(times, n=10)[0]

    op = torch.ops.fastkd.sparse_embedding_cpp.default
    with torch.no_grad():
        through_op = microseconds(lambda: op(one, *code, torch.float32))
        assert microseconds(lambda: sparse_embedding(one, code)) - through_op < 3 * 10
