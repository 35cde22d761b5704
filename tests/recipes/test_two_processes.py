"""Two processes over gloo equal one process with the same global batch."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict

pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).with_name("ranks.py")
_spec = importlib.util.spec_from_file_location("ranks", _SCRIPT)
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def folder(make_teacher, tokenizer, tokens, windows, recipe_settings, run_two_ranks, tmp_path_factory):
    """What two ranks left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    make_teacher().save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    DatasetDict({"train": tokens["train"], "windows": windows}).save_to_disk(folder / "data")
    (folder / "recipe.json").write_text(json.dumps(recipe_settings(output_dir=str(folder / "recipe"))))
    run_two_ranks(_SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module", params="ab")
def stage(request):
    return request.param


def test_two_processes_equal_one(folder, found, stage):
    alone = ranks.make_trainer(stage, folder, 32, output_dir=str(folder / f"{stage}-alone"))
    start = {name: tensor.clone() for name, tensor in alone.model.state_dict().items()}
    alone.train()
    assert max((tensor - start[name]).abs().max() for name, tensor in alone.model.state_dict().items()) > 1e-3
    for run in (stage, f"{stage}-accumulated"):  # 2 x 16, and 2 x 2 x 8
        together = torch.load(folder / f"{run}-0.pt")
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(together[name], tensor, atol=1e-6, rtol=0, msg=f"{run}: {name}")
        for step, terms in ranks.losses(alone).items():
            assert found[0][run][str(step)] == pytest.approx(terms, abs=1e-6)


def test_both_ranks_hold_and_log_the_same(folder, found, stage):
    first, second = (torch.load(folder / f"{stage}-{rank}.pt") for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert found[0][stage] == found[1][stage]


def test_a_run_of_two_processes_resumes_exactly_in_its_second_epoch(found, stage):
    whole, resumed = found[0][f"{stage}-long"], found[0][f"{stage}-resumed"]
    for step in ("14", "15"):
        assert resumed[step] == whole[step]


def test_the_whole_recipe_runs_in_two_processes(folder, found):
    assert found[0]["results"] == found[1]["results"]
    assert json.loads((folder / "recipe" / "results.json").read_text()) == found[0]["results"]
    for step in ("teacher", "stage_a", "student"):
        assert (folder / "recipe" / step / "done.json").is_file()


def test_a_given_teacher_is_copied_once_and_used_by_both_processes(found):
    assert found[0]["given"] == found[1]["given"] == found[0]["results"]
