"""What the result tables share: scores of resampled examples."""

import numpy as np
import pytest

from fastkd.benchmarks.tables.protocol import Cells, interval, paired_difference
from fastkd.data.metrics import score


def examples(metric: str, seed: int = 0) -> list[np.ndarray]:
    """Labels and the predictions of two models, the first of which is the better one."""
    draw = np.random.default_rng(seed)
    if metric == "pearson":
        labels = draw.random(300)
        return [labels, labels + 0.2 * draw.random(300), labels + 5 * draw.random(300)]
    labels = draw.integers(2, size=300)
    return [labels, *(np.where(draw.random(300) < wrong, 1 - labels, labels) for wrong in (0.1, 0.4))]


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_the_difference_is_that_of_the_official_scores(metric):
    labels, one, other = examples(metric)
    expected = 100 * (score([metric], one, labels)[metric] - score([metric], other, labels)[metric])
    value, _ = paired_difference(metric, labels, one, other, resamples=10)
    assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_the_interval_holds_the_difference_and_tells_a_better_model(metric):
    labels, one, other = examples(metric)
    value, distribution = paired_difference(metric, labels, one, other, resamples=500)
    low, high = interval(distribution)
    assert 0 < low < value < high


def test_a_model_does_not_differ_from_itself():
    labels, one, _ = examples("accuracy")
    value, distribution = paired_difference("accuracy", labels, one, one, resamples=50)
    assert value == 0 and not distribution.any()


def test_a_model_that_says_one_class_only_has_no_correlation():
    labels, one, _ = examples("matthews")
    value, _ = paired_difference("matthews", labels, np.zeros_like(one), np.ones_like(one), resamples=10)
    assert value == 0


def test_of_two_commands_that_make_one_cell_the_first_ones_stays(tmp_path):
    one, other = Cells(tmp_path / "cells.jsonl"), Cells(tmp_path / "cells.jsonl")
    one.add("row", 0, "validation", settings={"rate": 1}, score=0.5)
    other.add("row", 0, "validation", settings={"rate": 1}, score=0.6)
    assert [cell["score"] for cell in one.all()] == [0.5]
    with pytest.raises(ValueError, match=r"holds 'row' .* made with"):
        other.add("row", 0, "validation", settings={"rate": 2}, score=0.6)
    other.add("row", 1, "validation", settings={"rate": 1}, score=0.7)
    assert len(one.find("row", "validation")) == 2
