"""`fastkd gate` on reports made by hand: what passes, and each kind of failure. Nothing is measured here."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import BertConfig

import fastkd
from fastkd.cli import main
from fastkd.edge.artifact import open_artifact
from fastkd.edge.gate_budgets import Budgets, parse_milliseconds
from fastkd.edge.report_rows import digest

GOLDEN = Path(__file__).with_name("test_report_golden.json")


@pytest.fixture(autouse=True)
def student(tmp_path, monkeypatch):
    """An empty folder to work in, which holds models/student: as much of an artifact as a gate looks at."""
    monkeypatch.chdir(tmp_path)
    folder = Path("models/student")
    BertConfig(hidden_size=8, num_attention_heads=2).save_pretrained(folder)
    save_file({"weight": np.zeros(8, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def report(student):
    """report("name.json", change): a report of this student. The golden one's figures: p50 24 ms of 128 tokens (the
    teacher's 48), 8 ms of 32 tokens; 44 MB; at most 800 MB of memory; 0.4 points lost."""

    def write(name="report.json", change=lambda found: None):
        found = json.loads(GOLDEN.read_text(encoding="utf-8"))
        found["artifacts"][1]["sha256"] = digest(open_artifact(student))
        change(found)
        Path(name).write_text(json.dumps(found))
        return name

    return write


def gate(*words, artifact="models/student"):
    return main(["gate", artifact, *words])


def test_budgets_that_are_kept_pass_with_a_line_each(report, capsys):
    words = "--p50 24ms --p90 26ms --p95 27ms --p99 0.031s --size 44MB --memory 800MB --max-drop 0.4".split()
    assert gate("--against", report(), *words) == 0
    said = capsys.readouterr().out
    assert said.count("pass") == 7 and "FAIL" not in said
    assert "24 ms" in said and "44,000,000 bytes" in said and "0.40 points" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--p50 23.9ms", "p50 at batch 1, length 128, threads 1 is 24 ms, allowed 23.9 ms"),
        ("--p90 25ms", "p90 at batch 1, length 128, threads 1 is 25.2 ms, allowed 25 ms"),
        ("--p95 8ms", "p95 at batch 1, length 128, threads 1 is 26.4 ms, allowed 8 ms"),
        ("--p99 20000us", "p99 at batch 1, length 128, threads 1 is 30 ms, allowed 20 ms"),
        ("--size 14MB", "size is 44,000,000 bytes, allowed 14,000,000 bytes"),
        ("--memory 512MiB", "peak memory is 800,000,000 bytes, allowed 536,870,912 bytes"),
        ("--max-drop 0.3", "sst2 drop against teacher is 0.40 points, allowed 0.30 points"),
    ],
)
def test_a_budget_that_is_not_kept_fails_with_its_line(report, words, line, capsys):
    assert gate("--against", report(), *words.split()) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"FAIL student: {line}"


def test_every_line_that_fails_is_told_beside_those_that_pass(report, capsys):
    assert gate("--against", report(), "--p50", "1ms", "--size", "1MB", "--max-drop", "1") == 1
    said = capsys.readouterr().out
    assert said.count("FAIL student") == 2 and said.count("pass") == 1


def test_the_cell_is_said_and_can_be_chosen(report, capsys):
    assert gate("--against", report(), "--p50", "24ms") == 0
    assert "cell: batch 1, length 128, threads 1; --cell chooses another" in capsys.readouterr().out
    assert gate("--against", report(), "--p50", "8ms", "--cell", "1,32,1") == 0
    assert "p50 at batch 1, length 32, threads 1" in capsys.readouterr().out


def test_the_reports_warnings_are_repeated(report, capsys):
    gate("--against", report(), "--p50", "24ms")
    assert "warning: OMP_NUM_THREADS is not set here" in capsys.readouterr().out


def test_better_than_the_teacher_is_no_drop(report):
    def better(found):
        found["artifacts"][1]["accuracy"]["against_teacher"]["points"] = 1.5

    assert gate("--against", report(change=better), "--max-drop", "0") == 0


@pytest.mark.parametrize("words", [["--p50", "1s"], ["--memory", "9GB"], ["--max-drop", "99"]])
def test_what_could_not_be_measured_fails_with_the_reason(report, words, capsys):
    def broken(found):
        student, dead = found["artifacts"][1], found["artifacts"][3]
        student.update({part: dead[part] for part in ("accuracy", "processes", "cells")})

    assert gate("--against", report(change=broken), *words) == 1
    assert "not measured: its process was killed (SIGKILL)" in capsys.readouterr().out


def test_a_cell_that_failed_half_way_is_not_measured(report, capsys):
    def half(found):
        found["artifacts"][1]["cells"][1]["failed"] = "MemoryError"

    assert gate("--against", report(change=half), "--p50", "1s") == 1
    assert "not measured: MemoryError" in capsys.readouterr().out


def test_an_artifact_that_changed_since_the_report_is_refused(report, student, capsys):
    path = report()
    save_file({"weight": np.ones(8, np.float32)}, student / "model.safetensors")
    assert gate("--against", path, "--p50", "1s") == 2
    said = capsys.readouterr().err
    assert "models/student is not what report.json measured" in said and "run `fastkd report` again" in said


def test_an_artifact_elsewhere_is_found_by_its_name(report, student):
    path = report()
    student.rename("student")
    assert gate("--against", path, "--p50", "24ms", artifact="student") == 0


def test_an_artifact_that_the_report_lacks_is_refused_with_those_it_has(report, student, capsys):
    path = report()
    student.rename("other")
    assert gate("--against", path, "--p50", "24ms", artifact="other") == 2
    assert "has no other in mode eager; it has teacher, student, model.onnx, broken.onnx" in capsys.readouterr().err


def test_a_mode_is_a_row_of_its_own(report, capsys):
    def compiled(found):
        found["artifacts"][3].update(found["artifacts"][1], name="student (compile)", mode="compile")
        found["artifacts"][3]["bytes"] = {"total": 1}

    path = report(change=compiled)
    assert gate("--against", path, "--size", "1B", "--mode", "compile") == 0
    assert gate("--against", path, "--size", "1B") == 1
    assert gate("--against", path, "--size", "1B", "--mode", "int8") == 2
    assert "no student in mode int8" in capsys.readouterr().err


def slower(factor):
    """The student's times, on a machine that takes `factor` times as long for everything."""

    def change(found):
        for row in found["artifacts"][:2]:
            for cell in row["cells"]:
                cell["p50_ms"] *= factor

    return change


def test_a_baseline_of_a_slower_machine_compares_by_the_ratio_to_the_teacher(report, capsys):
    baseline = report("baseline.json", slower(3))
    assert gate("--against", report(), "--baseline", baseline, "--max-ratio", "1.0") == 0
    assert capsys.readouterr().out.count("1.000 times the baseline") == 4, "p50 and size, measured and allowed"


def test_a_student_that_became_slower_or_larger_fails_by_its_ratio(report, capsys):
    def faster_and_smaller_then(found):
        found["artifacts"][1]["cells"][1]["p50_ms"] = 20.0
        found["artifacts"][1]["bytes"]["total"] = 22_000_000

    baseline = report("baseline.json", faster_and_smaller_then)
    words = ("--against", report(), "--baseline", baseline)
    assert gate(*words, "--max-ratio", "1.1") == 1
    said = capsys.readouterr().out
    assert "p50 in relation to the teacher's at batch 1, length 128, threads 1 is 1.200 times the baseline" in said
    assert "size in relation to the teacher's is 2.000 times the baseline, allowed 1.100" in said
    assert gate(*words, "--max-ratio", "2") == 0


def test_a_baseline_with_another_teacher_is_refused(report, capsys):
    def other(found):
        found["artifacts"][0].update(sha256="ee" * 32, name="another")

    words = ("--baseline", report("baseline.json", other), "--max-ratio", "1.1")
    assert gate("--against", report(), *words) == 2
    assert "baseline.json was made with another teacher (another)" in capsys.readouterr().err


def test_a_baseline_without_the_figure_is_refused(report, capsys):
    def missing(found):
        found["artifacts"][1]["cells"][1].update(p50_ms=None, failed="MemoryError")

    words = ("--baseline", report("baseline.json", missing), "--max-ratio", "1.1")
    assert gate("--against", report(), *words) == 2
    assert "the baseline has no p50 of student" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["--against", "--baseline"])
def test_a_report_of_another_schema_version_is_refused(report, which, capsys):
    old = report("old.json", lambda found: found.update(schema=7))
    words = ("--against", old) if which == "--against" else ("--against", report(), "--baseline", old)
    assert gate(*words, *(["--max-ratio", "1.1"] if which == "--baseline" else ["--p50", "1s"])) == 2
    assert "old.json has schema version 7, this fastkd reads version 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no budget: give at least one of p50"),
        (["--p95", "8"], "p95='8': a duration is needed, such as 8ms"),
        (["--size", "14 parsecs"], "size='14 parsecs': bytes are needed, such as 14MB"),
        (["--memory", "0"], "memory='0': bytes are needed"),
        (["--max-drop", "-1"], "max_drop=-1.0; points that may be lost"),
        (["--p50", "1s", "--cell", "1,128"], "cell='1,128': batch, length and threads are needed"),
        (["--p50", "1s", "--cell", "0,128,1"], "cell='0'; whole numbers of 1 or more"),
        (
            ["--p50", "1s", "--cell", "1,16,1"],
            "has no cell batch 1, length 16, threads 1 (--cell); it has 1,32,1; 1,128",
        ),
        (["--max-ratio", "1.1"], "baseline and max_ratio go together"),
        (["--p50", "1s", "--baseline", "report.json"], "baseline and max_ratio go together"),
        (["--max-ratio", "0", "--baseline", "report.json"], "max_ratio=0.0; a number above 0 is needed"),
        (["--p50", "1s", "--task", "sst2"], "task: report.json says what it was"),
        (["--p50", "1s", "--teacher", "models/teacher"], "teacher: report.json says what it was"),
    ],
)
def test_wrong_use_is_status_2_with_its_reason(report, words, message, capsys):
    assert gate("--against", report(), *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-drop", "1"], "max_drop: without a report (--against) a teacher and a task are needed"),
        (["--max-drop", "1", "--teacher", "x"], "max_drop: without a report (--against) a teacher and a task"),
        (["--max-ratio", "2", "--baseline", "report.json"], "max_ratio: without a report (--against) a teacher is"),
        (["--p50", "1s", "--cell", "1,128,4096"], "threads=4096; this machine gives"),
    ],
)
def test_measuring_needs_what_it_compares_with(report, words, message, capsys):
    report()
    assert gate(*words) == 2
    assert message in capsys.readouterr().err


def test_a_drop_needs_a_report_that_scored_a_task_and_an_artifact_that_is_not_its_teacher(report, capsys):
    untasked = report("untasked.json", lambda found: found["settings"].update(task=None))
    assert gate("--against", untasked, "--max-drop", "1") == 2
    assert "max_drop: the report scored no task" in capsys.readouterr().err
    alone = report("alone.json", lambda found: found["artifacts"].pop(0))
    assert gate("--against", alone, "--max-drop", "1") == 2
    assert "student is the teacher of its report" in capsys.readouterr().err


def test_python_gets_the_verdict(report):
    verdict = fastkd.edge.gate("models/student", against=report(), p50="20ms", size=44_000_000)
    assert not verdict.passed
    assert [line.passed for line in verdict.lines] == [False, True]


@pytest.mark.parametrize(("text", "milliseconds"), [("8ms", 8), ("1.2 s", 1200), ("800us", 0.8), ("5µs", 0.005)])
def test_a_duration_is_read(text, milliseconds):
    assert parse_milliseconds("p50", text) == pytest.approx(milliseconds)


@pytest.mark.parametrize("text", ["", "ms", "-3ms", "8 parsecs", "0ms", "8", "nan s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"p99=.*such as 8ms"):
        Budgets(p99=text)
