"""Every variant of the Triton kernels becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and without spills.

The resources of all variants stand in docs/kernels/relation_kl_triton.md. A few variants are compiled here and compared
with it; after a change of the kernels write it anew (some minutes):

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_relation_kl_compiles.py
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("there is no compiling Triton", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd.kernels import relation_kl as kernels

TABLE = Path(__file__).resolve().parents[2] / "docs/kernels/relation_kl_triton.md"
COLUMNS = ("kernel", "form", "dtypes", "widths", "tokens", "sm", "warps", "registers", "shared bytes", "stack bytes")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

# form, dtypes and head widths of student and teacher, longest sequence
FEW = [("self", (bf16, bf16), (32, 64), 128), ("self", (bf16, bf16), (16, 16), 512)]
ALL = [
    *FEW,
    *(("self", (bf16, bf16), (32, 64), length) for length in (16, 32, 64)),
    ("self", (bf16, bf16), (16, 16), 128),
    ("cross", (bf16, bf16), (32, 64), 128),
    ("cross causal", (bf16, bf16), (32, 64), 128),
    ("cross", (bf16, bf16), (128, 128), 64),
    ("self", (fp32, fp32), (16, 16), 32),
    ("cross", (fp32, fp32), (128, 128), 32),
    *((form, (bf16, bf16), (32, 64), 512) for form in ("self", "self causal", "cross", "cross causal", "no gradient")),
    *(("self", (bf16, bf16), widths, 512) for widths in ((6, 16), (26, 64), (64, 64), (128, 128))),
    ("self", (fp16, fp16), (32, 64), 512),
    *(("self", (fp32, fp32), widths, 512) for widths in ((16, 16), (32, 64), (64, 64), (128, 128))),
    ("cross", (fp32, fp32), (128, 128), 512),
    ("self", (fp32, bf16), (32, 64), 512),
    ("self", (bf16, fp32), (32, 64), 512),
]


def launched(monkeypatch, form="self", dtypes=(bf16, bf16), widths=(32, 64), length=512, batch=2, sm=90, heads=12):
    """What the launcher would start: (kernel, value of each parameter, options)."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **named):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
        launches.append((kernel, values, options))

    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
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
            None, length, heads, "causal" in form, form != "no gradient",
        )  # fmt: skip
    return launches


def specialization(kernel, values):
    """What Triton compiles anew for: constants, types and alignments; and values, unless they are exempt from it."""
    return kernel.__name__, *(
        values[parameter.name] if parameter.is_constexpr
        else (values[parameter.name].dtype, values[parameter.name].data_ptr() % 16 == 0)
        if isinstance(values[parameter.name], torch.Tensor)
        else type(values[parameter.name]) if parameter.do_not_specialize or isinstance(values[parameter.name], float)
        else values[parameter.name]
        for parameter in kernel.params
    )  # fmt: skip


def resources(kernel, values, options, sm, folder):
    """Compile for one architecture; registers per thread, shared and stack bytes."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    assert f".target sm_{sm}" in compiled.asm["ptx"]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return int(registers), compiled.metadata.shared, int(stack)


def measured(monkeypatch, folder, variants):
    """{(kernel, form, dtypes, widths, tokens, sm): (warps, registers, shared bytes, stack bytes)}, all as text."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))  # nothing may come from an earlier run
    found = {}
    for form, dtypes, widths, length in variants:
        for sm in SHARED_LIMIT:
            for kernel, values, options in launched(monkeypatch, form, dtypes, widths, length, sm=sm):
                name = kernel.__name__ + (" (right)" if values.get("ROWS") is False else "")
                if name == "sequence_losses" and (form, length) != ("self", 512):
                    continue
                row = (name, form, "/".join(TYPES[d] for d in dtypes), "{}/{}".format(*widths), str(length), str(sm))
                if row not in found:
                    numbers = options["num_warps"], *resources(kernel, values, options, sm, folder)
                    found[row] = tuple(map(str, numbers))
    return found


def table():
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {tuple(row[:6]): tuple(row[6:]) for row in rows[2:]}


def write(found):
    head, *_ = TABLE.read_text(encoding="utf-8").partition("Triton ")
    lines = [f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *(k + v for k, v in found.items())]]
    TABLE.write_text(head + f"Triton {triton.__version__}:\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_compiled_variants_agree_with_the_table(monkeypatch, tmp_path):
    if os.environ.get("FASTKD_WRITE_TABLES") == "1":
        write(measured(monkeypatch, tmp_path, ALL))
    found = measured(monkeypatch, tmp_path, FEW)
    assert_fits(found)
    if f"Triton {triton.__version__}:" in TABLE.read_text(encoding="utf-8"):
        kept = table()
        assert found == {row: kept.get(row) for row in found}, "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def assert_fits(found):
    spilling = {row: numbers for row, numbers in found.items() if numbers[3] != "0"}
    too_large = {row: numbers for row, numbers in found.items() if int(numbers[2]) > SHARED_LIMIT[int(row[5])]}
    assert not spilling and not too_large


def test_no_variant_in_the_table_spills_or_asks_for_too_much_shared_memory():
    kept = table()
    assert {row[1:5] for row in kept} == {
        (form, "/".join(TYPES[d] for d in dtypes), "{}/{}".format(*widths), str(length))
        for form, dtypes, widths, length in ALL
    }
    assert_fits(kept)


@pytest.mark.parametrize("form", ["self", "self causal", "cross"])
@pytest.mark.parametrize("widths", [(32, 64), (26, 64), (6, 16)])
@pytest.mark.parametrize("lengths", [(65, 100, 127, 128), (129, 255, 512, 1000, 4096)])
def test_lengths_and_batch_size_compile_nothing_anew(form, widths, lengths, monkeypatch):
    variants = {
        tuple(specialization(kernel, values) for kernel, values, _ in launched(monkeypatch, form, widths=widths,
                                                                               length=length, batch=batch))
        for length in lengths
        for batch in (1, 2, 5)
    }  # fmt: skip
    assert len(variants) == 1


@pytest.mark.parametrize(
    ("form", "length", "count"),
    [("self", 128, 2), ("cross", 128, 2), ("no gradient", 128, 2), ("no gradient", 512, 2), ("self", 512, 3),
     ("cross", 512, 4)],
)  # fmt: skip
def test_number_of_launches(form, length, count, monkeypatch):
    assert len(launched(monkeypatch, form, length=length)) == count
