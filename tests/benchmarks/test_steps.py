"""The benchmark of training steps times steps that compute the same thing, and knows what a free loss would take."""

import pytest
import torch

from fastkd.benchmarks.harness import measure
from fastkd.benchmarks.report import print_tables
from fastkd.benchmarks.steps import SUITE
from fastkd.benchmarks.steps.arc import SHAPES, case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ways_to_compute_the_step_agree_and_are_timed(dtype):
    rows = {row["provider"]: row for row in measure(case(*SHAPES["tiny"][0], dtype=dtype, device="cpu"), budget=0.0)}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert list(rows) == ["sample loop", "eager", "fused", "fused, stopped", "no loss, stopped"]
    assert all(0 < row["forward_ms"] < row["both_ms"] and "no_grad_ms" not in row for row in rows.values())
    assert rows["fused, stopped"]["fraction_of_limit"] > 0


def test_a_wrong_step_is_refused():
    made = case(*SHAPES["tiny"][0], dtype=torch.float32, device="cpu")
    fused = made.providers[2]
    made.providers[:] = [type(fused)("wrong", lambda: 1.001 * fused.forward(), fused.backward, "fastkd")]
    [row] = measure(made, budget=0.0)
    assert row["status"].startswith("refused: loss") and "both_ms" not in row


def test_the_issues_shapes_are_the_default():
    assert {(heads, length) for _, heads, length, *_ in SHAPES["small"]} == {(12, 128), (48, 128), (12, 512), (48, 512)}
    assert {models for *_, teacher, student in SHAPES["small"] for models in [(teacher, student)]} == {
        ((12, 768, 12), (6, 384, 12))
    }


def test_an_unknown_recipe_is_refused():
    assert SUITE.names == ("arc", "egkd")
    with pytest.raises(ValueError, match="recipe='bert'; allowed are arc, egkd"):
        SUITE.main("bert")


def test_the_share_of_what_a_free_loss_would_give_is_printed_and_evaluation_is_not_spoken_of(capsys):
    made = case(*SHAPES["tiny"][0], dtype=torch.float32, device="cpu")
    rows = [row | {"allocator": "default"} for row in measure(made, budget=0.0)]
    print_tables(rows, ["default"])
    printed = capsys.readouterr().out
    assert "no loss, stopped" in printed and "× over sample loop" in printed and "of that speed (goal: 95%)" in printed
    assert "no grad" not in printed and "without grad" not in printed
