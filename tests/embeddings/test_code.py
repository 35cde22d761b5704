"""The container: what it weighs, what it stands for, and that a file is checked before it is used."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastkd
from fastkd.embeddings.code import check_arrays, decode_rows, encode_rows

FORMATS = [("float32", "float16", 0), ("float16", "float32", 0), ("int8", "int8", 0), ("int8", "int8", 4)]


def fit(rows="float32", weights="float16", residual_bytes=0, vocabulary=60, width=8):
    table = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(vocabulary).flip(0)
    return fastkd.SparseCode.fit(
        table, counts, keep=0.3, atoms=3, rows=rows, weights=weights, residual_bytes=residual_bytes
    )


@pytest.mark.parametrize(("rows", "weights", "residual_bytes"), FORMATS)
def test_a_file_gives_back_every_array_bit_for_bit(tmp_path, rows, weights, residual_bytes):
    code = fit(rows, weights, residual_bytes)
    code.save(tmp_path / "code.safetensors")
    loaded = fastkd.SparseCode.load(tmp_path / "code.safetensors")
    for name, array in code.arrays._asdict().items():
        other = getattr(loaded.arrays, name)
        assert (other is None) == (array is None), name
        assert array is None or (other.dtype == array.dtype and torch.equal(other, array)), name


def test_saving_replaces_a_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "code.safetensors"
    fit("int8", "int8", 4).save(path)
    code = fit()
    code.save(path)
    assert torch.equal(fastkd.SparseCode.load(path).dense(), code.dense())
    assert [file.name for file in tmp_path.iterdir()] == ["code.safetensors"]


def test_a_file_is_not_saved_over_a_folder_or_below_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match=r"path=.* is a folder; name a file"):
        fit().save(tmp_path)
    with pytest.raises(ValueError, match=r"path=.*code: there is no folder .*absent"):
        fit().save(tmp_path / "absent" / "code")
    assert not list(tmp_path.iterdir()) and not tmp_path.with_name(f"{tmp_path.name}.unfinished").exists()


def test_a_code_that_does_not_fit_together_is_not_written(tmp_path):
    code = fit()
    wrong = fastkd.SparseCode(code.arrays._replace(atom_weights=code.arrays.atom_weights[1:]))
    with pytest.raises(ValueError, match="atom_weights"):
        wrong.save(tmp_path / "code.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rows", "weights", "residual_bytes"), FORMATS)
def test_dense_is_the_formula_row_by_row(rows, weights, residual_bytes):
    code = fit(rows, weights, residual_bytes)
    arrays, table = code.arrays, code.dense()
    kept = decode_rows(arrays.kept, arrays.kept_scale)
    atom_weights = decode_rows(arrays.atom_weights, arrays.weight_scale)
    for token in range(code.num_embeddings):
        slot = int(arrays.slot[token])
        if slot < code.num_kept:
            expected = kept[slot]
        else:
            coded = slot - code.num_kept
            expected = (atom_weights[coded][:, None] * kept[arrays.atom_ids[coded].long()]).sum(0)
            if residual_bytes:
                quantised = [arrays.codebook[m, int(c)] for m, c in enumerate(arrays.residual[coded])]
                expected = expected + torch.cat(quantised).float()
        torch.testing.assert_close(table[token], expected)


def test_dense_comes_in_the_dtype_asked_for():
    code = fit()
    assert code.dense(torch.float16).dtype == torch.float16
    assert torch.equal(code.dense(torch.float16), code.dense().half())


def test_sizes_are_those_of_the_arrays():
    code = fit("int8", "int8", 4)
    assert (code.num_embeddings, code.embedding_dim, code.num_kept, code.num_atoms) == (60, 8, 18, 3)
    coded = 42
    assert code.nbytes == 60 * 2 + 18 * (8 + 4) + coded * (3 * (2 + 1) + 2) + coded * 4 + 256 * 8 * 2


def test_moving_keeps_arrays_and_errors():
    code = fit("int8", "int8", 4).to("cpu")
    assert torch.equal(code.dense(), fit("int8", "int8", 4).dense())
    assert code.error is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_rows_are_off_by_half_a_step_at_most(dtype):
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored, scale = encode_rows(rows, torch.int8)
    assert ((decode_rows(stored, scale) - rows.float()).abs() <= 0.501 * scale[:, None]).all()


def test_int8_rows_of_zeros_come_back_as_zeros():
    stored, scale = encode_rows(torch.zeros(2, 4), torch.int8)
    assert scale.isfinite().all() and not decode_rows(stored, scale).any()


def test_rows_that_fp16_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"float16 cannot hold values up to 7e\+04; float32 and int8 can"):
        encode_rows(torch.tensor([[7e4]]), torch.float16)


def _with(array, index, value):
    changed = array.clone()
    changed[index] = value
    return changed


WRONG = {
    "a slot beyond the table": ({"slot": lambda a: _with(a, 3, 60)}, r"slot holds 60; it must lie in \[0, 60\)"),
    "an atom that is not kept": ({"atom_ids": lambda a: _with(a, (0, 0), 18)}, r"atom_ids holds 18.*\[0, 18\)"),
    "a negative atom": ({"atom_ids": lambda a: _with(a.int(), (0, 0), -1)}, "atom_ids holds -1"),
    "NaN among kept rows": ({"kept": lambda a: _with(a, (0, 0), float("nan"))}, "kept holds NaN"),
    "an infinite weight": ({"atom_weights": lambda a: _with(a, (0, 0), float("inf"))}, "atom_weights holds NaN or inf"),
    "a wrong dtype": ({"slot": lambda a: a.long()}, "slot is torch.int64; allowed are uint16, int32"),
    "too few weights": ({"atom_weights": lambda a: a[:, 1:]}, "atom_weights has shape"),
    "too few coded rows": ({"atom_ids": lambda a: a[1:], "atom_weights": lambda a: a[1:]}, "41 coded rows"),
    "scales of rows that need none": ({"kept_scale": lambda a: torch.ones(18)}, "kept_scale belongs to int8"),
    "a residual without codebook": (
        {"residual": lambda a: torch.zeros(42, 4, dtype=torch.uint8)},
        "residual and codebook belong together",
    ),
    "coded rows of nothing": ({"atom_ids": lambda a: a[:, :0], "atom_weights": lambda a: a[:, :0]}, "would be empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_whose_arrays_are_wrong_is_refused_by_name(tmp_path, case):
    changes, message = WRONG[case]
    arrays = fit().arrays
    arrays = arrays._replace(**{name: change(getattr(arrays, name)) for name, change in changes.items()})
    with pytest.raises(ValueError, match=message):
        check_arrays(arrays)
    path = tmp_path / "wrong.safetensors"
    save_file({name: array.contiguous() for name, array in arrays._asdict().items() if array is not None}, path)
    with pytest.raises(ValueError, match=rf"wrong\.safetensors: .*{message}"):
        fastkd.SparseCode.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "code.safetensors"
    fit().save(path)
    for size in (0, 5, 100, path.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut is no safetensors file, or not all of one"):
            fastkd.SparseCode.load(tmp_path / "cut")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no safetensors file"):
        fastkd.SparseCode.load(tmp_path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors holds no sparse code: it lacks slot, .* has weight bes"):
        fastkd.SparseCode.load(tmp_path / "model.safetensors")


def test_a_file_that_lacks_an_array_is_refused(tmp_path):
    path = tmp_path / "code.safetensors"
    fit().save(path)
    arrays = load_file(path)
    del arrays["atom_ids"]
    save_file(arrays, path)
    with pytest.raises(ValueError, match="lacks atom_ids"):
        fastkd.SparseCode.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        fastkd.SparseCode.load(tmp_path / "absent.safetensors")
