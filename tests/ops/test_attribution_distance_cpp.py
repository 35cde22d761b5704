"""The C++ kernel of every instruction set that this CPU has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.ops import backends

pytestmark = pytest.mark.skipif(backends.cpu_library_missing is not None, reason=str(backends.cpu_library_missing))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_library_of_a_lesser_instruction_set(capability):
    if backends.cpu_capability() in ("default", capability):
        pytest.skip(f"this CPU is served by the {backends.cpu_capability()} library")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    check = f"from fastkd.ops import backends; assert backends.cpu_library == '_cpu_{capability}', backends.cpu_library"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpp"]
    file = Path(__file__).with_name("test_attribution_distance.py")
    run = subprocess.run([*command, file], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout
