"""LRC-BERT from end to end: `fastkd train` on a YAML file of one's own."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd.cli import main
from fastkd.recipes import FineTuneTrainer, LrcBertGeneralTrainer, LrcBertTrainer
from fastkd.recipes.lrc_bert_student import PROJECTIONS

_TRAINERS = {"teacher": FineTuneTrainer, "general": LrcBertGeneralTrainer, "student": LrcBertTrainer}


@pytest.fixture
def train(teacher_folder, data_folder, tmp_path):
    """train("key=value", ..): the command on a file of one's own; returns its exit status."""
    step = {"bf16": False, "learning_rate": 2e-3, "logging_steps": 5, "save_steps": 4, "disable_tqdm": True}
    settings = {
        "recipe": "lrc_bert",
        "teacher": str(teacher_folder),
        "task": "sst2",
        "data": str(data_folder),
        "output_dir": str(tmp_path / "run"),
        "max_length": 32,
        "student": {"layers": 2, "hidden": 24, "heads": 4, "init": "random"},
        "finetune": step | {"max_steps": 8},
        "general": step | {"max_steps": 8, "max_length": 32},
        "distil": step | {"max_steps": 10},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))

    def run(*words):
        return main(["train", str(tmp_path / "mine.yaml"), *words])

    return run


@pytest.fixture
def steps(monkeypatch):
    """Counts the training steps of each trainer; `steps["interrupt"] = (step, n)` stops at the n-th."""
    counted = dict.fromkeys(_TRAINERS, 0)

    def watch(name, cls):
        original = cls.training_step

        def training_step(self, *args, **kwargs):
            if type(self) is cls:
                if counted.get("interrupt") == (name, counted[name]):
                    raise KeyboardInterrupt
                counted[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "training_step", training_step)

    for name, cls in _TRAINERS.items():
        watch(name, cls)
    return counted


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_an_interrupted_run_goes_on_to_the_end_of_one_that_was_not(train, steps, tmp_path, capsys):
    """Stopped in every step, the last time in the second stage; there is a checkpoint every four steps."""
    for steps["interrupt"] in (("teacher", 6), ("general", 6), ("student", 9)):
        assert train() == 130
    del steps["interrupt"]
    assert train() == 0
    assert steps == {"teacher": 10, "general": 10, "student": 11}
    assert train(f"output_dir={tmp_path / 'whole'}") == 0
    for folder in ("teacher", "student"):
        for name, tensor in state(tmp_path / "whole" / folder).items():
            assert torch.equal(state(tmp_path / "run" / folder)[name], tensor), (folder, name)
    assert "student: accuracy" in capsys.readouterr().out
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 24)
    assert student.config.id2label == {0: "negative", 1: "positive"}
    AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert (tmp_path / "run" / "general" / PROJECTIONS).is_file()
    assert not (tmp_path / "run" / "student" / PROJECTIONS).exists()
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())) == {"teacher", "student"}


def test_the_task_phase_starts_from_the_student_and_the_maps_of_the_general_one(train, tmp_path):
    """A rate of zero leaves both as they were."""
    assert train("distil.learning_rate=0", "distil.weight_decay=0", "distil.max_steps=1") == 0
    student, general = (state(tmp_path / "run" / name) for name in ("student", "general"))
    for name, tensor in student.items():
        if "classifier" not in name:
            assert torch.equal(general[name], tensor), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer_pairs=[[9, -1]]"], "layer 9 is out of range; this model has 4 layers"),
        (["pooling=max"], "pooling='max'; allowed are cls, mean, token"),
        (["student={layers: 6, init: random}"], "the student has 6 layers, its teacher 4"),
        (["student={layers: 2, hidden: 24, heads: 4}"], "use init='random'"),
        (["student={init: first}"], "student: layers must be given"),
        (["distil.contrast_only=1"], "contrast_only=1; it must lie in [0, 1)"),
        (["distil.contrast_weight=0"], "set contrast_only=0 as well"),
        (["distil.pooling=mean"], "distil: pooling holds for both distillations"),
        (["distil.temprature=2"], "distil: unknown key 'temprature'; did you mean 'temperature'?"),
        (["general.perturbation=words"], "perturbation='words'; allowed are embedding and null"),
        (["general=5"], "general: a section of settings is needed, not 5"),
        (["corpus=5"], "corpus=5; a file, a folder, a hub name, or a list of these is needed"),
        (["teacher=does/not/exist"], "teacher=does/not/exist is no model: no such folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(train, steps, tmp_path, capsys, words, message):
    assert train(*words) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1], error
    assert not (tmp_path / "run").exists()
    assert not any(steps.values())


def test_a_folder_with_another_run_is_left_alone(train, steps, tmp_path, capsys):
    steps["interrupt"] = ("general", 0)
    assert train() == 130
    assert train("general.max_steps=3") == 2
    assert "holds another run (it differs in general)" in capsys.readouterr().err
