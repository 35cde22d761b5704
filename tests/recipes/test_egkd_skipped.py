"""Explanations that are NaN or infinite: what they leave untouched, how they are counted, and when a run stops."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastkd.explain import gradient
from fastkd.recipes import DistillationTrainer, NotFiniteError, egkd_branches, egkd_units

_spec = importlib.util.spec_from_file_location("egkd_ranks", Path(__file__).with_name("egkd_ranks.py"))
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)

ALL = {"gradient": 10.0, "perturbation": 0.5, "selection": 0.5}


def lines_of(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture
def poison(monkeypatch):
    """poison(when): the student's gradient attributions of the explained batches n with when(n) are NaN."""

    def patch(when):
        original, calls = egkd_units.gradient_attribution, iter(range(10**6))

        def attribution(*args, create_graph=False, **kwargs):
            scores = original(*args, create_graph=create_graph, **kwargs)
            return scores + torch.nan if create_graph and when(next(calls)) else scores

        monkeypatch.setattr(egkd_units, "gradient_attribution", attribution)

    return patch


def test_a_batch_whose_attributions_are_nan_is_left_out_of_the_branch_and_counted(make_egkd, poison):
    poison(lambda n: n in {1, 3})
    trainer = make_egkd(branches={"gradient": 1e4}, dropout=0.0, max_steps=4, max_skipped=2)
    trainer.train()
    assert [line["explanations_skipped"] for line in lines_of(trainer)] == [0, 1, 0, 1]
    assert [line["loss_gradient"] == 0 for line in lines_of(trainer)] == [False, True, False, True]
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_central_differences_from_a_gradient_with_an_infinity_spoil_no_parameter(make_egkd, monkeypatch):
    original = gradient.gradients_of
    monkeypatch.setattr(
        gradient, "gradients_of", lambda *a, **k: original(*a, **k).index_fill(0, torch.tensor([1]), torch.inf)
    )
    trainer = make_egkd(
        branches={"gradient": 1e4}, second_order="central_difference", max_steps=2, max_skipped=9, use_cpu=True
    )
    trainer.train()
    assert [line["explanations_skipped"] for line in lines_of(trainer)] == [1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


@pytest.mark.parametrize(
    ("branch", "place", "name"),
    [
        ("gradient", egkd_units, "gradient_attribution"),
        ("perturbation", egkd_branches, "masked_logits"),
        ("selection", egkd_branches, "masked_logits"),
    ],
)
def test_an_overflow_in_an_explanation_spoils_no_parameter(make_egkd, monkeypatch, branch, place, name):
    """The term is 0, but 0 · inf on the way back is NaN."""
    own_pass = {"gradient": {"method": "integrated_gradients", "steps": 2}}
    trainer = make_egkd(branches={branch: 1.0}, dropout=0.0, max_steps=3, **own_pass)
    monkeypatch.setattr(place, name, ranks.overflowing_once(getattr(place, name), trainer.model))
    trainer.train()
    assert [line["explanations_skipped"] for line in lines_of(trainer)] == [0, 1, 0]
    assert [line[f"loss_{branch}"] > 0 for line in lines_of(trainer)] == [True, False, True]
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_labels_and_soft_labels_of_such_a_batch_count(make_egkd, poison):
    poison(lambda n: True)
    without = make_egkd(branches={}, dropout=0.0, max_steps=1, optim="sgd")
    trainer = make_egkd(branches={"gradient": 10.0}, dropout=0.0, max_steps=1, optim="sgd")
    for each in (trainer, without):
        each.train()
    for one, other in zip(trainer.model.parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_run_stops_after_a_row_of_batches_without_explanations(make_egkd, poison):
    poison(lambda n: n in {0, 2, 3, 4})
    trainer = make_egkd(branches={"gradient": 1.0}, max_steps=9, max_skipped=3)
    with pytest.raises(NotFiniteError, match="step 4: the explanations of 3 batches in a row were NaN or infinite"):
        trainer.train()


def test_a_branch_that_never_explains_stops_a_run_whose_other_branches_do(make_egkd, poison):
    poison(lambda n: True)
    trainer = make_egkd(branches=ALL, explain_every=2, max_steps=8, max_skipped=2)
    with pytest.raises(NotFiniteError, match=r"step 2: the explanations of 2 batches in a row .*, branch gradient"):
        trainer.train()


def test_a_batch_of_which_nothing_is_explained_does_not_end_a_row(make_egkd, poison):
    """A fifth of four sequences: none of steps 0 and 5, one of each of the others."""
    poison(lambda n: True)
    few = {"per_device_train_batch_size": 4, "explain_share": 0.2, "max_steps": 9}
    trainer = make_egkd(branches={"gradient": 1.0}, max_skipped=6, **few)
    with pytest.raises(NotFiniteError, match="step 7: the explanations of 6 batches in a row"):
        trainer.train()


@pytest.mark.parametrize("ends", ["at a checkpoint", "at the end"])
def test_a_device_that_is_not_waited_for_is_read_before_anything_is_kept(make_egkd, poison, monkeypatch, ends):
    poison(lambda n: True)
    monkeypatch.setattr(DistillationTrainer, "_reads_losses_at_once", lambda *_: False)
    kept = {"save_strategy": "steps", "save_steps": 3} if ends == "at a checkpoint" else {}
    trainer = make_egkd(branches={"gradient": 1.0}, max_steps=4, max_skipped=3, logging_steps=100, **kept)
    steps = 3 if kept else 4
    with pytest.raises(NotFiniteError, match=f"step {steps}: the explanations of {steps} batches in a row"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
