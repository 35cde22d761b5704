import pytest

from fastkd.models import ReplacementSchedule, effective_rate


@pytest.mark.parametrize(("step", "rate"), [(0, 0.3), (500, 0.6), (1166, 0.9996), (1167, 1.0), (100_000, 1.0)])
def test_the_linear_schedule_of_theseus_has_its_published_values(step, rate):
    assert ReplacementSchedule.from_slope(0.3, 6e-4)(step) == pytest.approx(rate, abs=1e-12)


def test_the_linear_schedule_reaches_exactly_one_and_not_before():
    schedule = ReplacementSchedule.from_slope(0.3, 6e-4)
    assert schedule(1166) < 1
    assert schedule(1167) == 1


@pytest.mark.parametrize(("step", "rate"), [(0, 0.5), (2499, 0.5), (2500, 1.0)])
def test_the_constant_schedule_switches_to_one(step, rate):
    assert ReplacementSchedule("constant", 0.5, 2500)(step) == rate


@pytest.mark.parametrize(("step", "rate"), [(0, 0.2), (50, 0.6), (25, 0.2 + 0.8 * (1 - 2**-0.5) / 2), (100, 1.0)])
def test_the_cosine_schedule_rises_from_start_to_one(step, rate):
    assert ReplacementSchedule("cosine", 0.2, 100)(step) == pytest.approx(rate, abs=1e-12)


def test_a_schedule_from_the_length_of_the_run_reaches_one_at_that_part_of_it():
    schedule = ReplacementSchedule.from_total(1000, "linear", start=0.3, reach=0.6)
    assert schedule(0) == 0.3
    assert schedule(300) == pytest.approx(0.65, abs=1e-12)
    assert schedule(599) < 1
    assert schedule(600) == 1


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_an_end_at_step_zero_is_plain_fine_tuning(shape):
    assert ReplacementSchedule(shape, 0.3, 0)(0) == 1


@pytest.mark.parametrize("start", [0, -0.1, 1.1, float("nan")])
def test_a_start_outside_zero_to_one_is_refused(start):
    with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
        ReplacementSchedule("linear", start, 10)


@pytest.mark.parametrize("end", [-1, float("inf"), float("nan")])
def test_an_impossible_end_is_refused(end):
    with pytest.raises(ValueError, match="reaches 1"):
        ReplacementSchedule("linear", 0.3, end)


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'linear', 'cosine' or 'constant'"):
        ReplacementSchedule("exponential", 0.3, 10)


def test_a_falling_slope_and_a_part_beyond_the_run_are_refused():
    with pytest.raises(ValueError, match="slope=0"):
        ReplacementSchedule.from_slope(0.3, 0)
    with pytest.raises(ValueError, match=r"reach=1\.5"):
        ReplacementSchedule.from_total(100, reach=1.5)


def test_the_effective_rate_is_that_of_draws_with_at_least_one_replacement():
    assert effective_rate(0.3, 3) == pytest.approx(0.4566, abs=5e-5)
    assert effective_rate(1.0, 6) == 1.0
