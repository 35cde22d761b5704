"""A step of EGKD on a GPU is the CPU's."""

import pytest
import torch

pytestmark = pytest.mark.gpu

STEPS = {
    "gradient, exact": {"branches": {"gradient": 1e5}, "second_order": "exact"},
    "gradient, exact, every class of a running teacher": {
        "branches": {"gradient": 1e5},
        "second_order": "exact",
        "target": "all",
        "stored": False,
    },
    "gradient, exact, a share": {"branches": {"gradient": 1e5}, "second_order": "exact", "explain_share": 0.5},
    "gradient, central difference": {"branches": {"gradient": 1e5}, "second_order": "central_difference"},
    "perturbation": {"branches": {"perturbation": 10.0}, "masks": 2},
    "perturbation, running teacher": {"branches": {"perturbation": 10.0}, "masks": 2, "stored": False},
    "selection": {"branches": {"selection": 10.0}},
}


def step_on(device: str, make_egkd, how: dict):
    """How far one step of plain SGD on the branch, but for soft labels, moves the parameters; and its term."""
    trainer = make_egkd(
        **how, soft_weight=1.0, dropout=0.0, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0, max_steps=1,
        use_cpu=device == "cpu",
    )  # fmt: skip
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.model.device.type == device
    moved = [(tensor.cpu() - start[name].cpu()).flatten() for name, tensor in trainer.model.state_dict().items()]
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    [branch] = how["branches"]
    return torch.cat(moved), line[f"loss_{branch}"]


@pytest.mark.parametrize("how", STEPS.values(), ids=STEPS)
def test_a_step_with_a_branch_is_that_of_the_cpu(make_egkd, how):
    (expected, term), (moved, found) = (step_on(device, make_egkd, how) for device in ("cpu", "cuda"))
    error = (moved - expected).norm() / expected.norm()
    print(f"relative error of the step: {error:.1e}")
    assert found == pytest.approx(term, rel=1e-3) and term > 0
    assert expected.norm() > 1e-4 and error < (1e-2 if how.get("second_order") == "central_difference" else 1e-3)
