"""`fastkd report` from folders and a file to a folder: one real report, and what is refused before any work."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, BertForSequenceClassification

from fastkd.cli import main
from fastkd.data import train_wordpiece
from fastkd.edge import report_run
from fastkd.edge.report_schema import read_report
from fastkd.edge.report_settings import ReportSettings

GOOD, BAD = "good fine great lovely".split(), "bad awful poor boring".split()
OTHER = "the a film plot it was is and of with actor story scene music very quite".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SST-2's columns and split names; the label says which of two kinds of words stands in a sentence."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, count in (("train", 120), ("validation", 40)):
        rows = [
            (" ".join([*draw.choices(OTHER, k=draw.randint(2, 9)), draw.choice((BAD, GOOD)[row % 2])]), row % 2)
            for row in range(count)
        ]
        pd.DataFrame(rows, columns=["sentence", "label"]).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    """A folder with `teacher` and `student`, tiny classifiers of 4 layers and of 1, and `onnx/model.onnx`, which counts
    good and bad words and so is always right."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_wordpiece(pd.read_parquet(data / "train.parquet")["sentence"].tolist(), 150, max_length=32)
    for name, layers in (("teacher", 4), ("student", 1)):
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2,
            num_hidden_layers=layers, max_position_embeddings=32,
        )  # fmt: skip
        torch.manual_seed(layers)
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "onnx").mkdir()
    config.save_pretrained(folder / "onnx")
    tokenizer.save_pretrained(folder / "onnx")
    onnx.save(word_counter(tokenizer), folder / "onnx/model.onnx")
    return folder


def word_counter(tokenizer) -> onnx.ModelProto:
    table = np.zeros((len(tokenizer), 2), np.float32)
    for label, words in enumerate((BAD, GOOD)):
        table[tokenizer.convert_tokens_to_ids(words), label] = 1
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("ReduceSum", ["rows", "axis"], ["logits"], keepdims=0),
        ],
        "word_counter",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def report(models):
    """report("teacher", "student", "--threads", "1"): the command's status; artifacts by their name under `models`."""

    def run(*words):
        words = [str(models / word) if (models / word).exists() else word for word in words]
        return main(["report", *words, "--out", "out"])

    return run


def test_a_report_from_folders_and_a_file_to_tables_json_card_and_plots(report, data, models, capsys):
    cells = "--lengths 8,16 --batches 1,2 --threads 1 --rounds 2 --max-length 32 --task sst2 --data".split()
    assert report("teacher", "student", "onnx/model.onnx", *cells, str(data)) == 0
    said = capsys.readouterr().out
    assert os.listdir() == ["out"]
    assert sorted(os.listdir("out")) == [
        "accuracy_bytes.png", "accuracy_latency.png", "latency_length.png", "report.json", "report.md",
    ]  # fmt: skip
    found = read_report("out/report.json")
    teacher, student, counter = found.artifacts
    assert [row.name for row in found.artifacts] == ["teacher", "student", "model.onnx"]
    assert counter.runtime.startswith("onnxruntime") and student.runtime.startswith("torch")
    for row in found.artifacts:
        assert [cell.key for cell in row.cells] == [(1, 8, 1), (1, 16, 1), (2, 8, 1), (2, 16, 1)]
        for cell in row.cells:
            assert cell.failed is None and cell.calls >= 4
            assert 0 < cell.p50_ms <= cell.p90_ms <= cell.p95_ms <= cell.p99_ms
            assert cell.tokenize_ms > 0
        [process] = row.processes
        assert process.cold_start_s > process.load_s + process.import_s > 0
        assert process.memory_peak_bytes > process.memory_imports_bytes > 50e6
        assert row.bytes["total"] == sum(value for part, value in row.bytes.items() if part != "total")
    assert counter.bytes["total"] == (models / "onnx/model.onnx").stat().st_size
    assert counter.accuracy.metrics == {"accuracy": 1.0} and counter.accuracy.examples == 40
    gain = 100 * (1 - teacher.metric)
    assert counter.accuracy.against_teacher.points == pytest.approx(gain) and gain > 10
    assert counter.cell((1, 16, 1)).speedup > 1, "a lookup against four layers"
    assert "model.onnx" in said and "100.00" in said and "written to out" in said
    assert "| model.onnx | 100.00 |" in Path("out/report.md").read_text()

    # The same folder holds what a gate needs.
    words = [
        "gate",
        str(models / "onnx/model.onnx"),
        "--against",
        "out/report.json",
        "--size",
        "1MB",
        "--max-drop",
        "0",
    ]
    assert main(words) == 0


def test_a_gate_without_a_report_measures_the_artifact_beside_its_teacher_at_its_cell(models, monkeypatch, capsys):
    def measured(rows, plan, outputs):
        assert ([row.name for row in rows], plan.predict) == (["teacher", "model.onnx"], None)
        for row in rows:
            row.cells = plan.empty_cells()
            [cell] = row.cells
            cell.calls, cell.p50_ms, cell.spread, cell.failed = 200, 2.0, 0.0, None

    monkeypatch.setattr(report_run, "measure", measured)
    words = ["--teacher", str(models / "teacher"), "--p50", "2ms", "--size", "10B", "--cell", "2,16,1"]
    assert main(["gate", str(models / "onnx/model.onnx"), *words]) == 1
    said = capsys.readouterr().out
    assert "p50 at batch 2, length 16, threads 1" in said and said.count("pass") == 1
    assert said.splitlines()[-1].startswith("FAIL model.onnx: size is ")
    assert not os.listdir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["teacher", "teacher"], "teacher is given twice"),
        (["teacher", "--lengths", "16,64"], "takes at most 32 tokens"),
        (["teacher", "--lengths", "2"], "max_length=2 leaves no room for text"),
        (["teacher", "--lengths", "16,"], "lengths='16,'; whole numbers of 1 or more are needed"),
        (["teacher", "--batches", "0"], "batches='0'"),
        (["teacher", "--threads", "1,4096"], "threads=4096; this machine gives"),
        (["teacher", "--modes", "eager,jit"], "modes=jit; allowed are eager, compile, int8"),
        (["teacher", "--rounds", "0"], "rounds=0; 1 or more are needed"),
        (["teacher", "--lengths", "16", "--data", "x"], "data=x: of which task?"),
        (["teacher", "--lengths", "16", "--task", "sst3"], "unknown task 'sst3'"),
    ],
)
def test_a_mistake_is_named_before_any_work_and_nothing_is_written(report, words, message, capsys, monkeypatch):
    monkeypatch.setattr(report_run, "measure", lambda *args: pytest.fail("something was measured"))
    defaults = [] if "--lengths" in words else ["--lengths", "16"]
    assert report(*words, *defaults) == 2
    assert message in capsys.readouterr().err
    assert not os.listdir()


def test_a_task_whose_labels_do_not_fit_is_refused_before_any_work(report, tmp_path, capsys):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for split in ("train", "validation"):
        frame = pd.DataFrame({"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": [0, 1, 2]})
        frame.to_parquet(pairs / f"{split}.parquet")
    words = ["--lengths", "16", "--max-length", "32", "--task", "mnli", "--data", str(pairs)]
    assert report("teacher", *words) == 2
    said = capsys.readouterr().err
    assert "task=mnli has 3 labels" in said and "gives 2 outputs" in said
    assert os.listdir() == ["pairs"]


def test_an_output_folder_that_holds_something_is_left_alone_unless_told(report, capsys):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert report("teacher", "--lengths", "16") == 2
    assert "out=out is not empty" in capsys.readouterr().err
    assert os.listdir("out") == ["mine.txt"]


def test_an_interruption_leaves_a_report_of_what_was_measured(report, monkeypatch):
    def interrupted(rows, plan, outputs):
        for row in rows:
            row.cells = plan.empty_cells()
        cell = rows[0].cells[0]
        cell.calls, cell.p50_ms, cell.mean_ms, cell.spread, cell.failed = 5, 2.0, 2.0, 0.0, None
        raise KeyboardInterrupt

    monkeypatch.setattr(report_run, "measure", interrupted)
    assert report("teacher", "student", "--lengths", "16,32", "--batches", "1") == 130
    found = read_report("out/report.json")
    assert found.teacher.cells[0].p50_ms == 2.0
    assert "teacher: not run" in found.warnings and "student: not run" in found.warnings
    assert "| student | 1 | 32 | 1 | not run |" in Path("out/report.md").read_text()


def test_a_plot_that_fails_does_not_take_the_figures_with_it(report, monkeypatch):
    def measured(rows, plan, outputs):
        for row in rows:
            row.cells = plan.empty_cells()
            row.cells[0].calls = 1

    def broken(*args):
        raise OSError("no font")

    monkeypatch.setattr(report_run, "measure", measured)
    monkeypatch.setattr(report_run, "draw", broken)
    with pytest.raises(OSError, match="no font"):
        report("teacher", "--lengths", "16")
    assert json.loads(Path("out/report.json").read_text())["schema"] == 1


def test_psutil_and_cpuinfo_that_are_missing_are_named(report, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert report("teacher", "--lengths", "16") == 2
    assert "pip install 'fastkd[edge]'" in capsys.readouterr().err


def test_lists_are_sorted_and_each_value_stands_once():
    settings = ReportSettings(["teacher"], lengths="128,16,16", batches=[8, 1], modes="int8,eager,int8")
    assert (settings.lengths, settings.batches, settings.modes) == ([16, 128], [1, 8], ["int8", "eager"])
