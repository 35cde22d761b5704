"""Every Triton kernel of cos_nce becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and without spills.

The resources stand in docs/kernels/cos_nce_triton.md. One variant is compiled here and compared with it; after a change
of the kernels write it anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_cos_nce_compiles.py
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

from fastkd.kernels import cos_nce as kernels

TABLE = Path(__file__).resolve().parents[2] / "docs/kernels/cos_nce_triton.md"
COLUMNS = ("kernel", "form", "dtypes", "width", "sm", "warps", "registers", "shared bytes", "stack bytes")
ARCHITECTURES = (80, 90, 100)
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
TYPES = {fp32: "fp32", bf16: "bf16", fp16: "fp16", torch.bool: "i1", torch.int32: "i32", torch.int64: "i64"}
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


def launched(monkeypatch, form="vectors", dtypes=(bf16, bf16), width=768, samples=70, positions=1, layers=2, classes=7):
    """What a training step would start: (kernel, value of each parameter, options)."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **named):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
        launches.append((kernel, values, options))

    student, teacher = (torch.zeros(layers, samples, positions, width, dtype=dtype) for dtype in dtypes)
    classes = classes if form == "classes" else 0
    class_of = torch.zeros(samples, dtype=torch.int32) if classes else None
    mask, weights = (torch.ones(samples, positions, dtype=torch.bool), torch.ones(samples)) * (form == "tokens") or (
        None, None,
    )  # fmt: skip
    counts = torch.ones(1 + classes, positions)
    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        sums = kernels.cos_nce_sums(teacher, mask, class_of, classes)
        with_grad = form != "no gradient"
        _, grad = kernels.cos_nce(
            student, teacher, sums, counts, mask, class_of, True, weights, samples, with_grad
        )  # fmt: skip
        kernels.cos_nce_scale(grad, torch.ones(()))
    return launches


def resources(kernel, values, options, sm, folder):
    """Compile for one architecture; PTX, registers per thread, shared and stack bytes."""
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
    return compiled.asm["ptx"], int(registers), compiled.metadata.shared, int(stack)


def measured(monkeypatch, folder, variants):
    """{(kernel, form, dtypes, width, sm): (warps, registers, shared bytes, stack bytes)}, all as text."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))  # nothing may come from an earlier run
    found = {}
    for form, dtypes, width in variants:
        for kernel, values, options in launched(monkeypatch, form, dtypes, width):
            name = kernel.__name__ + (" (classes)" if values.get("p_begins") is not None else "")
            for sm in ARCHITECTURES:
                row = (name, form, "/".join(TYPES[d] for d in dtypes), str(width), str(sm))
                _, *numbers = resources(kernel, values, options, sm, folder)
                found[row] = tuple(map(str, (options["num_warps"], *numbers)))
    return found


def table():
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {tuple(row[:5]): tuple(row[5:]) for row in rows[2:]}


def write(found):
    head, *_ = TABLE.read_text(encoding="utf-8").partition("Triton ")
    lines = [f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *(k + v for k, v in found.items())]]
    TABLE.write_text(head + f"Triton {triton.__version__}:\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_compiled_variants_agree_with_the_table(monkeypatch, tmp_path):
    if os.environ.get("FASTKD_WRITE_TABLES") == "1":
        write(measured(monkeypatch, tmp_path, ALL))
    found = measured(monkeypatch, tmp_path, FEW)
    assert {row[0] for row in found} == KERNELS
    if f"Triton {triton.__version__}:" in TABLE.read_text(encoding="utf-8"):
        kept = table()
        assert found == {row: kept.get(row) for row in found}, "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def test_no_variant_in_the_table_spills():
    kept = table()
    assert {row[1:4] for row in kept} == {
        (form, "/".join(TYPES[d] for d in dtypes), str(width)) for form, dtypes, width in ALL
    }
    assert not {row for row, numbers in kept.items() if numbers[3] != "0"}


@pytest.mark.parametrize("width", [312, 768])
def test_aligned_rows_are_read_and_written_sixteen_bytes_at_a_time(width, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, values, options in launched(monkeypatch, width=width):
        ptx, *_ = resources(kernel, values, options, 90, tmp_path)
        accesses = re.findall(r"(ld|st)\.global\S*?(\.v\d)?\.b(\d+)", ptx)
        assert {size for _, count, size in accesses if count == ".v4"} == {"32"}
        if kernel.__name__ == "rows":
            narrow = [access for access in accesses if access[0] == "st" and access[1] != ".v4"]
            assert len(narrow) <= 1, "only losses are written one by one"


def specialization(kernel, values):
    """What Triton compiles anew for: constants, types, and values of parameters that are not exempt from it."""
    return kernel.__name__, *(
        values[parameter.name] if parameter.is_constexpr
        else values[parameter.name].dtype if isinstance(values[parameter.name], torch.Tensor)
        else type(values[parameter.name]) if parameter.do_not_specialize or isinstance(values[parameter.name], float)
        else values[parameter.name]
        for parameter in kernel.params
    )  # fmt: skip


@pytest.mark.parametrize("form", ["vectors", "tokens", "classes"])
def test_other_batches_compile_nothing_anew(form, monkeypatch):
    variants = {
        tuple(specialization(kernel, values) for kernel, values, _ in launched(
            monkeypatch, form, samples=samples, positions=positions, layers=layers, classes=classes))
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
def test_number_of_launches(form, samples, names, monkeypatch):
    assert [kernel.__name__ for kernel, _, _ in launched(monkeypatch, form, samples=samples)] == names.split()
