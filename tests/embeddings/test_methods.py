"""What the command's methods ask of the fit."""

import pytest
import torch

import fastkd
from fastkd.embeddings.methods import METHODS, code_bytes, setting, settings_to_try


def test_the_papers_method_has_no_residual():
    assert setting("sparse", 768) == {
        "keep": 0.1,
        "atoms": 8,
        "rows": "float16",
        "weights": "float16",
        "residual_bytes": 0,
    }


@pytest.mark.parametrize(
    ("method", "width", "numbers", "parts"),
    [
        ("residual", 768, None, 48),
        ("pq", 768, None, 128),
        ("pq", 768, 4, 192),
        ("residual", 312, None, 24),  # 19.5 is asked for, and 13 and 24 are the divisors beside it
        ("residual", 7, None, 1),
    ],
)
def test_a_residual_takes_the_divisor_of_the_width_nearest_to_what_is_asked_for(method, width, numbers, parts):
    assert setting(method, width, numbers_per_byte=numbers)["residual_bytes"] == parts


def test_product_quantisation_has_no_atoms():
    assert setting("pq", 64)["atoms"] == 0
    with pytest.raises(ValueError, match="atoms=4: in product quantisation"):
        setting("pq", 64, atoms=4)


@pytest.mark.parametrize("method", METHODS)
def test_the_grid_holds_each_setting_once_and_none_that_a_table_has_no_room_for(method):
    grid = settings_to_try(method, 200, 32, special=5)
    assert all(grid.count(each) == 1 for each in grid)
    for each in grid:
        assert max(5, each["atoms"]) <= int(each["keep"] * 200) < 200
        assert each["atoms"] <= 32
        assert (each["residual_bytes"] > 0) == (method != "sparse")
    assert len({each["keep"] for each in grid}) > 2
    assert {each["rows"] for each in grid} == {"float16", "int8"}


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_a_code_are_known_before_it_is_fitted(method):
    table, counts = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), torch.ones(300)
    grid = settings_to_try(method, 300, 16, special=5) + settings_to_try(method, 300, 16, special=5, rows="float32")
    for each in {str(sorted(each.items())): each for each in grid if each["keep"] in (0.1, 0.3)}.values():
        assert fastkd.SparseCode.fit(table, counts, **each).nbytes == code_bytes(each, 300, 16)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_leaves_out_larger_codes_and_the_least_that_leaves_one_is_named(method):
    sizes = sorted(code_bytes(each, 2000, 32) for each in settings_to_try(method, 2000, 32, special=5))
    for nbytes in (sizes[0], sizes[len(sizes) // 2]):
        grid = settings_to_try(method, 2000, 32, special=5, nbytes=nbytes)
        assert sorted(code_bytes(each, 2000, 32) for each in grid) == [size for size in sizes if size <= nbytes]
    with pytest.raises(ValueError, match=rf"too small for this table; the least for {method} is {sizes[0]:,} bytes"):
        settings_to_try(method, 2000, 32, special=5, nbytes=sizes[0] - 1)


def test_a_table_with_room_for_nothing_is_refused():
    with pytest.raises(ValueError, match="method=sparse: nothing to choose from for a table of 10 rows of 32, of whi"):
        settings_to_try("sparse", 10, 32, special=8)


def test_given_formats_are_not_varied():
    grid = settings_to_try("sparse", 2000, 32, special=5, rows="float32", weights="int8")
    assert {(each["rows"], each["weights"]) for each in grid} == {("float32", "int8")}
