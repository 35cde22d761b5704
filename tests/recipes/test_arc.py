"""ARC from end to end: `fastkd train` on a YAML file of one's own."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd.cli import main
from fastkd.recipes import ArcStageATrainer, ArcStageBTrainer, FineTuneTrainer, run_recipe

_TRAINERS = {"teacher": FineTuneTrainer, "stage_a": ArcStageATrainer, "student": ArcStageBTrainer}


@pytest.fixture
def train(recipe_settings, tmp_path):
    """train("key=value", ..): the command on a file of one's own; returns its exit status."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe_settings(output_dir=tmp_path / "run")))

    def run(*words):
        return main(["train", str(tmp_path / "mine.yaml"), *words])

    return run


@pytest.fixture(scope="module")
def finished(recipe_settings, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(recipe_settings(output_dir=folder))
    return folder


@pytest.fixture
def steps(monkeypatch):
    """Counts the training steps of each stage; `steps["interrupt"] = (stage, n)` stops at the n-th."""
    counted = dict.fromkeys(_TRAINERS, 0)

    def watch(name, cls):
        original = cls.training_step

        def training_step(self, *args, **kwargs):
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


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def test_the_command_leaves_results_and_models_that_load(train, steps, tmp_path, capsys):
    assert train() == 0
    assert {name: steps[name] for name in _TRAINERS} == {"teacher": 12, "stage_a": 12, "student": 12}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"teacher", "student"}
    assert 0 <= results["student"]["accuracy"] <= 1
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_hidden_layers == 2
    assert student.config.id2label == {0: "negative", 1: "positive"}
    AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    said = capsys.readouterr().out
    assert "teacher: accuracy" in said and "student: accuracy" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "run"]


def test_the_same_command_again_trains_nothing(train, steps, tmp_path):
    train()
    before, results = dict(steps), (tmp_path / "run" / "results.json").read_text()
    assert train() == 0
    assert steps == before
    assert (tmp_path / "run" / "results.json").read_text() == results


def test_an_interrupted_run_goes_on_to_the_same_end(train, steps, finished, tmp_path):
    """Stopped in every stage; there is a checkpoint every four steps."""
    for steps["interrupt"] in (("teacher", 6), ("stage_a", 6), ("student", 10)):
        assert train() == 130
        assert not (tmp_path / "run" / "results.json").exists()
    del steps["interrupt"]
    assert train() == 0
    assert steps == {"teacher": 14, "stage_a": 14, "student": 14}
    for folder in _TRAINERS:
        for name, tensor in state(finished / folder).items():
            assert torch.equal(state(tmp_path / "run" / folder)[name], tensor), (folder, name)
    assert (tmp_path / "run" / "results.json").read_text() == (finished / "results.json").read_text()


def test_a_run_killed_while_a_checkpoint_was_written_goes_on_from_the_one_before(train, steps, finished, tmp_path):
    steps["interrupt"] = ("stage_a", 6)
    assert train() == 130
    del steps["interrupt"]
    half = tmp_path / "run" / "stage_a" / "checkpoint-8"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert train() == 0
    assert steps["stage_a"] == 14
    for name, tensor in state(finished / "stage_a").items():
        assert torch.equal(state(tmp_path / "run" / "stage_a")[name], tensor), name


def test_a_run_killed_after_its_last_step_ends_the_same(train, steps, finished, tmp_path, monkeypatch):
    original = ArcStageBTrainer.save_model

    def kill(self, output_dir, _internal_call=False):
        if not _internal_call:
            raise KeyboardInterrupt
        original(self, output_dir, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(ArcStageBTrainer, "save_model", kill)
        assert train() == 130
    assert train() == 0
    for name, tensor in state(finished / "student").items():
        assert torch.equal(state(tmp_path / "run" / "student")[name], tensor), name


def test_another_seed_is_another_run(train, finished, tmp_path):
    train("seed=1")
    assert any(
        not torch.equal(state(tmp_path / "run" / "teacher")[name], tensor)
        for name, tensor in state(finished / "teacher").items()
    )


def test_nan_in_training_ends_with_one_line(train, monkeypatch, tmp_path, capsys):
    original = ArcStageBTrainer.loss_terms

    def loss_terms(self, model, inputs):
        terms, outputs = original(self, model, inputs)
        return {name: term * (math.nan if self.state.global_step == 5 else 1) for name, term in terms.items()}, outputs

    monkeypatch.setattr(ArcStageBTrainer, "loss_terms", loss_terms)
    assert train() == 2
    assert "fastkd train: step 5, the batch" in capsys.readouterr().err
    assert (tmp_path / "run" / "student" / "checkpoint-4" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage_a.relation_heads=12"], "num_heads=12 does not divide the teacher's width 32; 8 and 16 divide both"),
        (["stage_a.layer_pairs=[[9, -1, 1.0]]"], "layer 9 is out of range; this model has 4 layers"),
        (["student.init=[0, 7]"], "layer 7 is out of range"),
        (["student={layers: 2, hidden: 16, heads: 4, init: random}"], "of the predecessor are (32, 4), of the student"),
        (["student={layers: 9}"], "layers=9: there are 4 to copy"),
        (["student={init: first}"], "student: layers must be given"),
        (["student={layres: 2}"], "student: unknown key 'layres'; did you mean 'layers'?"),
        (["stage_b=5"], "stage_b: a section of settings is needed, not 5"),
        (["stage_b.schedule=linaer"], "'linaer'"),
        (["stage_b.soft_weight=2"], "soft_weight=2; allowed is 0 to 1"),
        (["stage_b.groups=[[0, 1], [2]]"], "together the groups must be the predecessor's layers 0 to 3"),
        (["stage_a.train_embeddings=true"], "what stage A taught them would be lost"),
        (["finetune.max_steps=many"], "finetune: max_steps='many'; a whole number is needed"),
        (["seed=abc"], "arc: seed='abc'; a whole number is needed"),
        (["stage_a.train_embeddings=perhaps"], "stage_a: train_embeddings='perhaps'; true or false is needed"),
        (["corpus=no-such-folder/at/all"], "no-such-folder/at/all is neither a file or folder here"),
        (["corpus=5"], "corpus=5; a file, a folder, a hub name, or a list of these is needed"),
        (["stage_a.max_length=500"], "max_length=500, but the model takes at most 32 tokens"),
        (["max_length=1"], "max_length=1 leaves no room for text; it must be at least 3"),
        (["finetune.learning_rte=1"], "finetune: unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        (["stage_a.relation_head=8"], "stage_a: unknown key 'relation_head'; did you mean 'relation_heads'?"),
        (["corpos=[x]"], "arc: unknown key 'corpos'; did you mean 'corpus'?"),
        (["task=sst3"], "unknown task 'sst3' (did you mean 'sst2'?)"),
        (["hold_out=1.5"], "fraction=1.5; it must lie between 0 and 1"),
        (["teacher=does/not/exist"], "teacher=does/not/exist is no model: no such folder"),
        (["corpus=[no-such-folder/at/all]"], "no-such-folder/at/all is neither a file or folder here"),
        (["data=no-such-folder/at/all"], "the folder no-such-folder/at/all does not exist"),
        (["seed"], "'seed' is not of the form key=value"),
        (["recipe=acr"], "recipe: 'acr' is not one of arc"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(train, steps, tmp_path, capsys, words, message):
    assert train(*words) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1], error
    assert not (tmp_path / "run").exists()
    assert not any(steps.values())


def _without_labels(frame):
    return frame.drop(columns="label")


def _with_a_third_label(frame):
    return frame.assign(label=[2, *frame.label[1:]])


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", _without_labels, "sst2 train lacks the column label; it has sentence"),
        ("validation", _without_labels, "sst2 validation lacks the column label"),
        ("train", lambda frame: frame[:0], "sst2 train is empty"),
        ("validation", lambda frame: frame[:0], "sst2 validation is empty"),
        ("validation", _with_a_third_label, "row 0 has the label 2; allowed are 0 (negative), 1 (positive)"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_any_work(
    train, steps, data_folder, tmp_path, capsys, split, change, message
):
    shutil.copytree(data_folder, tmp_path / "data")
    path = tmp_path / "data" / f"{split}.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    assert train(f"data={tmp_path / 'data'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not any(steps.values())


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_any_work(
    train, steps, make_teacher, tokenizer, tmp_path, capsys
):
    make_teacher(vocab_size=60).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    assert train(f"teacher={tmp_path / 'small'}") == 2
    assert f"the tokenizer has {len(tokenizer)} tokens, the teacher's embedding 60 rows" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not any(steps.values())


def test_a_teacher_folder_without_a_model_is_refused(train, tmp_path, capsys):
    (tmp_path / "hollow").mkdir()
    assert train(f"teacher={tmp_path / 'hollow'}") == 2
    assert f"teacher={tmp_path / 'hollow'} is no model: the folder holds none that loads" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(train, steps, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = listing(tmp_path / "run")
    assert train("seed=5", "stage_a.max_steps=3") == 2
    assert "holds another run (it differs in seed: 0 -> 5, stage_a.max_steps: 12 -> 3)" in capsys.readouterr().err
    assert listing(tmp_path / "run") == before
    assert not any(steps.values())


def test_a_folder_with_other_files_is_left_alone(train, steps, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train() == 2
    assert "holds other files; name another folder, or overwrite=true" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    assert not any(steps.values())


def test_an_output_folder_that_is_a_file_is_left_alone(train, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert train("overwrite=true") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


def test_overwrite_starts_anew_and_leaves_other_files(train, steps, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train("overwrite=true", "stage_a.max_steps=3") == 0
    assert {name: steps[name] for name in _TRAINERS} == {"teacher": 12, "stage_a": 3, "student": 12}
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert train("stage_a.max_steps=3") == 0  # it is that run's folder now
    assert steps["stage_a"] == 3


def test_a_refused_overwrite_keeps_the_old_run(train, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = listing(tmp_path / "run")
    assert train("overwrite=true", "stage_a.relation_heads=12") == 2
    assert listing(tmp_path / "run") == before
