"""The CPU sources compile for arm64, against torch's headers as they are here.

What arm64 builds is the plain library; the same code, on vectors of another width, is what the suite runs on x86 under
ATEN_CPU_CAPABILITY=default.
"""

import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

pytest.importorskip("ziglang", reason="the cross compiler is not installed (pip install ziglang, 400 MB)")

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc/cpu").glob("*.cpp"))
AARCH64 = 183  # e_machine of an ELF file


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_of_the_plain_library_compiles_for_arm64(source, tmp_path):
    compiled = tmp_path / "source.o"
    headers = [part for path in (*include_paths(), sysconfig.get_path("include")) for part in ("-isystem", path)]
    command = [
        sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", "-std=c++20", "-O1",
        "-fvisibility=hidden", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", *headers,
        "-c", str(source), "-o", str(compiled),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert struct.unpack_from("<H", compiled.read_bytes(), 18) == (AARCH64,)
