"""Rows before anything runs: names, modes, which row is another's fp32 self, and which task fits."""

from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest

from fastkd.data import Task
from fastkd.edge.report_accuracy import check_task, fill_accuracy
from fastkd.edge.report_rows import fill_speedups, rows_of
from fastkd.edge.report_schema import Cell


@pytest.fixture
def artifact(tmp_path):
    """artifact("a/model.onnx", "onnx", "int8", source="a"): its path and as much of it as a row reads."""

    def make(path, format="torch", precision="fp32", source=None, source_digest="", nbytes=100):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
        manifest = source and SimpleNamespace(source=source, source_digest=source_digest, verification={"bound": 1e-3})
        return SimpleNamespace(
            path=Path(file),
            format=format,
            precision=precision,
            manifest=manifest,
            nbytes=nbytes,
            files=lambda: [file],
            bytes_by_part=lambda: {"embedding": nbytes, "encoder": 0, "head": 0, "other": 0},
            parameters=lambda: (10, 20),
        )

    return make


def rows(*artifacts, modes=("eager",)):
    return rows_of([str(each.path) for each in artifacts], artifacts, modes)


def test_a_folder_has_a_row_for_each_mode_and_a_file_one(artifact):
    found = rows(artifact("teacher"), artifact("x/model.onnx", "onnx"), modes=["compile", "int8"])
    assert [(row.name, row.mode) for row in found] == [
        ("teacher", "eager"), ("teacher (compile)", "compile"), ("teacher (int8)", "int8"), ("model.onnx", None),
    ]  # fmt: skip
    assert found[2].precision == "int8"


def test_two_that_end_alike_are_named_by_their_paths(artifact):
    found = rows(artifact("a/model.onnx", "onnx"), artifact("b/model.onnx", "onnx"), artifact("student"))
    assert found[0].name.endswith("a/model.onnx") and found[1].name.endswith("b/model.onnx")
    assert found[2].name == "student"


def test_one_that_is_given_twice_is_refused(artifact):
    with pytest.raises(ValueError, match=r"model\.onnx is given twice"):
        rows(artifact("a/model.onnx", "onnx"), artifact("a/model.onnx", "onnx"))


def test_bytes_and_hash_are_those_of_the_files(artifact):
    teacher, student, copy = rows(artifact("t", nbytes=300), artifact("s"), artifact("x/s2", nbytes=60))
    assert (teacher.smaller, student.smaller, copy.smaller) == (1, 3, 5)
    assert student.bytes["total"] == 100 and student.parameters == {"stored": 10, "effective": 20}
    assert len({row.sha256 for row in (teacher, student, copy)}) == 3


def fp32_of(*artifacts, modes=("eager",)):
    return {row.name: row.fp32 for row in rows(*artifacts, modes=modes)}


def test_int8_is_compared_with_the_fp32_file_of_the_same_source(artifact):
    found = fp32_of(
        artifact("teacher"),
        artifact("student"),
        artifact("x/student.onnx", "onnx", "fp32", "student", "d1"),
        artifact("x/student-int8.onnx", "onnx", "int8", "student", "d1"),
        artifact("y/student-int8.xml", "openvino", "int8", "student", "d1"),
    )
    assert found["student-int8.onnx"] == "student.onnx", "its own format before the folder it came from"
    assert found["student-int8.xml"] in ("student", "student.onnx")
    assert found["student"] is found["student.onnx"] is None, "in fp32 themselves"


def test_int8_without_an_fp32_file_is_compared_with_the_folder_that_was_exported(artifact):
    int8 = artifact("x/model.onnx", "onnx", "int8", "student", "d1")
    assert fp32_of(artifact("teacher"), artifact("student"), int8)["model.onnx"] == "student"
    assert fp32_of(artifact("teacher"), artifact("other"), int8)["model.onnx"] is None


def test_an_fp32_file_of_another_source_is_not_its_own(artifact):
    other = artifact("x/other.onnx", "onnx", "fp32", "other", "d2")
    int8 = artifact("x/model.onnx", "onnx", "int8", "student", "d1")
    assert fp32_of(artifact("teacher"), other, int8)["model.onnx"] is None


def test_a_file_without_a_manifest_has_no_fp32_self(artifact):
    assert fp32_of(artifact("teacher"), artifact("x/model.onnx", "onnx", "int8"))["model.onnx"] is None


def test_torchs_int8_is_compared_with_the_same_folder(artifact):
    assert fp32_of(artifact("teacher"), artifact("student"), modes=["eager", "int8"])["student (int8)"] == "student"


def test_speed_ups_are_against_the_teacher_cell_by_cell(artifact):
    found = rows(artifact("teacher"), artifact("student"))
    found[0].cells = [Cell(1, 16, 1, p50_ms=8.0), Cell(1, 32, 1, p50_ms=20.0), Cell(8, 32, 1, failed="no")]
    found[1].cells = [Cell(1, 16, 1, p50_ms=2.0), Cell(1, 32, 1, failed="no"), Cell(8, 32, 1, p50_ms=1.0)]
    fill_speedups(found)
    assert [cell.speedup for cell in found[0].cells] == [1, 1, None]
    assert [cell.speedup for cell in found[1].cells] == [4, None, None]


def task(names=("negative", "positive"), metrics=("accuracy",), labels=(0, 1, 1, 0), found=0.75):
    made = SimpleNamespace(
        name="sst2",
        regression=not names,
        num_labels=len(names) or 1,
        label_names=names,
        metrics=metrics,
        validation={"label": list(labels)},
        compute_metrics=lambda of: {metrics[0]: float((of.predictions.argmax(1) == of.label_ids).mean())},
    )
    made.check_label_names = MethodType(Task.check_label_names, made)
    return made


def scored(artifact_task="sequence-classification", labels=2, id2label=None):
    id2label = id2label or {label: f"LABEL_{label}" for label in range(labels)}
    config = SimpleNamespace(num_labels=labels, id2label=id2label)
    return SimpleNamespace(path="model.onnx", task=artifact_task, config=lambda: config)


def test_a_task_that_fits_is_taken():
    check_task(scored(), task())
    check_task(scored(id2label={0: "NEGATIVE", 1: "POSITIVE"}), task())
    check_task(scored("regression", 1), task(names=()))


@pytest.mark.parametrize(
    ("artifact", "task", "message"),
    [
        (scored(labels=3), task(), "task=sst2 has 2 labels; model.onnx gives 3 outputs"),
        (scored("sentence-embedding"), task(), "task=sst2 has 2 labels; model.onnx gives sentence embeddings"),
        (scored("regression", 1), task(), "task=sst2 has 2 labels; model.onnx gives 1 outputs"),
        (
            scored("regression", 2),
            task(),
            "task=sst2 is a sequence-classification; model.onnx is a model for regression",
        ),
        (scored(id2label={0: "positive", 1: "negative"}), task(), "orders its labels negative, positive, model.onnx"),
        (scored(id2label={0: "spam", 1: "ham"}), task(), "has the labels negative, positive, model.onnx spam, ham"),
    ],
)
def test_a_task_whose_labels_do_not_fit_is_refused(artifact, task, message):
    with pytest.raises(ValueError, match=message):
        check_task(artifact, task)


def logits(*classes):
    return np.eye(2, dtype=np.float32)[list(classes)]


def test_differences_are_to_the_teacher_and_to_the_fp32_self(artifact):
    found = rows(
        artifact("teacher"), artifact("student"), artifact("x/int8.onnx", "onnx", "int8", "student"), artifact("dead")
    )
    outputs = {"teacher": logits(0, 1, 1, 0), "student": logits(0, 1, 1, 1), "int8.onnx": logits(0, 1, 0, 1)}
    fill_accuracy(found, outputs | {"dead": "MemoryError"}, task())
    teacher, student, int8, dead = (row.accuracy for row in found)
    assert (teacher.metrics["accuracy"], teacher.against_teacher, teacher.against_fp32) == (1.0, None, None)
    assert (student.against_teacher.points, student.against_fp32) == (-25, None)
    assert (int8.against_teacher.points, int8.against_fp32.points) == (-50, -25)
    assert int8.against_teacher.low < -25 <= int8.against_teacher.high
    assert (dead.metrics, dead.against_teacher, dead.failed) == ({}, None, "MemoryError")


def test_without_a_teachers_score_there_is_no_difference(artifact):
    found = rows(artifact("teacher"), artifact("student"))
    fill_accuracy(found, {"teacher": "MemoryError", "student": logits(0, 1, 1, 1)}, task())
    assert found[1].accuracy.metrics == {"accuracy": 0.75} and found[1].accuracy.against_teacher is None


def test_another_metric_than_accuracy_has_no_interval(artifact):
    found = rows(artifact("teacher"), artifact("student"))
    outputs = {"teacher": logits(0, 1, 1, 0), "student": logits(0, 1, 1, 1)}
    fill_accuracy(found, outputs, task(metrics=("matthews",)))
    assert found[1].accuracy.against_teacher.low is None
