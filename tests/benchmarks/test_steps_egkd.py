"""The benchmark of EGKD's steps times what the recipe trains by, once its gradients are right."""

import dataclasses

import pytest
import torch

from fastkd.benchmarks.harness import measure
from fastkd.benchmarks.report import print_tables
from fastkd.benchmarks.steps.egkd import SHAPES, case

GOALS = {
    "plain": None,
    "plain, stored": 1.0,
    "gradient, central difference": 2.2,
    "gradient, central difference, stored": None,
    "gradient, exact": 3.0,
    "gradient, exact, stored": None,
    "perturbation, one mask": 1.9,
    "perturbation, one mask, stored": None,
    "selection": 1.9,
    "selection, stored": None,
    "all three, stored": None,
}


@pytest.fixture(scope="module")
def branches():
    return case(*SHAPES["tiny"][0], dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def classes():
    return case(*SHAPES["tiny"][1], dtype=torch.float32, device="cpu")


def _only(made, *names: str):
    """The case with these of its providers."""
    return dataclasses.replace(made, providers=[provider for provider in made.providers if provider.name in names])


def test_every_branch_is_right_and_a_multiple_of_the_plain_step(branches):
    rows = {row["provider"]: row for row in measure(branches, budget=0.0)}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert {name: row["goal"] for name, row in rows.items()} == GOALS
    assert rows["plain"]["multiple"] == 1.0 and all(row["multiple"] > 0 for row in rows.values())
    assert all(row["peak_extra_bytes"] > 0 and row["rounds"] >= 3 for row in rows.values())


def test_the_public_way_gives_what_ours_gives(classes, capsys):
    rows = measure(classes, budget=0.0)
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["role"] for row in rows] == ["baseline", "baseline", "fastkd", "fastkd"]
    assert rows[1]["gradient_error"] < 1e-5 and rows[3]["multiple"] < 1
    print_tables([row | {"allocator": "default"} for row in rows], ["default"])
    printed = capsys.readouterr().out
    assert "of public loop (goal)" in printed and "(≤ 0.33)" in printed


@pytest.mark.parametrize("name", [name for name in GOALS if name not in ("plain", "plain, stored")])
def test_a_step_without_its_branch_is_refused(branches, name):
    """The gradient of no branch is so small that it could be left out, or be wrong, without being seen."""
    found = {provider.name: provider for provider in branches.providers}
    plain = found["plain, stored" if name.endswith("stored") else "plain"]
    wrong = dataclasses.replace(found[name], forward=plain.forward, backward=plain.backward)
    [row] = measure(dataclasses.replace(branches, providers=[wrong]), budget=0.0)
    assert row["status"].startswith("refused") and "gradient" in row["status"] and "both_ms" not in row


def test_a_central_difference_that_is_two_percent_off_is_refused(branches):
    [central] = _only(branches, "gradient, central difference").providers
    off = dataclasses.replace(central, backward=lambda loss: (1.02 * central.backward(loss)[0],))
    [row] = measure(dataclasses.replace(branches, providers=[off]), budget=0.0)
    assert row["status"].startswith("refused: gradient")


def test_steps_are_timed_in_bf16_autocast_too():
    made = case(*SHAPES["tiny"][0], dtype=torch.bfloat16, device="cpu")
    ways = ("plain", "gradient, central difference, stored", "gradient, exact", "selection")
    rows = measure(_only(made, *ways), budget=0.0)
    assert [(row["status"], row["dtype"]) for row in rows] == [("ok", "bfloat16")] * 4


def test_the_issues_shapes_are_the_default():
    minilm = ((6, 384, 12), (3, 384, 12))
    assert SHAPES["small"] == [("branches", 32, 64, 1, True, *minilm), ("classes", 32, 64, 1, True, *minilm)]
