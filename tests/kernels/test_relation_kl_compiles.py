"""Every variant of the Triton kernels becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and without spills.

The resources of all variants stand in docs/kernels/relation_kl_triton.md. Of them every kernel, form and class of
dtypes is compiled here and compared with it; after a change of the kernels write it anew (some minutes):

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_relation_kl_compiles.py
"""

import functools
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("there is no compiling Triton", allow_module_level=True)

import triton

from fastkd.kernels import relation_kl as kernels

COLUMNS = ("kernel", "form", "dtypes", "widths", "tokens", "sm", "warps", "registers", "shared bytes", "stack bytes")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

# form, dtypes and head widths of student and teacher, longest sequence
FEW = [
    ("self", (bf16, bf16), (32, 64), 128),
    ("self", (bf16, bf16), (16, 16), 512),
    ("self", (fp32, fp32), (16, 16), 512),
    ("self", (fp32, bf16), (32, 64), 512),
    ("self causal", (bf16, bf16), (32, 64), 512),
    ("cross", (bf16, bf16), (32, 64), 128),
    ("cross causal", (bf16, bf16), (32, 64), 512),
    ("no gradient", (bf16, bf16), (32, 64), 512),
]
ALL = [
    *FEW,
    *(("self", (bf16, bf16), (32, 64), length) for length in (16, 32, 64)),
    ("self", (bf16, bf16), (16, 16), 128),
    ("cross causal", (bf16, bf16), (32, 64), 128),
    ("cross", (bf16, bf16), (128, 128), 64),
    ("self", (fp32, fp32), (16, 16), 32),
    ("cross", (fp32, fp32), (128, 128), 32),
    *((form, (bf16, bf16), (32, 64), 512) for form in ("self", "cross")),
    *(("self", (bf16, bf16), widths, 512) for widths in ((6, 16), (26, 64), (64, 64), (128, 128))),
    ("self", (fp16, fp16), (32, 64), 512),
    *(("self", (fp32, fp32), widths, 512) for widths in ((32, 64), (64, 64), (128, 128))),
    ("cross", (fp32, fp32), (128, 128), 512),
    ("self", (bf16, fp32), (32, 64), 512),
]


@pytest.fixture
def launched(recorded_launches, monkeypatch):
    """What the launcher would start, of a form and a shape."""
    return functools.partial(_launched, recorded_launches, monkeypatch)


def _launched(
    recorded_launches,
    monkeypatch,
    form="self",
    dtypes=(bf16, bf16),
    widths=(32, 64),
    length=512,
    batch=2,
    sm=90,
    heads=12,
):
    with recorded_launches() as launches, monkeypatch.context() as patch:
        patch.setattr(kernels, "_architecture", lambda device: sm // 10)
        operands = [
            [torch.empty(batch, length, heads * width, dtype=dtype)] * 2
            for width, dtype in zip(widths, dtypes, strict=True)
        ]
        (student, student_right), (teacher, teacher_right) = operands
        cross = "cross" in form
        starts, lengths = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)
        kernels.relation_kl(
            student, student_right if cross else None, teacher, teacher_right if cross else None, starts, lengths,
            None, length, heads, "causal" in form, batch, form != "no gradient",
        )  # fmt: skip
    return launches


@pytest.fixture
def measured(launched, type_names, tmp_path):
    """Rows of the table for some variants."""

    def measure(variants):
        found = {}
        for form, dtypes, widths, length in variants:
            for sm in SHARED_LIMIT:
                for launch in launched(form, dtypes, widths, length, sm=sm):
                    name = launch.kernel.__name__ + (" (right)" if launch.values.get("ROWS") is False else "")
                    if name == "sequence_losses" and (form, length) != ("self", 512):
                        continue
                    types = "/".join(type_names[d] for d in dtypes)
                    row = (name, form, types, "{}/{}".format(*widths), str(length), str(sm))
                    if row not in found:
                        _, found[row] = launch.compile(sm, tmp_path)
        return found

    return measure


@pytest.fixture
def table(resource_table):
    return resource_table("relation_kl_triton.md", COLUMNS, 6, "Triton")


@pytest.mark.slow
def test_compiled_variants_agree_with_the_table(measured, table):
    if table.is_wanted_anew():
        table.write(measured(ALL), triton.__version__)
    found = measured(FEW)
    assert_fits(found)
    if table.is_of(triton.__version__):
        kept = table.read()
        assert found == {row: kept.get(row) for row in found}, "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def test_of_every_kernel_form_and_class_of_dtypes_a_variant_is_compiled(table, type_names):
    """bf16 stands for fp16, and one mixture of dtypes for the other."""
    few = {
        (form, "/".join(type_names[d] for d in dtypes), "{}/{}".format(*widths), str(length))
        for form, dtypes, widths, length in FEW
    }
    kept = table.read()
    compiled = {row for row in kept if row[1:5] in few}
    for column, left_out in ((0, set()), (1, set()), (2, {"fp16/fp16", "bf16/fp32"})):
        assert {row[column] for row in compiled} == {row[column] for row in kept} - left_out


def assert_fits(found):
    spilling = {row: numbers for row, numbers in found.items() if numbers[3] != "0"}
    too_large = {row: numbers for row, numbers in found.items() if int(numbers[2]) > SHARED_LIMIT[int(row[5])]}
    assert not spilling and not too_large


def test_no_variant_in_the_table_spills_or_asks_for_too_much_shared_memory(table, type_names):
    kept = table.read()
    assert {row[1:5] for row in kept} == {
        (form, "/".join(type_names[d] for d in dtypes), "{}/{}".format(*widths), str(length))
        for form, dtypes, widths, length in ALL
    }
    assert_fits(kept)


@pytest.mark.parametrize("form", ["self", "self causal", "cross"])
@pytest.mark.parametrize("widths", [(32, 64), (26, 64), (6, 16)])
@pytest.mark.parametrize("lengths", [(65, 100, 127, 128), (129, 255, 512, 1000, 4096)])
def test_lengths_and_batch_size_compile_nothing_anew(form, widths, lengths, launched):
    variants = {
        tuple(launch.specialization() for launch in launched(form, widths=widths, length=length, batch=batch))
        for length in lengths
        for batch in (1, 2, 5)
    }  # fmt: skip
    assert len(variants) == 1


@pytest.mark.parametrize(
    ("form", "length", "count"),
    [("self", 128, 2), ("cross", 128, 2), ("no gradient", 128, 2), ("no gradient", 512, 2), ("self", 512, 3),
     ("cross", 512, 4)],
)  # fmt: skip
def test_number_of_launches(form, length, count, launched):
    assert len(launched(form, length=length)) == count
