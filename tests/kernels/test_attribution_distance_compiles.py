"""Every Triton kernel of attribution_distance becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and spills.

The resources stand in docs/kernels/attribution_distance_triton.md. One variant is compiled here and compared with it;
after a change of the kernels write it anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_attribution_distance_compiles.py
"""

import functools
import importlib.util
import os
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("there is no compiling Triton", allow_module_level=True)

import triton

from fastkd.kernels import attribution_distance as kernels

COLUMNS = ("kernel", "form", "dtype", "width", "sm", "warps", "registers", "shared bytes", "stack bytes")
ARCHITECTURES = (80, 90, 100)
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
KERNELS = {"scores", "compare", "gradients"}

FEW = [("gradient x input", bf16, 768)]
ALL = [
    *FEW,
    ("gradient x input", fp32, 768),
    ("gradient x input", fp16, 768),
    *(("gradient x input", fp32, width) for width in (64, 312, 384, 2048, 8192)),
    ("summed", fp32, 768),
    ("saliency", fp32, 768),
    ("masked", fp32, 768),
]


@pytest.fixture
def launched(recorded_launches):
    """What a training step would start, of a form and a shape."""
    return functools.partial(_launched, recorded_launches)


def _launched(recorded_launches, form="gradient x input", dtype=bf16, width=768, batch=5, classes=1, length=70):
    gradient = torch.zeros(batch, classes, length, width, dtype=dtype)
    inputs = None if form == "saliency" else gradient[:, 0].contiguous()
    teacher = torch.zeros(batch, classes, length)
    mask = torch.ones(batch, length, dtype=torch.bool) if form == "masked" else None
    reduce = "sum" if form == "summed" else "norm"
    with recorded_launches() as launches:
        kernels.attribution_distance(
            gradient, inputs, teacher, mask, dtype != fp16, reduce, "l2", "l2", True, inputs is not None
        )  # fmt: skip
    return launches


@pytest.fixture
def measured(launched, type_names, tmp_path):
    """Rows of the table for some variants."""

    def measure(variants):
        found = {}
        for form, dtype, width in variants:
            for launch in launched(form, dtype, width):
                for sm in ARCHITECTURES:
                    row = (launch.kernel.__name__, form, type_names[dtype], str(width), str(sm))
                    _, found[row] = launch.compile(sm, tmp_path)
        return found

    return measure


@pytest.fixture
def table(resource_table):
    return resource_table("attribution_distance_triton.md", COLUMNS, 5, "Triton")


@pytest.mark.slow
def test_compiled_variants_agree_with_the_table(measured, table):
    if table.is_wanted_anew():
        table.write(measured(ALL), triton.__version__)
    found = measured(FEW)
    assert {row[0] for row in found} == KERNELS
    if table.is_of(triton.__version__):
        kept = table.read()
        assert found == {row: kept.get(row) for row in found}, "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def test_no_variant_in_the_table_spills(table, type_names):
    kept = table.read()
    assert {row[1:4] for row in kept} == {(form, type_names[dtype], str(width)) for form, dtype, width in ALL}
    assert not {row for row, numbers in kept.items() if numbers[3] != "0"}


@pytest.mark.parametrize("width", [312, 768])
def test_aligned_rows_are_read_and_written_sixteen_bytes_at_a_time(width, launched, tmp_path):
    for launch in launched(width=width):
        if launch.kernel.__name__ == "gradients":
            ptx, _ = launch.compile(90, tmp_path)
            accesses = re.findall(r"(ld|st)\.global\S*?(\.v\d)?\.b(\d+)", ptx)
            assert all(access[1:] == (".v4", "32") for access in accesses if access[0] == "st")
            assert any(access == ("ld", ".v4", "32") for access in accesses)


@pytest.mark.parametrize("form", ["gradient x input", "masked", "summed"])
def test_other_batches_compile_nothing_anew(form, launched):
    variants = {
        tuple(launch.specialization() for launch in launched(form, batch=batch, classes=classes, length=length))
        for batch in (1, 3, 32)
        for classes in (1, 3)
        for length in (16, 33, 512)
    }  # fmt: skip
    assert len(variants) == 1
