"""Every Triton kernel of sparse_embedding becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and spills.

The resources stand in docs/kernels/sparse_embedding_triton.md. One variant is compiled here and compared with it; after
a change of the kernels write it anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_sparse_embedding_compiles.py
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

from fastkd.benchmarks.kernels.sparse_embedding import random_code
from fastkd.kernels import sparse_embedding as kernels

TABLE = Path(__file__).resolve().parents[2] / "docs/kernels/sparse_embedding_triton.md"
COLUMNS = ("kernel", "rows", "weights", "width", "residual", "sm", "warps", "registers", "shared bytes", "stack bytes")
ARCHITECTURES = (80, 90, 100)
fp32, bf16, fp16, int8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
TYPES = {fp32: "fp32", bf16: "bf16", fp16: "fp16", int8: "i8", torch.uint8: "u8", torch.uint16: "u16",
         torch.int32: "i32", torch.int64: "i64"}  # fmt: skip
KERNELS = {"lookup", "block", "contributions", "kept_gradient", "weight_gradient"}

# format of rows and of weights, width, residual bytes
FEW = [(fp16, fp16, 768, 0)]
ALL = [
    *FEW,
    *((rows, fp32, 768, 0) for rows in (fp32, bf16)),
    (int8, int8, 768, 48),
    *((fp16, fp16, width, 0) for width in (312, 384, 1024)),
    (fp32, fp32, 1600, 0),
]


def launched(monkeypatch, rows=fp16, weights=fp16, width=768, residual_bytes=0, tokens=6, vocabulary=40, atoms=8):
    """What a training step and a block would start: (kernel, value of each parameter, options)."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **named):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
        launches.append((kernel, values, options | {"debug": bool(kernel.debug)}))

    arrays = random_code(vocabulary, 10, width, atoms, rows=rows, weights=weights, residual_bytes=residual_bytes)
    ids = torch.zeros(2, tokens // 2, dtype=torch.int64)
    table, vector = torch.zeros(5, width), torch.zeros(width)
    wanted = rows != int8, weights != int8
    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        kernels.sparse_embedding(ids, *arrays, fp32)
        kernels.sparse_embedding_backward(torch.zeros(*ids.shape, width), ids, *arrays, -1, *wanted)
        kernels.embedding_block(ids, ids, ids, *arrays, table, table, vector, vector, 1e-12, fp32)
    return launches


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
    assert ("__assertfail" in compiled.asm["ptx"]) == options["debug"]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return int(registers), compiled.metadata.shared, int(stack)


def measured(monkeypatch, folder, variants):
    """{(kernel, rows, weights, width, residual, sm): (warps, registers, shared bytes, stack bytes)}, all as text."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))  # nothing may come from an earlier run
    return {
        (kernel.__name__, TYPES[rows], TYPES[weights], str(width), str(residual_bytes), str(sm)): tuple(
            map(str, (options["num_warps"], *resources(kernel, values, options, sm, folder)))
        )
        for rows, weights, width, residual_bytes in variants
        for kernel, values, options in launched(monkeypatch, rows, weights, width, residual_bytes)
        for sm in ARCHITECTURES
    }


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
    assert {row[0] for row in found} == KERNELS
    if f"Triton {triton.__version__}:" in TABLE.read_text(encoding="utf-8"):
        kept = table()
        assert found == {row: kept.get(row) for row in found}, "the kernels changed: FASTKD_WRITE_TABLES=1, see above"


def test_no_variant_in_the_table_spills():
    kept = table()
    assert {row[1:5] for row in kept} == {
        (TYPES[rows], TYPES[weights], str(width), str(residual)) for rows, weights, width, residual in ALL
    }
    assert not {row: numbers for row, numbers in kept.items() if numbers[3] != "0"}


def specialization(kernel, values):
    """What Triton compiles anew for: constants, types, and values of parameters that are not exempt from it."""
    return kernel.__name__, *(
        values[parameter.name] if parameter.is_constexpr
        else values[parameter.name].dtype if isinstance(values[parameter.name], torch.Tensor)
        else type(values[parameter.name]) if parameter.do_not_specialize or isinstance(values[parameter.name], float)
        else values[parameter.name]
        for parameter in kernel.params
    )  # fmt: skip


def test_other_batches_and_vocabularies_compile_nothing_anew(monkeypatch):
    variants = {
        tuple(specialization(kernel, values) for kernel, values, _ in launched(monkeypatch, tokens=t, vocabulary=size))
        for t in (2, 6, 32)
        for size in (40, 41, 48)
    }
    assert len(variants) == 1


def test_number_of_launches(monkeypatch):
    assert [kernel.__name__ for kernel, _, _ in launched(monkeypatch)] == [
        "lookup", "contributions", "kept_gradient", "weight_gradient", "block",
    ]  # fmt: skip
