"""Choosing among codes: the front, the best within bytes, the smallest that is good enough."""

import pytest
import torch

from fastkd.embeddings.budget import (
    Candidate,
    best_within,
    pareto_front,
    plot_front,
    reconstruction_error,
    smallest_above,
    sweep,
)


@pytest.fixture
def candidates():
    points = {"a": (10, 0.2), "b": (20, 0.5), "c": (25, 0.4), "d": (30, 0.5), "e": (40, 0.9), "f": (10, 0.1)}
    return [Candidate({"name": name}, *point) for name, point in points.items()]


def names(candidates):
    return "".join(candidate.setting["name"] for candidate in candidates)


def test_on_the_front_nothing_else_is_as_small_and_as_good(candidates):
    front = pareto_front(candidates)
    assert names(front) == "abe"
    for candidate in candidates:
        assert any(each.nbytes <= candidate.nbytes and each.quality >= candidate.quality for each in front)


@pytest.mark.parametrize(("nbytes", "name"), [(10, "a"), (19, "a"), (39, "b"), (1000, "e")])
def test_the_best_within_a_budget(candidates, nbytes, name):
    assert names([best_within(candidates, nbytes)]) == name


@pytest.mark.parametrize(("quality", "name"), [(0.0, "a"), (0.5, "b"), (0.51, "e")])
def test_the_smallest_that_is_good_enough(candidates, quality, name):
    assert names([smallest_above(candidates, quality)]) == name


def test_what_cannot_be_had_is_said_with_what_can(candidates):
    with pytest.raises(ValueError, match="budget=9 bytes: the smallest code tried has 10 bytes"):
        best_within(candidates, 9)
    with pytest.raises(ValueError, match=r"no code tried reaches 0\.95; the best has 0\.9"):
        smallest_above(candidates, 0.95)


def test_a_sweep_fits_and_judges_each_setting_once(make_model, make_code):
    model, seen = make_model(), []

    def fit(**setting):
        seen.append(setting)
        return make_code(model, **setting)

    settings = [{"kept": 40}, {"kept": 10}, {"kept": 20}]
    found = sweep(settings, fit, lambda code: code.num_kept / 90)
    assert seen == settings
    assert [each.setting["kept"] for each in found] == [10, 20, 40], "by bytes"
    assert [each.quality for each in found] == [10 / 90, 20 / 90, 40 / 90]
    assert all(each.nbytes == make_code(model, **each.setting).nbytes for each in found)


def test_the_error_counts_rows_as_often_as_the_text_has_them(make_model, make_code):
    model = make_model()
    table, code = model.get_input_embeddings().weight, make_code(model)
    slot = code.arrays.slot.long()
    kept_only, coded_only = (slot < 20).long(), (slot >= 20).long()
    assert reconstruction_error(table, code, kept_only) == 0
    missed = (table - code.dense())[slot >= 20]
    assert reconstruction_error(table, code, coded_only) == pytest.approx(
        (missed.norm() / table[slot >= 20].norm()).item()
    )
    mixed = reconstruction_error(table, code, kept_only * 3 + coded_only)
    assert 0 < mixed < reconstruction_error(table, code, torch.ones(90, dtype=torch.int64))


def test_the_plot_is_written(candidates, tmp_path):
    dense = Candidate({}, 100, 1.0)
    plot_front(candidates, candidates[1], tmp_path / "front.png", label="accuracy", dense=dense)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
