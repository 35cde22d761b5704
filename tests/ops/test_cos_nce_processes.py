"""Two processes with `group` equal one process on the concatenated batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import cos_nce

ROWS = {"equal shares": [(0, 3), (3, 3)], "unequal shares": [(0, 5), (5, 1)], "an empty share": [(0, 6), (6, 0)]}
SHAPES = {"vectors": (6, 8), "layers": (2, 6, 8), "masked tokens": (6, 4, 8), "layers of tokens": (2, 6, 4, 8)}


def all_cases() -> dict[str, dict]:
    torch.manual_seed(0)
    cases = {}
    for name, shape in SHAPES.items():
        for shares, rows in ROWS.items():
            for ids in (None, torch.tensor([1, 2, 1, 2, 7, 1])):
                for reduction in ("mean", "none"):
                    student, teacher = torch.randn(2, *shape)
                    tokens = "tokens" in name
                    cases[f"{name}, {shares}, {'ids' if ids is not None else 'no ids'}, {reduction}"] = {
                        "student": student, "teacher": teacher, "tokens": tokens, "rows": rows, "exclude": ids,
                        "mask": torch.rand(6, 4) > 0.4 if tokens else None, "reduction": reduction,
                        "dim": len(shape) - (3 if tokens else 2),
                    }  # fmt: skip
    return cases


CASES = all_cases()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank computed, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(list(CASES.values()), folder / "cases.pt")
    script = Path(__file__).with_name("cos_nce_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), "2", str(folder)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_two_processes_equal_one(found, number):
    """What DistributedDataParallel makes of a mean's gradients is their average over the processes."""
    case = list(CASES.values())[number]
    student = case["student"].clone().requires_grad_()
    whole = cos_nce(
        student, case["teacher"], mask=case["mask"], exclude=case["exclude"], tokens=case["tokens"],
        reduction=case["reduction"],
    )  # fmt: skip
    (grad,) = torch.autograd.grad(whole.sum(), student)
    losses, grads = zip(*(rank[number] for rank in found), strict=True)
    averaged = 2 if case["reduction"] == "mean" else 1
    together = sum(losses) / 2 if averaged == 2 else torch.cat(losses, -1)
    torch.testing.assert_close(together, whole.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(grads, case["dim"]) / averaged, grad, rtol=1e-5, atol=1e-6)


def test_a_process_outside_the_group_is_told_so(found):
    assert found[1][-2] == "this process (rank 1) is no member of the process group"


def test_a_nan_of_another_process_is_not_called_an_overflow(found):
    told = [rank[-1][0] for rank in found]
    assert "another process of the group brought NaN or infinity" in told[0]
    assert told[1] == "teacher holds NaN or infinity; the loss is not finite"


def test_positions_that_differ_are_told_to_every_process_where_ids_are_exchanged(found):
    for rank in found:
        assert "(layers, positions, width) (1, 3, 8) in the first and (1, 4, 8) in number 1" in rank[-1][1]
