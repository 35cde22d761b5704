"""LRC-BERT from end to end: `fastkd train` on a YAML file of one's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd.cli import main
from fastkd.recipes import (
    FineTuneTrainer,
    LrcBertGeneralTrainer,
    LrcBertTrainer,
    given_steps,
    run_recipe,
    task_recipe,
)
from fastkd.recipes.lrc_bert_student import PROJECTIONS

_TRAINERS = {"teacher": FineTuneTrainer, "general": LrcBertGeneralTrainer, "student": LrcBertTrainer}


def settings_of(teacher_folder, data_folder, output_dir) -> dict:
    step = {"bf16": False, "learning_rate": 2e-3, "logging_steps": 5, "save_steps": 4, "disable_tqdm": True}
    return {
        "recipe": "lrc_bert",
        "teacher": str(teacher_folder),
        "task": "sst2",
        "data": str(data_folder),
        "output_dir": str(output_dir),
        "max_length": 32,
        "student": {"layers": 2, "hidden": 24, "heads": 4, "init": "random"},
        "finetune": step | {"max_steps": 8},
        "general": step | {"max_steps": 8, "max_length": 32},
        "distil": step | {"max_steps": 10},
    }


@pytest.fixture
def train(teacher_folder, data_folder, tmp_path):
    """train("key=value", ..): the command on a file of one's own; returns its exit status."""
    settings = settings_of(teacher_folder, data_folder, tmp_path / "run")
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
        (["distil.gradient_accumulation_steps=0"], "gradient_accumulation_steps=0; it must be 1 at least"),
        (["general.max_steps=0"], "max_steps=0; it must be 1 at least, or -1: by num_train_epochs"),
        (["distil.max_steps=-1", "distil.num_train_epochs=0"], "nothing would be trained"),
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
    assert "holds another run (it differs in general.max_steps: 8 -> 3)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(teacher_folder, data_folder, tmp_path_factory):
    """The folder of a finished run, to take steps from."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(settings_of(teacher_folder, data_folder, folder))
    return folder


def given(finished, *words):
    return (f"finetuned_teacher={finished / 'teacher'}", f"general_student={finished / 'general'}", *words)


def test_steps_of_another_run_are_taken_as_they_are(train, steps, finished, tmp_path):
    assert train(*given(finished)) == 0
    assert (steps["teacher"], steps["general"], steps["student"]) == (0, 0, 10)
    for folder in ("teacher", "general", "student"):
        for name, tensor in state(finished / folder).items():
            if folder != "general" or "classifier" not in name:  # it has none
                assert torch.equal(state(tmp_path / "run" / folder)[name], tensor), (folder, name)
    assert (tmp_path / "run" / "general" / PROJECTIONS).is_file()
    shutil.rmtree(tmp_path / "run" / "student")
    assert train(*given(finished)) == 0  # goes on from its copies


def test_a_copy_that_was_interrupted_is_made_anew(train, finished, tmp_path, monkeypatch):
    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(given_steps, "mark_done", kill)
        assert train(*given(finished)) == 130
    assert not (tmp_path / "run" / "teacher" / "done.json").exists()
    assert train(*given(finished)) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pooling=mean"], "was made with pooling=cls, here are mean; use the same"),
        (["layer_pairs=[[0, 0], [1, 1]]"], "was made with layer_pairs=[[1, 0], [3, 1]], here are [[0, 0], [1, 1]]"),
        (["layer_pairs=[[-1, -1]]"], "holds 2 maps of 24 to 32, the matched layers ask for 1"),
        (["student={layers: 1, hidden: 24, heads: 4, init: random}"], "has num_hidden_layers 2, the student 1"),
        (["general_student=no/such"], "general_student=no/such is no folder"),
        (["finetuned_teacher=no/such"], "finetuned_teacher=no/such is no folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_given_steps_that_do_not_fit_are_refused_before_any_work(
    train, steps, finished, tmp_path, capsys, words, message
):
    assert train(*given(finished, *words)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert not any(steps.values())


def test_a_teacher_that_is_not_fine_tuned_is_refused(train, finished, teacher_folder, tmp_path, capsys):
    assert train(*given(finished), f"finetuned_teacher={teacher_folder}") == 2
    assert "is not fine-tuned: it has no classifier.bias, classifier.weight" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_labels_is_refused(train, finished, make_teacher, tmp_path, capsys):
    make_teacher(num_labels=3).save_pretrained(tmp_path / "other")
    assert train(*given(finished), f"finetuned_teacher={tmp_path / 'other'}") == 2
    assert f"task=sst2 has 2 labels, finetuned_teacher={tmp_path / 'other'} gives 3" in capsys.readouterr().err


def test_a_teacher_of_another_size_is_refused(train, finished, make_teacher, tmp_path, capsys):
    make_teacher(layers=3).save_pretrained(tmp_path / "other")
    assert train(*given(finished), f"finetuned_teacher={tmp_path / 'other'}") == 2
    assert "has num_hidden_layers 3, the teacher 4; they must be alike" in capsys.readouterr().err


def test_an_unfinished_general_distillation_is_refused(train, finished, tmp_path, capsys):
    shutil.copytree(finished / "general", tmp_path / "half")
    (tmp_path / "half" / "done.json").unlink()
    assert train(*given(finished), f"general_student={tmp_path / 'half'}") == 2
    assert f"general_student={tmp_path / 'half'} holds no finished step" in capsys.readouterr().err


def test_a_run_is_not_given_steps_of_its_own(train, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert train(*given(tmp_path / "run"), "overwrite=true") == 2
    assert "is part of this very run" in capsys.readouterr().err
    assert (tmp_path / "run" / "teacher" / "model.safetensors").is_file()


def test_a_folder_without_text_is_refused_before_the_task_is_read(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task_recipe, "load_task", lambda *_: pytest.fail("it was read"))
    (tmp_path / "pictures").mkdir()
    assert train(f"corpus={tmp_path / 'pictures'}") == 2
    assert f"the folder {tmp_path / 'pictures'} holds no file that ends in .parquet" in capsys.readouterr().err


def test_settings_that_train_nothing_else_may_change_while_a_run_is_interrupted(train, steps, tmp_path):
    steps["interrupt"] = ("general", 6)
    assert train() == 130
    del steps["interrupt"]
    assert train("general.logging_steps=2", "general.save_steps=3", "distil.save_total_limit=2") == 0
    assert steps["general"] == 10
