import logging

import numpy as np
import pytest

from fastkd.data import METRICS, score


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 4 / 6),
        ("balanced_accuracy", (3 / 4 + 1 / 2) / 2),
        ("f1", 0.75),
        ("matthews", (3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5),
    ],
)
def test_classification_metrics_have_their_textbook_values(name, expected):
    labels, predictions = np.array([1, 1, 1, 1, 0, 0]), np.array([1, 1, 1, 0, 1, 0])
    assert score([name], predictions, labels)[name] == pytest.approx(expected)


def test_pearson_sees_values_and_spearman_only_ranks():
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    scores = score(["pearson", "spearman"], labels**3, labels)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(np.corrcoef(labels, labels**3)[0, 1])
    assert scores["pearson"] < 0.95


def test_half_precision_predictions_are_correlated_in_double():
    labels = np.linspace(0, 5, 2000, dtype=np.float32)
    assert score(["pearson"], (labels * 1000).astype(np.float16), labels)["pearson"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["pearson", "spearman", "matthews"])
def test_a_constant_prediction_scores_zero_and_says_why(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert score([name], np.array([1, 1, 1]), np.array([0, 1, 1])) == {name: 0.0}
    assert f"{name} is undefined when every prediction is the same" in caplog.text


def test_f1_without_a_positive_prediction_is_zero():
    assert score(["f1"], np.array([0, 0]), np.array([0, 1])) == {"f1": 0.0}


def test_every_metric_is_a_plain_float():
    scores = score(list(METRICS), np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]))
    assert {type(value) for value in scores.values()} == {float}


def test_a_nan_prediction_is_named_by_its_row():
    with pytest.raises(ValueError, match="1 of 3 predictions are NaN or infinite, the first at row 2"):
        score(["pearson"], np.array([1.0, 2.0, np.nan]), np.array([1.0, 2.0, 3.0]))


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown metric 'mcc'; known are accuracy, .*matthews"):
        score(["mcc"], np.array([1]), np.array([1]))


def test_shapes_that_differ_are_both_named():
    with pytest.raises(ValueError, match=r"predictions have shape \(3,\) and labels \(2,\)"):
        score(["accuracy"], np.zeros(3), np.zeros(2))


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        score(["accuracy"], np.zeros(0), np.zeros(0))
