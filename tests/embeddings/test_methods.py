"""What the command's methods ask of the fit."""

import pytest

from fastkd.embeddings.methods import METHODS, setting, settings_to_try


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


def test_a_budget_leaves_out_settings_whose_kept_rows_are_larger():
    grid = settings_to_try("sparse", 2000, 32, special=5, nbytes=12_800)
    assert {(each["keep"], each["rows"]) for each in grid} == {
        (0.02, "float16"), (0.05, "float16"), (0.1, "float16"), (0.02, "int8"), (0.05, "int8"), (0.1, "int8"),
        (0.2, "int8"),
    }  # fmt: skip


def test_given_formats_are_not_varied():
    grid = settings_to_try("sparse", 2000, 32, special=5, rows="float32", weights="int8")
    assert {(each["rows"], each["weights"]) for each in grid} == {("float32", "int8")}
