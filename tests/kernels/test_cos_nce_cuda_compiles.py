"""csrc/cuda/cos_nce.cu becomes machine code for sm_80 and sm_90a, with no GPU, no CUDA build of torch and no spills.

Registers of every kernel stand in docs/kernels/cos_nce_cuda.md and are compared; after a change write them anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_cos_nce_cuda_compiles.py
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs/kernels/cos_nce_cuda.md"
COLUMNS = ("kernel", "sm", "registers", "stack bytes", "spilled bytes")
ARCHS = ("sm_80", "sm_90a")
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]
KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<sm>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
FORMATS = ("Fp32", "Bf16", "Fp16", "Any")  # fastkd::cosine::Type


def name_of(symbol):
    """Of _ZN6fastkd6cosine4rowsILNS0_4TypeE1ELi32ELb1EEEvNS0_6LossesE: rows Bf16 32 wide."""
    length, rest = re.match(r"_ZN6fastkd6cosine(\d+)(\w+)", symbol).groups()
    name, parameters = rest[: int(length)], rest[int(length) :].partition("Ev")[0]
    of = re.sub(r"TypeE(\d)", lambda type_: FORMATS[int(type_[1])], parameters)
    of = of.replace("Lb1", "wide")
    return " ".join([name, *re.findall(r"Fp32|Bf16|Fp16|Any|(?<=Li)\d+|wide", of)])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(kernel, sm) -> (registers, stack bytes, spilled bytes) of every kernel, and nvcc's version."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", told)[1]
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
    command = [nvcc, *FLAGS, *targets, "-I", include, "-c", ROOT / "csrc/cuda/cos_nce.cu"]
    command += ["-o", tmp_path_factory.mktemp("cuda") / "cos_nce.o"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    found = {
        (name_of(kernel["symbol"]), kernel["sm"]): (
            kernel["registers"], kernel["stack"], str(int(kernel["stores"]) + int(kernel["loads"])),
        )
        for kernel in KERNEL.finditer(run.stdout + run.stderr)
    }  # fmt: skip
    return dict(sorted(found.items())), version


def kept():
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {tuple(row[:2]): tuple(row[2:]) for row in rows[2:]}


def write(found, version):
    head, *_ = TABLE.read_text(encoding="utf-8").partition("nvcc ")
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(k + v for k, v in found.items())]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    TABLE.write_text(head + f"nvcc {version}:\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_and_spills_nothing(compiled):
    found, version = compiled
    if os.environ.get("FASTKD_WRITE_TABLES") == "1":
        write(found, version)
    assert {sm for _, sm in found} == {arch.removeprefix("sm_") for arch in ARCHS}
    assert {name.split()[0] for name, _ in found} == {
        "run_sums", "total_of_all", "class_begins", "totals_of_classes", "rows", "scale",
    }  # fmt: skip
    assert not {kernel: numbers for kernel, numbers in found.items() if numbers[1:] != ("0", "0")}


@pytest.mark.slow
def test_the_table_holds_what_the_compiler_says(compiled):
    found, version = compiled
    if f"nvcc {version}:" not in TABLE.read_text(encoding="utf-8"):
        pytest.skip(f"the table is of another nvcc than {version}")
    assert found == kept(), "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def test_no_kernel_in_the_table_spills():
    table = kept()
    assert {sm for _, sm in table} == {arch.removeprefix("sm_") for arch in ARCHS}
    assert not {kernel for kernel, numbers in table.items() if numbers[1:] != ("0", "0")}
