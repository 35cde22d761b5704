"""EGKD from end to end: `fastkd train` on a YAML file of one's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)

from fastkd.cli import main
from fastkd.explain import compute
from fastkd.recipes import EgkdTrainer, FineTuneTrainer, egkd_branches, egkd_teacher, run_recipe

_TRAINERS = {"teacher": FineTuneTrainer, "student": EgkdTrainer}
ALL = {"gradient": 10.0, "perturbation": 0.5, "selection": 0.5}


@pytest.fixture(scope="module")
def settings(teacher_folder, data_folder):
    step = {"bf16": False, "learning_rate": 2e-3, "logging_steps": 5, "save_steps": 2, "disable_tqdm": True}
    return {
        "recipe": "egkd",
        "teacher": str(teacher_folder),
        "task": "sst2",
        "data": str(data_folder),
        "max_length": 32,
        "student": {"layers": 2},
        "finetune": step | {"max_steps": 4},
        "distil": step | {"max_steps": 6, "branches": ALL, "pool": {"samples": 4}, "selector": {"epochs": 1}},
    }


@pytest.fixture
def train(settings, tmp_path):
    """train("key=value", ..): the command on a file of one's own; returns its exit status."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / "run")}))

    def run(*words):
        return main(["train", str(tmp_path / "mine.yaml"), *words])

    return run


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a finished run of six steps, all of them explained."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    distil = settings["distil"] | {"logging_steps": 1, "explain_after": 0.0}
    run_recipe(settings | {"output_dir": str(folder), "distil": distil})
    return folder


@pytest.fixture
def steps(monkeypatch):
    """Counts the training steps of each trainer, and how often the teacher's results were computed;
    `steps["interrupt"] = (step, n)` stops at the n-th."""
    counted = dict.fromkeys([*_TRAINERS, "results"], 0)

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
    compute = egkd_teacher.compute_results

    def compute_results(*args, **kwargs):
        if counted.get("interrupt") == ("results", counted["results"]):
            raise KeyboardInterrupt
        counted["results"] += 1
        return compute(*args, **kwargs)

    monkeypatch.setattr(egkd_teacher, "compute_results", compute_results)
    return counted


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def losses(folder: Path) -> list[dict[str, float]]:
    log = json.loads((folder / "student" / "done.json").read_text())["log"]
    return [{name: line[name] for name in line if name.startswith("loss")} for line in log if "loss" in line]


def test_an_interrupted_run_goes_on_to_the_end_of_one_that_was_not(train, steps, finished, tmp_path, capsys):
    """Stopped in every step; there is a checkpoint every two steps."""
    words = ("distil.explain_after=0", "distil.logging_steps=1")
    for steps["interrupt"] in (("teacher", 3), ("results", 0), ("student", 5)):
        assert train(*words) == 130
    del steps["interrupt"]
    assert train(*words) == 0
    assert steps == {"teacher": 5, "results": 1, "student": 7}
    for name, tensor in state(finished / "student").items():
        assert torch.equal(state(tmp_path / "run" / "student")[name], tensor), name
    said = capsys.readouterr().out
    assert "student: accuracy" in said and "gradient explanations agree: cosine" in said and "(by chance" in said
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_hidden_layers == 2
    assert student.config.id2label == {0: "negative", 1: "positive"}
    AutoTokenizer.from_pretrained(tmp_path / "run" / "student")


def test_the_results_say_how_alike_teacher_and_student_explain(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == {"teacher", "student", "consistency"}
    assert set(results["consistency"]) == {"gradient", "perturbation"}
    for found in results["consistency"].values():
        assert found["sequences"] == 96 and -1 <= found["cosine"] <= 1 and 0 <= found["overlap"] <= 1
        chance = found["by_chance"]
        assert set(chance) == {"cosine", "spearman", "overlap"} and abs(chance["spearman"]) < 0.2
    page = (finished / "explanations.html").read_text()
    assert page.count("<table>") == 12 and "student" in page and "[CLS]" not in page


def test_logits_are_stored_as_they_are(finished):
    """Rounded, the teacher's prediction could be another class."""
    logits = load_file(finished / "teacher_results" / "results.safetensors")["example.logits"]
    assert logits.dtype == torch.float32 and (logits != logits.half()).any()


def test_a_bilstm_learns_from_stored_results_without_the_teacher(train, finished, tmp_path, monkeypatch):
    running = []
    original = EgkdTrainer.loss_terms

    def loss_terms(self, *args):
        running.append(self._running)
        return original(self, *args)

    monkeypatch.setattr(EgkdTrainer, "loss_terms", loss_terms)
    shared = f"results={finished / 'teacher_results' / 'results.safetensors'}"
    assert train(shared, "student={kind: bilstm, layers: 1, hidden: 16}", "distil.max_steps=3") == 0
    assert running == [None] * 3
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert type(student).__name__ == "BiLstmForSequenceClassification"


def test_without_stored_results_the_teacher_runs_and_the_losses_are_the_same(train, finished, tmp_path):
    assert train("stored=false", "distil.explain_after=0", "distil.logging_steps=1") == 0
    assert not (tmp_path / "run" / "teacher_results").exists()
    for stored, running in zip(losses(finished), losses(tmp_path / "run"), strict=True):
        assert {"loss_gradient", "loss_perturbation", "loss_selection"} < set(stored)
        for name, loss in stored.items():  # what is stored is rounded to fp16
            assert running[name] == pytest.approx(loss, rel=2e-2, abs=2e-5), name


def test_results_that_were_stopped_go_on_where_they_were(train, finished, tmp_path, monkeypatch):
    """Parts of 64 examples of the 330; the run is stopped in the third."""
    monkeypatch.setattr(compute, "_OF_A_PART", 64)
    asked, original = [], egkd_branches.masked_logits

    def masked_logits(*args, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(egkd_branches, "masked_logits", masked_logits)
    assert train("distil.max_steps=1") == 130
    folder = tmp_path / "run" / "teacher_results"
    kept = ["00000.safetensors", "00001.safetensors", "selector.safetensors"]
    assert sorted(file.name for file in folder.glob("*/*")) == kept
    monkeypatch.setattr(egkd_teacher, "train_selector", None)  # one that is kept is not trained again
    counted = []
    monkeypatch.setattr(egkd_branches, "masked_logits", lambda *a, **k: counted.append(1) or original(*a, **k))
    assert train("distil.max_steps=1") == 0
    one, other = (load_file(run / "teacher_results" / "results.safetensors") for run in (tmp_path / "run", finished))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
    assert not list(folder.glob("*.parts"))
    assert len(counted) == 4 + 2  # four of six batches, and the two masked branches of the one step


def test_a_file_of_results_serves_other_runs_with_fewer_branches(train, steps, finished, capsys):
    shared = f"results={finished / 'teacher_results' / 'results.safetensors'}"
    assert train(shared, "distil.branches={selection: 1.0}", "distil.max_steps=1") == 0
    assert steps["results"] == 0 and "for 330 examples, read from" in capsys.readouterr().out


def test_a_file_of_other_results_is_refused_before_any_work(train, steps, finished, tmp_path, capsys):
    shared = f"results={finished / 'teacher_results' / 'results.safetensors'}"
    assert train(shared, "distil.pool.seed=3") == 2
    error = capsys.readouterr().err
    assert "; perturbation.seed: 0 is stored, 3 given. Name another file with results=, give" in error
    assert "the teacher" not in error
    assert not (tmp_path / "run").exists() and not any(steps.values())


def test_a_file_of_another_teacher_is_refused(train, steps, finished, capsys):
    shared = f"results={finished / 'teacher_results' / 'results.safetensors'}"
    assert train(shared, "finetune.max_steps=1") == 2
    said = capsys.readouterr()
    first, *_ = said.out.splitlines()
    assert "results.safetensors is there: its teacher is compared with this run's once that is fine-tuned" in first
    assert (
        "the teacher (its weights or configuration)" in said.err
        and "the same teacher by finetuned_teacher=" in said.err
    )
    assert steps["results"] == steps["student"] == 0


def test_overwriting_starts_anew_with_other_results(train, steps, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    words = ("distil.pool.seed=3", "distil.max_steps=1", "finetune.max_steps=1")
    assert train(*words) == 2
    assert train(*words, "overwrite=true") == 0
    assert steps == {"teacher": 1, "results": 1, "student": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil.branches.lime=1"], "branches: unknown key 'lime'"),
        (["distil.branches.gradient=-1"], "distil: branches: gradient=-1; a weight of 0 or more is needed"),
        (["distil.branches.gradient=.inf"], "distil: branches: gradient=inf; a weight of 0 or more is needed"),
        (["distil.branches=gradient"], "branches='gradient'; a section `key: value` is needed"),
        (["distil.gradient.steps=0"], "distil.gradient: steps=0; a whole number is needed, 1 at least"),
        (["distil.gradient.stepz=2"], "distil.gradient: unknown key 'stepz'; did you mean 'steps'?"),
        (["distil.gradient.method=attention"], "distil.gradient: method='attention'; allowed are saliency"),
        (["distil.second_order=double"], "second_order='double'; allowed are exact, central_difference"),
        (["distil.target=gold"], "target='gold'; allowed are predicted, label, all"),
        (["distil.distance=l3"], "distance='l3'; allowed are l1, l2, smooth_l1"),
        (["distil.masks=5"], "distil: masks=5; allowed are 1 to 4"),
        (["distil.pool.samples=2"], "distil.pool: samples=2; a whole number is needed, 4 at least"),
        (["distil.pool.samples=8.5"], "distil.pool: samples=8.5; a whole number is needed"),
        (["distil.pool.keep=0.5"], "distil.pool: keep=0.5; two shares of kept tokens are needed"),
        (["distil.pool.keep=[0.9, 0.5]"], "distil.pool: keep=(0.9, 0.5); two shares of kept tokens are needed"),
        (["distil.mask_baseline=noise"], "mask_baseline='noise'; allowed are zero, mask"),
        (["distil.selector.ratio=0"], "distil.selector: ratio=0; the share of tokens must lie in (0, 1]"),
        (["distil.soft_weight=1.5"], "soft_weight=1.5; allowed is 0 to 1"),
        (["distil.temperature=0"], "distil: temperature=0; it must be positive"),
        (["distil.temperature=.inf"], "distil: temperature=inf; it must be positive and finite"),
        (["distil.explain_after=1"], "explain_after=1; it must lie in [0, 1)"),
        (["distil.explain_share=0"], "explain_share=0; it must lie in (0, 1]"),
        (["distil.explain_every=0"], "explain_every=0; a whole number is needed, 1 at least"),
        (["distil.max_skipped=0"], "max_skipped=0; a whole number is needed, 1 at least"),
        (["distil.perturbation=embedding"], "perturbation=embedding moves the student's embeddings, and so do"),
        (["distil.torch_compile=true"], "the branches tap embeddings by hooks"),
        (["distil.gradient_checkpointing=true"], "gradient_checkpointing=true runs layers again outside the pass"),
        (["stored=false", "results=a.safetensors"], "without stored results there is no such file"),
        (["student={kind: gru, layers: 1}"], "student: kind='gru'; allowed is bilstm"),
        (["student={kind: bilstm, layers: 1}"], "student: hidden must be given"),
        (["student={kind: bilstm, layers: 0, hidden: 8}"], "layers=0: a positive whole number is needed"),
        (["student={layers: 9}"], "layers=9: there are 4 to copy"),
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


def test_a_folder_is_no_file_of_results(train, steps, tmp_path, capsys):
    assert train(f"results={tmp_path}") == 2
    said = capsys.readouterr().err
    assert f"results={tmp_path} is a folder; name a file, such as results={tmp_path}/results.safetensors" in said
    assert not (tmp_path / "run").exists() and not any(steps.values())


@pytest.mark.parametrize(
    "words",
    [
        ["distil.gradient={method: integrated_gradients, baseline: mask}"],
        ["distil.branches={perturbation: 1}", "distil.mask_baseline=mask"],
        ["distil.branches={selection: 1}", "distil.selector={epochs: 1, baseline: mask}"],
    ],
    ids=["gradient", "perturbation", "selection"],
)
def test_a_mask_baseline_needs_a_mask_token(train, steps, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(PreTrainedTokenizerBase, "mask_token_id", None, raising=False)
    assert train(*words) == 2
    assert "the baseline 'mask' needs a mask token, and the tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not any(steps.values())


def test_a_model_that_offers_no_embeddings_is_refused_before_any_work(train, steps, tmp_path, capsys, monkeypatch):
    def none(model):
        raise ValueError("unknown architecture")

    monkeypatch.setattr(egkd_teacher, "embeddings_of", none)
    monkeypatch.setattr(BertForSequenceClassification, "get_input_embeddings", lambda self: None)
    assert train() == 2
    assert "BertForSequenceClassification offers no embeddings to explain" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not any(steps.values())
