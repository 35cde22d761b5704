"""Every Triton kernel of cos_nce becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and without spills.

The resources stand in docs/kernels/cos_nce_triton.md. One variant is compiled here and compared with it; after a change
of the kernels write it anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_cos_nce_compiles.py
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

from fastkd.kernels import cos_nce as kernels

COLUMNS = ("kernel", "form", "dtypes", "width", "sm", "warps", "registers", "shared bytes", "stack bytes")
ARCHITECTURES = (80, 90, 100)
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
KERNELS = {"run_sums", "totals", "rows", "scale"}

# form, dtypes of student and teacher, width
FEW = [("vectors", (bf16, bf16), 768)]
ALL = [
    *FEW,
    *(("vectors", dtypes, 768) for dtypes in ((fp32, fp32), (fp16, fp16), (fp32, bf16))),
    *(("vectors", (bf16, bf16), width) for width in (64, 312, 384, 1024, 2048, 4096, 40000)),
    ("vectors", (fp32, fp32), 2048),
    ("tokens", (bf16, bf16), 768),
    ("classes", (bf16, bf16), 768),
    ("no gradient", (bf16, bf16), 768),
]


@pytest.fixture
def launched(recorded_launches):
    """What a training step would start, of a form and a shape."""
    return functools.partial(_launched, recorded_launches)


def _launched(
    recorded_launches, form="vectors", dtypes=(bf16, bf16), width=768, samples=70, positions=1, layers=2, classes=7
):
    student, teacher = (torch.zeros(layers, samples, positions, width, dtype=dtype) for dtype in dtypes)
    classes = classes if form == "classes" else 0
    class_of = torch.zeros(samples, dtype=torch.int32) if classes else None
    mask, weights = (torch.ones(samples, positions, dtype=torch.bool), torch.ones(samples)) * (form == "tokens") or (
        None, None,
    )  # fmt: skip
    counts = torch.ones(1 + classes, positions)
    with recorded_launches() as launches:
        sums = kernels.cos_nce_sums(teacher, mask, class_of, classes)
        with_grad = form != "no gradient"
        _, grad = kernels.cos_nce(
            student, teacher, sums, counts, mask, class_of, True, weights, samples, with_grad
        )  # fmt: skip
        kernels.scale_gradient(grad, torch.ones(()))
    return launches


@pytest.fixture
def measured(launched, type_names, tmp_path):
    """Rows of the table for some variants."""

    def measure(variants):
        found = {}
        for form, dtypes, width in variants:
            for launch in launched(form, dtypes, width):
                name = launch.kernel.__name__ + (" (classes)" if launch.values.get("p_begins") is not None else "")
                for sm in ARCHITECTURES:
                    row = (name, form, "/".join(type_names[d] for d in dtypes), str(width), str(sm))
                    _, found[row] = launch.compile(sm, tmp_path)
        return found

    return measure


@pytest.fixture
def table(resource_table):
    return resource_table("cos_nce_triton.md", COLUMNS, 5, "Triton")


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
    assert {row[1:4] for row in kept} == {
        (form, "/".join(type_names[d] for d in dtypes), str(width)) for form, dtypes, width in ALL
    }
    assert not {row for row, numbers in kept.items() if numbers[3] != "0"}


@pytest.mark.parametrize("width", [312, 768])
def test_aligned_rows_are_read_and_written_sixteen_bytes_at_a_time(width, launched, tmp_path):
    for launch in launched(width=width):
        ptx, _ = launch.compile(90, tmp_path)
        accesses = re.findall(r"(ld|st)\.global\S*?(\.v\d)?\.b(\d+)", ptx)
        assert {size for _, count, size in accesses if count == ".v4"} == {"32"}
        if launch.kernel.__name__ == "rows":
            narrow = [access for access in accesses if access[0] == "st" and access[1] != ".v4"]
            assert len(narrow) <= 1, "only losses are written one by one"


@pytest.mark.parametrize("form", ["vectors", "tokens", "classes"])
def test_other_batches_compile_nothing_anew(form, launched):
    variants = {
        tuple(launch.specialization() for launch in launched(
            form, samples=samples, positions=positions, layers=layers, classes=classes))
        for samples, classes in ((33, 1), (64, 9), (1000, 500))
        for positions in (1, 5, 16)
        for layers in (1, 3)
    }  # fmt: skip
    assert len(variants) == 1


@pytest.mark.parametrize(
    ("form", "samples", "names"),
    [("vectors", 70, "run_sums totals rows scale"), ("vectors", 16, "run_sums rows scale"),
     ("classes", 70, "run_sums totals run_sums totals rows scale"), ("no gradient", 70, "run_sums totals rows")],
)  # fmt: skip
def test_number_of_launches(form, samples, names, launched):
    assert [launch.kernel.__name__ for launch in launched(form, samples=samples)] == names.split()
