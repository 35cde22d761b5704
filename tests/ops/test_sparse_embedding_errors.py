"""What does not fit is refused by name before any work, and an id out of range names itself."""

import pytest
import torch

from fastkd.benchmarks.kernels.sparse_embedding import random_code
from fastkd.ops import sparse_embedding
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import embedding_block

IDS = torch.arange(9)


@pytest.fixture
def code(backend):
    arrays = random_code(40, 10, 24, 5, residual_bytes=6)
    return Arrays(*(None if array is None else array.to(backend.device) for array in arrays))


@pytest.fixture
def on_cpu(backend):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA an id out of range is a device assert, after which the process cannot go on")
    return backend


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [40, -1, 2**31 - 1, -(2**31)])
def test_an_id_out_of_range_is_named(code, on_cpu, wrong, dtype):
    ids = torch.tensor([[3, 7], [wrong, 5]], dtype=dtype)
    with pytest.raises(IndexError, match=f"id {wrong} is out of range: the table has 40 rows"):
        sparse_embedding(ids, code, backend=on_cpu.name)


def test_the_first_id_out_of_range_is_named_whatever_thread_finds_it(code, on_cpu):
    ids = torch.zeros(50000, dtype=torch.int64)
    ids[10::7] = 41 + torch.arange(len(ids[10::7]))
    with pytest.raises(IndexError, match="id 41 is out of range"):
        sparse_embedding(ids, code, backend=on_cpu.name)


def test_an_id_far_beyond_is_not_cut_to_32_bits(code, on_cpu):
    with pytest.raises(IndexError, match=f"id {2**32 + 1} is out of range"):
        sparse_embedding(torch.tensor([2**32 + 1]), code, backend=on_cpu.name)


@pytest.mark.parametrize("backend", [("cpp", "cpu")], ids=["cpp"], indirect=True)
@pytest.mark.parametrize(("name", "value"), [("slot", 40), ("slot", 65535), ("atom_ids", 10), ("atom_ids", 65535)])
def test_a_code_that_points_outside_its_arrays_is_refused_where_it_is_read(code, backend, name, value):
    damaged = code._replace(**{name: torch.full_like(getattr(code, name), value)})
    rare = (code.slot.long() >= 10).nonzero()[:1, 0]
    with pytest.raises(ValueError, match=rf"the code is damaged: .* token {rare.item()} points outside"):
        sparse_embedding(rare, damaged, backend=backend.name)


@pytest.mark.parametrize(("name", "rows"), [("position_ids", 9), ("token_type_ids", 2)])
def test_a_position_or_type_out_of_range_is_named(code, on_cpu, name, rows):
    what = "position id" if name == "position_ids" else "token type id"
    for wrong in (-1, rows):
        given = {name: torch.zeros(1, 9, dtype=torch.int64).index_fill(1, torch.tensor([4]), wrong)}
        with pytest.raises(IndexError, match=f"{what} {wrong} is out of range: the table has {rows} rows"):
            embedding_block(IDS[None], code, torch.zeros(9, 24), torch.ones(24), torch.zeros(24),
                            types=torch.zeros(2, 24), backend=on_cpu.name, **given)  # fmt: skip


def replaced(**arrays):
    return lambda code: code._replace(**{name: change(code) for name, change in arrays.items()})


UNFIT = {
    "slot of floats": (replaced(slot=lambda c: c.slot.float()), TypeError, "slot is torch.float32; allowed are uint16"),
    "one token too many": (
        replaced(slot=lambda c: torch.zeros(41, dtype=torch.int32)), ValueError, "10 kept and 30 coded rows are not"),
    "flat rows": (replaced(kept=lambda c: c.kept.flatten()), ValueError, r"kept has shape \(240,\); expected 2 dim"),
    "no weights": (replaced(atom_weights=lambda c: None), TypeError, "atom_weights must be a tensor, not NoneType"),
    "one weight too few": (
        replaced(atom_weights=lambda c: c.atom_weights[:, :4]), ValueError, r"atom_weights has shape \(30, 4\)"),
    "rows without their scale": (
        replaced(kept=lambda c: c.kept.to(torch.int8)), ValueError, "kept_scale belongs to int8 values"),
    "a scale without int8": (
        replaced(weight_scale=lambda c: torch.ones(30)), ValueError, "weight_scale belongs to int8 values"),
    "a scale too short": (
        replaced(kept=lambda c: c.kept.to(torch.int8), kept_scale=lambda c: torch.ones(9)), ValueError,
        "kept_scale has 9 values for 10 rows"),
    "a residual without codebook": (
        replaced(codebook=lambda c: None), ValueError, "residual and codebook belong together"),
    "a residual too short": (replaced(residual=lambda c: c.residual[:7]), ValueError, "residual has 7 rows for 30"),
    "a codebook of another width": (
        replaced(codebook=lambda c: c.codebook[..., :3]), ValueError, r"codebook has shape \(6, 256, 3\)"),
    "fp64 weights beside fp32 rows": (
        replaced(atom_weights=lambda c: c.atom_weights.double()), TypeError, "atom_weights is float64"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("backend", [("reference", "cpu")], ids=["reference"], indirect=True)
def test_arrays_that_do_not_fit_are_named(code, backend, change, error, message):
    with pytest.raises(error, match=message):
        sparse_embedding(IDS, change(code), backend=backend.name)


def test_options_that_do_not_fit_are_named():
    code = random_code(40, 10, 24, 5)
    with pytest.raises(TypeError, match=r"ids is torch\.float32; allowed are int32 and int64"):
        sparse_embedding(IDS.float(), code)
    with pytest.raises(TypeError, match=r"ids must be a tensor, not list"):
        sparse_embedding([1, 2], code)
    with pytest.raises(TypeError, match=r"code must be a SparseCode or Arrays, not Tensor"):
        sparse_embedding(IDS, torch.zeros(40, 24))
    with pytest.raises(TypeError, match=r"dtype=torch\.int8; allowed are float32"):
        sparse_embedding(IDS, code, dtype=torch.int8)
    for padding_idx in (40, -41):
        with pytest.raises(ValueError, match=f"padding_idx={padding_idx} is outside the table's 40 rows"):
            sparse_embedding(IDS, code, padding_idx=padding_idx)
    with pytest.raises(ValueError, match="backend='fast' is not a backend"):
        sparse_embedding(IDS, code, backend="fast")
    with pytest.raises(RuntimeError, match="the CUDA kernel runs on CUDA devices, the tensors are on cpu"):
        sparse_embedding(IDS, code, backend="cuda")


def test_double_precision_runs_on_the_reference_alone():
    code = random_code(40, 10, 24, 5)
    double = code._replace(kept=code.kept.double())
    assert sparse_embedding(IDS, double, dtype=torch.float64).dtype == torch.float64
    for arrays, dtype in ((double, torch.float32), (code, torch.float64)):
        with pytest.raises(RuntimeError, match=r"takes float32, .* and int8, not torch.float64|compiled part"):
            sparse_embedding(IDS, arrays, dtype=dtype, backend="cpp")


BLOCK = {"positions": torch.zeros(9, 24), "norm_weight": torch.ones(24), "norm_bias": torch.zeros(24)}


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"positions": torch.zeros(8, 24)}, ValueError, "ids has 9 positions, the position table 8 rows"),
    ({"positions": torch.zeros(9, 23)}, ValueError, r"positions has shape \(9, 23\); expected \(rows, 24\)"),
    ({"norm_bias": torch.zeros(1, 24)}, ValueError, r"norm_bias has shape \(1, 24\); expected \(24,\)"),
    ({"types": torch.zeros(2, 24).half()}, TypeError, "types is torch.float16"),
    ({"norm_weight": None}, TypeError, "norm_weight must be a tensor, not NoneType"),
    ({"token_type_ids": IDS}, ValueError, "without the table `types`"),
    ({"position_ids": IDS[:4]}, ValueError, r"position_ids has shape \(4,\), ids \(9,\)"),
    ({"position_ids": IDS.float()}, TypeError, r"position_ids is torch\.float32"),
])  # fmt: skip
def test_a_block_that_does_not_fit_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        embedding_block(IDS, random_code(40, 10, 24, 5), **BLOCK | options)


def test_a_block_gives_no_gradient_and_says_so():
    tables = BLOCK | {"norm_weight": torch.ones(24, requires_grad=True)}
    code = random_code(40, 10, 24, 5)
    with pytest.raises(RuntimeError, match="embedding_block is for inference"):
        embedding_block(IDS, code, **tables)
    with torch.no_grad():
        embedding_block(IDS, code, **tables)
