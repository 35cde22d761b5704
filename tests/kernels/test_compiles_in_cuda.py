"""csrc/cuda/ becomes machine code for sm_80 and sm_90a, with no GPU, no CUDA build of torch and no spills.

Registers of every kernel stand in docs/kernels/*_cuda.md and are compared; after a change write them anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_compiles_in_cuda.py
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("kernel", "sm", "registers", "stack bytes", "spilled bytes")
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]
KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<sm>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Op:
    """stem: of its files. namespace: mangled. kernels: all of them. said: of template parameters, as a regular
    expression, what stands behind a kernel's name. formats: names of `Type`, in its order."""

    stem: str
    namespace: str
    kernels: str
    said: str
    formats: tuple[str, ...] = ()
    renamed: Callable[[str], str] = str

    def name_of(self, symbol: str) -> str:
        """Of _ZN6fastkd6cosine4rowsILNS0_4TypeE1ELi32ELb1EEEvNS0_6LossesE: rows Bf16 32 wide."""
        length, rest = re.match(rf"_ZN6fastkd{self.namespace}(\d+)(\w+)", symbol).groups()
        name, parameters = rest[: int(length)], rest[int(length) :].partition("Ev")[0]
        of = self.renamed(re.sub(r"TypeE(\d)", lambda type_: self.formats[int(type_[1])], parameters))
        return " ".join([name, *re.findall(self.said, of)])


OPS = [
    Op(
        "relation_kl", "", "resident row_sweep gradient_sweep rank_sequences sequence_losses",
        r"Bf16|Fp16|Split|(?<=Li)\d+",
    ),
    Op(
        "sparse_embedding", "6sparse", "lookup embedding_block contributions kept_gradient join weight_gradient",
        r"Single|Fp32|Fp16|Bf16|Int8|(?<=Li)\d+", ("Fp32", "Fp16", "Bf16", "Int8"),
    ),
    Op(
        "cos_nce", "6cosine", "run_sums total_of_all class_begins totals_of_classes rows scale",
        r"Fp32|Bf16|Fp16|Any|(?<=Li)\d+|wide", ("Fp32", "Bf16", "Fp16", "Any"), lambda of: of.replace("Lb1", "wide"),
    ),
    Op(
        "attribution_distance", "11attribution", "distances", r"Fp32|Bf16|Fp16|Any|norm|sum|saliency",
        ("Fp32", "Bf16", "Fp16", "Any"),
        lambda of: re.sub(r"FormE(\d)", lambda form: ("norm", "sum", "saliency")[int(form[1])], of),
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=OPS, ids=lambda op: op.stem)
def op(request):
    return request.param


@pytest.fixture
def table(op, resource_table):
    return resource_table(f"{op.stem}_cuda.md", COLUMNS, 2, "nvcc")


@pytest.fixture(scope="module")
def compiled(op, tmp_path_factory):
    """(kernel, sm) -> (registers, stack bytes, spilled bytes) of every kernel, and nvcc's version."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", told)[1]
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    command = [nvcc, *FLAGS, *targets, "-I", include, "-c", ROOT / f"csrc/cuda/{op.stem}.cu"]
    command += ["-o", tmp_path_factory.mktemp("cuda") / "kernels.o"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    found = {
        (op.name_of(kernel["symbol"]), kernel["sm"]): (
            kernel["registers"], kernel["stack"], str(int(kernel["stores"]) + int(kernel["loads"])),
        )
        for kernel in KERNEL.finditer(run.stdout + run.stderr)
    }  # fmt: skip
    return dict(sorted(found.items())), version


def spilling(found):
    return {kernel: numbers for kernel, numbers in found.items() if numbers[1:] != ("0", "0")}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_and_spills_nothing(op, compiled, table):
    found, version = compiled
    if table.is_wanted_anew():
        table.write(found, version)
    assert {sm for _, sm in found} == {arch.removeprefix("sm_") for arch in ARCHITECTURES}
    assert {name.split()[0] for name, _ in found} == set(op.kernels.split())
    assert not spilling(found)


@pytest.mark.slow
def test_the_table_holds_what_the_compiler_says(compiled, table):
    found, version = compiled
    if not table.is_of(version):
        pytest.skip(f"the table is of another nvcc than {version}")
    assert found == table.read(), "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def test_no_kernel_in_the_table_spills(table):
    kept = table.read()
    assert {sm for _, sm in kept} == {arch.removeprefix("sm_") for arch in ARCHITECTURES}
    assert not spilling(kept)


def test_every_source_is_compiled_here():
    assert {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} == {op.stem for op in OPS}


def test_cuda_sources_include_only_torchs_stable_headers():
    """The others want headers that a CPU build of torch lacks, and bind the library to one version of torch."""
    included = {
        name
        for path in (ROOT / "csrc/cuda").iterdir()
        for name in re.findall(r"#include <(.*?)>", path.read_text(encoding="utf-8"))
        if "/" in name
    }
    strangers = {name for name in included if not name.startswith(("torch/csrc/stable/", "torch/headeronly/"))}
    assert included and not strangers
