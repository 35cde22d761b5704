"""The whole demo at a fraction of its size, on the toy task: what it measures, shows, writes, refuses and cleans up."""

import json
import time

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd.cli import main
from fastkd.data import score
from fastkd.models import create_student
from fastkd.recipes import demo, demo_report
from fastkd.recipes.demo import DemoSettings, run_demo
from fastkd.recipes.demo_report import BAG_OF_WORDS, LABELS_ONLY, STUDENT, TEACHER

TINY = DemoSettings(
    vocabulary=120,
    max_length=32,
    hidden=32,
    heads=2,
    relation_heads=4,
    teacher_layers=3,
    student_layers=2,
    teacher_steps=80,
    stage_a_steps=20,
    task_steps=40,
    learning_rate=3e-3,
    latency_sentences=10,
)
PLOTS = ("losses.png", "replacement.png", "accuracy-latency.png")


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """Folder and results of one run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, task=task, settings=TINY)


@pytest.fixture(scope="module")
def again(task, tmp_path_factory):
    """Results of the same run once more, and the weights that each student started from."""
    starts = []

    def recording(*args, **kwargs):
        student = create_student(*args, **kwargs)
        starts.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
        return student

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "create_student", recording)
        results = run_demo(tmp_path_factory.mktemp("again") / "out", task=task, settings=TINY)
    return results, starts


@pytest.fixture
def shortened(finished, task, monkeypatch):
    """The runs of a test take what was measured once, so that only the folder's handling is real."""
    _, results = finished
    monkeypatch.setattr(demo, "load_docstring_task", lambda: task)
    monkeypatch.setattr(demo, "train_models", lambda *_: ({}, results["logs"]))
    monkeypatch.setattr(demo, "compare", lambda *_: results["models"])


def without_times(results):
    models = {name: {k: v for k, v in of.items() if k != "latency_ms"} for name, of in results["models"].items()}
    losses = {name: [line["loss"] for line in log if "loss" in line] for name, log in results["logs"].items()}
    return models, losses


def test_compares_teacher_student_labels_only_and_bag_of_words(finished):
    _, results = finished
    assert list(results["models"]) == [TEACHER, STUDENT, LABELS_ONLY, BAG_OF_WORDS]
    for figures in results["models"].values():
        assert 0 <= figures["balanced_accuracy"] <= 1 and 0 <= figures["agreement"] <= 1
        assert figures["parameters"] > 0 and figures["megabytes"] > 0 and figures["latency_ms"] > 0


def test_everything_learns_the_toy_task_and_the_claims_hold(finished):
    _, results = finished
    for name, figures in results["models"].items():
        assert figures["balanced_accuracy"] > 0.85, name
    assert {claim: holds for claim, holds in results["checks"].items() if "faster" not in claim and not holds} == {}


def test_the_saved_student_is_the_one_that_was_measured(finished, task):
    out, results = finished
    labels = np.array(task.validation["label"])
    predictions = {}
    for folder in ("teacher", "arc-student"):
        model = AutoModelForSequenceClassification.from_pretrained(out / folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(out / folder)
        with torch.inference_mode():
            logits = model(**tokenizer(task.validation["sentence"][:], padding=True, return_tensors="pt")).logits
        predictions[folder] = logits.argmax(-1).numpy()
    student = results["models"][STUDENT]
    assert (
        student["balanced_accuracy"]
        == score(["balanced_accuracy"], predictions["arc-student"], labels)["balanced_accuracy"]
    )
    assert student["agreement"] == (predictions["teacher"] == predictions["arc-student"]).mean()
    assert model.config.num_hidden_layers == TINY.student_layers
    assert student["parameters"] == model.num_parameters()
    assert round(student["megabytes"] * 1e6) == (out / "arc-student" / "model.safetensors").stat().st_size


def test_labels_only_starts_from_the_same_weights_as_the_arc_student(again):
    _, starts = again
    arc, labels_only = starts
    assert all(torch.equal(arc[name], labels_only[name]) for name in arc)


def test_labels_only_takes_as_many_task_steps_as_stage_b(finished):
    _, results = finished
    last = {name: log[-1]["step"] for name, log in results["logs"].items()}
    assert last == {"teacher": 80, "stage A": 20, "stage B": 40, "labels only": 40}


def test_the_same_seed_gives_the_same_models_and_losses(finished, again):
    assert without_times(finished[1]) == without_times(again[0])


def test_stage_b_logs_the_rates_that_are_plotted(finished):
    _, results = finished
    rates = [line for line in results["logs"]["stage B"] if "rate_nominal" in line]
    assert rates[0]["rate_nominal"] < rates[0]["rate_effective"] < 1
    assert rates[-1]["rate_nominal"] == rates[-1]["rate_effective"] == rates[-1]["rate_drawn"] == 1


@pytest.mark.parametrize("name", PLOTS)
def test_the_plots_are_pictures_with_something_on_them(finished, name):
    pixels = imread(finished[0] / name)[..., :3]
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_results_json_holds_what_is_returned(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_the_output_names_the_claims_and_what_is_not_claimed(finished, capsys):
    out, results = finished
    demo_report.show(results, out, demo_report.Console(width=120))
    shown = capsys.readouterr().out
    assert all(name in shown for name in results["models"])
    assert "close to a bag of words" in shown and "nothing here shows that distillation helps" in shown


def test_a_claim_that_fails_is_named_and_the_exit_status_is_1(finished, capsys, monkeypatch):
    out, results = finished
    failed = results | {"checks": {"the sky is green": False}, "passed": False}
    demo_report.show(failed, out, demo_report.Console(width=120))
    assert "FAILS  the sky is green" in capsys.readouterr().out
    monkeypatch.setattr(demo, "run_demo", lambda out, seed: failed)
    assert main(["demo"]) == 1
    monkeypatch.setattr(demo, "run_demo", lambda out, seed: results | {"passed": True})
    assert main(["demo"]) == 0


@pytest.mark.parametrize(
    ("model", "figure", "value", "word"),
    [
        (STUDENT, "balanced_accuracy", 0.70, "97 %"),
        (STUDENT, "agreement", 0.70, "agrees"),
        (STUDENT, "latency_ms", 2.1, "faster"),
        (TEACHER, "balanced_accuracy", 0.60, "teacher learned"),
    ],
)
def test_each_claim_can_fail(model, figure, value, word):
    good = {"balanced_accuracy": 0.74, "agreement": 0.9, "latency_ms": 2.0}
    figures = {TEACHER: dict(good), STUDENT: good | {"latency_ms": 1.0}, BAG_OF_WORDS: dict(good)}
    assert all(demo_report.check(figures).values())
    figures[model][figure] = value
    assert [word in claim for claim, holds in demo_report.check(figures).items() if not holds] == [True]


def test_an_earlier_demo_is_replaced(finished, tmp_path, shortened):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"demo": "docstrings"}))
    (out / "old.png").touch()
    run_demo(out)
    assert not (out / "old.png").exists() and json.loads((out / "results.json").read_text())["models"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty and holds no earlier demo"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run_demo(tmp_path / "out")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_before_anything_is_written(tmp_path, seed):
    with pytest.raises(ValueError, match="allowed are 0 to"):
        run_demo(tmp_path / "new" / "out", seed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("earlier", [True, False])
def test_ctrl_c_leaves_nothing_half_written(tmp_path, shortened, monkeypatch, earlier):
    out = tmp_path / "out"
    if earlier:
        out.mkdir()
        (out / "results.json").write_text(json.dumps({"demo": "docstrings"}))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "plot_accuracy_latency", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(out)
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "results.json"] if earlier else [])


def test_latency_is_the_median_of_one_sentence_on_one_thread():
    threads = torch.get_num_threads()
    seen = []

    def sleep(seconds):
        def classify(sentences):
            seen.append((torch.get_num_threads(), len(sentences)))
            time.sleep(seconds)

        return classify

    torch.set_num_threads(2)
    try:
        found = demo_report.latencies({"slow": sleep(0.004), "fast": sleep(0.001)}, ["a"] * 15)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {(1, 1)}
    assert found["slow"] >= 4 and found["slow"] > found["fast"] >= 1


def test_threads_are_restored_when_a_model_fails():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        demo_report.latencies({"broken": lambda _: 1 / 0}, ["a"])
    assert torch.get_num_threads() == threads


def test_predictions_come_back_in_the_order_of_the_sentences():
    sentences = ["four", "a", "three", "be", "xxxxx"] * 30
    found = demo_report.in_batches(lambda batch: np.array([len(sentence) for sentence in batch]), sentences, size=7)
    assert found.tolist() == [len(sentence) for sentence in sentences]


def test_standard_error_of_a_balanced_accuracy():
    labels = np.array([0] * 100 + [1] * 25)
    predictions = np.array([0] * 50 + [1] * 50 + [1] * 20 + [0] * 5)
    # Recalls 0.5 of 100 and 0.8 of 25: variances 0.0025 and 0.0064 of a mean of two.
    assert demo_report.standard_error(predictions, labels) == pytest.approx(np.sqrt(0.0089) / 2)
