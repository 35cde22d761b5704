"""Percentiles, spread and the paired bootstrap, on numbers whose answer is known."""

import numpy as np
import pytest

from fastkd.edge.measure_statistics import difference, latency


def test_percentiles_mean_and_spread_of_the_calls():
    found = latency(list(range(1, 102)), batch=8)
    assert found == pytest.approx(
        {
            "calls": 101, "p50_ms": 51, "p90_ms": 91, "p95_ms": 96, "p99_ms": 100, "mean_ms": 51,
            "spread": (91 - 11) / 51, "sentences_per_second": 8 * 1000 / 51,
        }
    )  # fmt: skip


def test_one_slow_call_moves_the_mean_and_p99_but_not_the_median():
    found = latency([1.0] * 50 + [100.0], batch=1)
    assert found["p50_ms"] == 1 and found["spread"] == 0
    assert found["mean_ms"] > 2 and found["p99_ms"] > 40


def test_a_loss_is_negative_points():
    assert difference(0.85, 0.9).points == pytest.approx(-5)


def test_the_interval_of_a_clear_loss_excludes_0_and_that_of_a_tie_holds_it():
    right = np.ones(400, bool)
    worse, tied = right.copy(), right.copy()
    worse[:40] = False
    lost = difference(0.9, 1.0, worse, right)
    assert lost.points == pytest.approx(-10)
    assert lost.low < -10 < lost.high < 0
    other = right.copy()
    tied[:20], other[20:40] = False, False
    even = difference(0.95, 0.95, tied, other)
    assert even.low < 0 < even.high


def test_pairing_makes_equal_predictions_differ_by_exactly_nothing():
    right = np.arange(100) % 3 > 0
    same = difference(0.66, 0.66, right, right)
    assert (same.points, same.low, same.high) == (0, 0, 0)


def test_the_interval_is_the_same_in_every_run():
    right, other = np.arange(60) % 4 > 0, np.arange(60) % 5 > 0
    assert difference(0.75, 0.8, right, other) == difference(0.75, 0.8, right, other)


def test_a_regression_has_no_interval():
    found = difference(0.5, 0.75)
    assert (found.points, found.low, found.high) == (-25, None, None)
