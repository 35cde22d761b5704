"""How alike two explanations are."""

import math

import pytest
import torch

from fastkd.explain import by_chance, consistency

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_an_explanation_is_consistent_with_itself_and_its_multiples():
    scores = torch.randn(2, 5) * MASK
    found = consistency(3 * scores, scores, MASK)
    assert (found.cosine, found.spearman, found.overlap) == pytest.approx((1, 1, 1))
    assert (found.sequences, found.undefined) == (2, 0)


def test_the_three_figures_by_hand():
    student = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    teacher = torch.tensor([[2.0, 1.0, 3.0, 5.0, 4.0]])
    found = consistency(student, teacher, MASK[:1], top=0.4)
    assert found.cosine == pytest.approx(53 / 55)
    assert found.spearman == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert found.overlap == 1.0
    assert consistency(student, teacher, MASK[:1], top=0.2).overlap == 0.0


def test_padding_says_nothing():
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    expected = consistency(student, teacher, MASK)
    student[1, 3:], teacher[1, 3:] = 100, torch.nan
    assert consistency(student, teacher, MASK) == expected


def test_sequences_without_an_order_are_counted_and_left_out():
    student, teacher = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), torch.ones(2, 5).cumsum(1)
    found = consistency(student, teacher, MASK)
    assert found.undefined == 1 and found.spearman == pytest.approx(1)


def test_nothing_to_compare_is_nan_and_no_error():
    found = consistency(torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 5))
    assert math.isnan(found.cosine) and math.isnan(found.overlap) and found.undefined == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_named(bad):
    teacher = torch.ones(2, 5)
    teacher[1, 2] = bad
    with pytest.raises(ValueError, match="the teacher's scores of sequence 1 are NaN or infinite"):
        consistency(torch.ones(2, 5), teacher, MASK)


def test_scores_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the student's scores are \(2, 4\), the mask is \(2, 5\)"):
        consistency(torch.ones(2, 4), torch.ones(2, 5), MASK)


@pytest.mark.parametrize("top", [0.0, 1.2])
def test_a_share_outside_its_range_is_refused(top):
    with pytest.raises(ValueError, match=f"top={top}; the share of tokens must lie in"):
        consistency(torch.ones(2, 5), torch.ones(2, 5), MASK, top=top)


def test_by_chance_is_the_level_of_unrelated_explanations():
    """Scores of one sign have a high cosine whatever they are of."""
    teacher, other = torch.rand(400, 20), torch.rand(400, 20)
    mask = torch.ones(400, 20)
    chance, unrelated = by_chance(teacher, mask), consistency(other, teacher, mask)
    assert chance.cosine == pytest.approx(unrelated.cosine, abs=0.02) and chance.cosine > 0.7
    assert chance.spearman == pytest.approx(0, abs=0.05)
    assert chance.overlap == pytest.approx(unrelated.overlap, abs=0.03)
    assert chance.overlap == pytest.approx(0.2, abs=0.03)


def test_chance_shuffles_what_is_compared_alone_and_is_drawn_from_a_seed():
    teacher = torch.tensor([[1.0, 2.0, 3.0, 4.0, torch.nan], [5.0, torch.nan, torch.nan, torch.nan, torch.nan]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    before = teacher.clone()
    found = [by_chance(teacher, mask, seed=seed) for seed in range(20)]
    assert torch.equal(teacher.nan_to_num(), before.nan_to_num())
    assert found[3] == by_chance(teacher, mask, seed=3) and len({one.spearman for one in found}) > 3
    assert all(one.undefined == 1 for one in found)
    tied = torch.tensor([[2.0, 2.0, 3.0, 0.0, 0.0]])
    assert by_chance(tied, torch.tensor([[1, 1, 0, 0, 0]])).undefined == 1
