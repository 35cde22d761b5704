"""LayerContrast: COS-NCE on pooled, mapped hidden states of several layers."""

import pytest
import torch

from fastkd import cos_nce
from fastkd.losses import LayerContrast
from fastkd.losses.layer_contrast import pool


@pytest.fixture
def states():
    """Hidden states of two layers: student 6 wide, teacher 10, five sequences of up to seven tokens; the mask."""
    torch.manual_seed(0)
    student = [torch.randn(5, 7, 6, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(5, 7, 10) for _ in range(2)]
    return student, teacher, torch.arange(7) < torch.tensor([7, 4, 1, 6, 2])[:, None]


@pytest.mark.parametrize("pooling", ["cls", "mean", "token"])
def test_it_is_the_sum_over_layers_of_cos_nce_on_mapped_vectors(states, pooling):
    student, teacher, mask = states
    contrast = LayerContrast(2, 6, 10, pooling=pooling)
    expected = 0
    for projection, own, others in zip(contrast.projections, student, teacher, strict=True):
        torch.nn.init.normal_(projection.weight)
        if pooling == "token":
            expected += cos_nce(own @ projection.weight.T, others, mask=mask)
        else:
            expected += cos_nce(pool(own, mask, pooling) @ projection.weight.T, pool(others, mask, pooling))
    loss = contrast(student, contrast.targets(teacher, mask), mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (*contrast.parameters(), *student))


def test_cls_is_the_first_token_also_behind_padding(states):
    hidden = states[0][0]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] + [[1] * 7] * 4)
    assert torch.equal(pool(hidden, mask, "cls"), torch.cat([hidden[:1, 2], hidden[1:, 0]]))


def test_mean_is_over_tokens_and_whatever_stands_in_padding_does_not_matter(states):
    hidden, mask = states[0][0].detach(), states[2]
    poisoned = hidden.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(pool(poisoned, mask, "mean")[1], hidden[1, :4].mean(0))


@pytest.mark.parametrize("pooling", ["cls", "mean", "token"])
def test_a_sequence_without_a_token_is_neutral(states, pooling):
    student, teacher, mask = states
    mask[3] = False
    contrast = LayerContrast(2, 6, 10, pooling=pooling)
    loss = contrast(student, contrast.targets(teacher, mask), mask)
    loss.backward()
    assert loss.isfinite() and not student[0].grad[3].any() and student[0].grad[0].any()


def test_maps_start_as_the_identity():
    assert torch.equal(LayerContrast(1, 6, 6).projections[0].weight, torch.eye(6))
    narrow = LayerContrast(1, 6, 10).projections[0]
    vector = torch.randn(6)
    assert torch.equal(narrow(vector), torch.cat([vector, torch.zeros(4)]))


def test_sequences_that_share_an_id_are_no_negatives_of_each_other(states):
    student, teacher, mask = states
    contrast = LayerContrast(2, 6, 10)
    loss = contrast(student, contrast.targets(teacher, mask), mask, exclude=torch.zeros(5, dtype=torch.long))
    alone = [[s[i : i + 1] for s in x] for x in (student, teacher) for i in range(5)]
    singles = [
        contrast(own, contrast.targets(others, mask[i : i + 1]), mask[i : i + 1])
        for i, (own, others) in enumerate(zip(alone[:5], alone[5:], strict=True))
    ]
    torch.testing.assert_close(loss, sum(singles) / 5)


def test_another_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling='max'; allowed are cls, mean, token"):
        LayerContrast(1, 6, 10, pooling="max")
