"""Every Triton kernel of sparse_embedding becomes a cubin for sm_80, sm_90 and sm_100, without a GPU and spills.

The resources stand in docs/kernels/sparse_embedding_triton.md. One variant is compiled here and compared with it; after
a change of the kernels write it anew:

    FASTKD_WRITE_TABLES=1 python -m pytest tests/kernels/test_sparse_embedding_compiles.py
"""

import functools
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("there is no compiling Triton", allow_module_level=True)

import triton

from fastkd.benchmarks.kernels.sparse_embedding import random_code
from fastkd.kernels import sparse_embedding as kernels

COLUMNS = ("kernel", "rows", "weights", "width", "residual", "sm", "warps", "registers", "shared bytes", "stack bytes")
ARCHITECTURES = (80, 90, 100)
fp32, bf16, fp16, int8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
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


@pytest.fixture
def launched(recorded_launches):
    """What a training step and a block would start, of a format and a shape."""
    return functools.partial(_launched, recorded_launches)


def _launched(
    recorded_launches, rows=fp16, weights=fp16, width=768, residual_bytes=0, tokens=6, vocabulary=40, atoms=8
):
    arrays = random_code(vocabulary, 10, width, atoms, rows=rows, weights=weights, residual_bytes=residual_bytes)
    ids = torch.zeros(2, tokens // 2, dtype=torch.int64)
    table, vector = torch.zeros(5, width), torch.zeros(width)
    wanted = rows != int8, weights != int8
    with recorded_launches() as launches:
        kernels.sparse_embedding(ids, *arrays, fp32)
        kernels.sparse_embedding_backward(torch.zeros(*ids.shape, width), ids, *arrays, -1, *wanted)
        kernels.embedding_block(ids, ids, ids, *arrays, table, table, vector, vector, 1e-12, fp32)
    return launches


@pytest.fixture
def measured(launched, type_names, tmp_path):
    """Rows of the table for some variants."""

    def measure(variants):
        found = {}
        for rows, weights, width, residual_bytes in variants:
            for launch in launched(rows, weights, width, residual_bytes):
                for sm in ARCHITECTURES:
                    row = (
                        launch.kernel.__name__, type_names[rows], type_names[weights], str(width), str(residual_bytes),
                        str(sm),
                    )  # fmt: skip
                    _, found[row] = launch.compile(sm, tmp_path)
        return found

    return measure


@pytest.fixture
def table(resource_table):
    return resource_table("sparse_embedding_triton.md", COLUMNS, 6, "Triton")


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
    assert {row[1:5] for row in kept} == {
        (type_names[rows], type_names[weights], str(width), str(residual)) for rows, weights, width, residual in ALL
    }
    assert not {row: numbers for row, numbers in kept.items() if numbers[3] != "0"}


def test_other_batches_and_vocabularies_compile_nothing_anew(launched):
    variants = {
        tuple(launch.specialization() for launch in launched(tokens=t, vocabulary=size))
        for t in (2, 6, 32)
        for size in (40, 41, 48)
    }
    assert len(variants) == 1


def test_number_of_launches(launched):
    assert [launch.kernel.__name__ for launch in launched()] == [
        "lookup", "contributions", "kept_gradient", "weight_gradient", "block",
    ]  # fmt: skip
