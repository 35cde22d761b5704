"""RelationKL weighs the divergences of several projections."""

import pytest
import torch

from fastkd import relation_kl
from fastkd.losses import RelationKL


@pytest.fixture
def projections():
    student = {name: torch.randn(2, 7, 12, requires_grad=True) for name in ("query", "key", "value")}
    teacher = {name: torch.randn(2, 7, 24) for name in ("query", "key", "value")}
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    return student, teacher, mask


def test_every_projection_is_reported_and_the_total_is_their_sum(projections):
    student, teacher, mask = projections
    losses = RelationKL(3)(student, teacher, mask)
    assert set(losses) == {"query", "key", "value", "total"}
    for name in student:
        torch.testing.assert_close(losses[name], relation_kl(student[name], teacher[name], 3, mask=mask))
    torch.testing.assert_close(losses["total"], losses["query"] + losses["key"] + losses["value"])


def test_weights_choose_the_projections_and_scale_the_total_only(projections):
    student, teacher, mask = projections
    losses = RelationKL(3, {"query": 2.0, "value": 0.5})(student, teacher, mask)
    assert set(losses) == {"query", "value", "total"}
    torch.testing.assert_close(losses["total"], 2 * losses["query"] + 0.5 * losses["value"])
    losses["total"].backward()
    assert student["key"].grad is None
    alone = student["query"].detach().requires_grad_()
    relation_kl(alone, teacher["query"], 3, mask=mask).backward()
    torch.testing.assert_close(student["query"].grad, 2 * alone.grad)


def test_causal_and_backend_reach_the_op(projections):
    student, teacher, _ = projections
    causal = RelationKL(3, {"value": 1.0}, causal=True, backend="reference")(student, teacher)["value"]
    torch.testing.assert_close(causal, relation_kl(student["value"], teacher["value"], 3, causal=True))
    with pytest.raises(RuntimeError, match="the CUDA kernel runs on CUDA devices"):
        RelationKL(3, backend="cuda")(student, teacher)


def test_the_module_has_no_parameters_and_no_buffers():
    assert not RelationKL(12).state_dict()
