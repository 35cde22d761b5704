"""EGKD in two processes over gloo equals one process with the same global batch, further passes included."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).with_name("egkd_ranks.py")
_spec = importlib.util.spec_from_file_location("egkd_ranks", _SCRIPT)
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def folder(make_teacher, tokenizer, tokens, run_two_ranks, tmp_path_factory):
    """What two ranks left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    make_teacher().save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    tokens["train"].select(range(160)).save_to_disk(str(folder / "data"))
    run_two_ranks(_SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("run", ranks.RUNS)
def test_two_processes_equal_one(folder, found, run):
    alone = ranks.make_trainer(run, folder, 32, output_dir=str(folder / f"{run}-alone"), gradient_accumulation_steps=1)
    start = {name: tensor.clone() for name, tensor in alone.model.state_dict().items()}
    alone.train()
    together = torch.load(folder / f"{run}-0.pt")
    # A central difference is one of two numbers nearly alike, whose rounding is another in half a batch.
    differs = ranks.RUNS[run].get("second_order") == "central_difference"
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5 if differs else 2e-6, rtol=0, msg=name)
    assert max((tensor - start[name]).abs().max() for name, tensor in together.items()) > 1e-3
    for step, terms in ranks.losses(alone).items():
        assert found[0][run][str(step)] == pytest.approx(terms, rel=1e-5, abs=2e-6)


def test_the_branches_move_the_student(folder):
    """Else the runs above would show nothing of them."""
    states = [torch.load(folder / f"{run}-0.pt") for run in ("central", "exact", "all")]
    for first, second in ((0, 1), (0, 2)):
        assert max((states[first][name] - states[second][name]).abs().max() for name in states[0]) > 1e-4


def test_both_ranks_hold_and_log_the_same(folder, found):
    first, second = (torch.load(folder / f"all-{rank}.pt") for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert found[0]["all"] == found[1]["all"]


def test_an_overflow_on_one_rank_spoils_no_parameter_of_either(folder, found):
    assert found[0]["skipped"] == found[1]["skipped"] == [0, 1, 0, 0]
    first, second = (torch.load(folder / f"overflow-{rank}.pt") for rank in (0, 1))
    for name, tensor in first.items():
        assert tensor.isfinite().all() and torch.equal(tensor, second[name]), name


def test_both_ranks_stop_where_one_overflows(found):
    for rank in found:
        counted, stopped = rank["overflow"]
        assert not counted and "the explanations of 1 batches in a row were NaN or infinite" in stopped


def test_a_run_of_two_processes_resumes_exactly_across_the_beginning_of_the_branches(found):
    for step in ("3", "4", "5"):
        assert found[0]["resumed"][step] == found[0]["whole"][step]
    assert set(found[0]["whole"]["5"]) > set(found[0]["whole"]["2"])
