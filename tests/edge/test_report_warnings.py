"""Where figures mislead, the report says so, in the table and in Markdown."""

from pathlib import Path

import pytest

from fastkd.edge.report_plots import draw
from fastkd.edge.report_schema import read_report
from fastkd.edge.report_table import PLOTS, show, to_markdown
from fastkd.edge.report_warnings import warnings_of


@pytest.fixture
def report():
    return read_report(Path(__file__).with_name("test_report_golden.json"))


def quiet(report):
    """The golden report with nothing to warn of: threads set outside, and no artifact that failed."""
    report.machine.threads_environment["OMP_NUM_THREADS"] = "1"
    del report.artifacts[3]
    return report


def test_a_quiet_machine_that_can_multiply_int8_has_none(report):
    assert warnings_of(quiet(report)) == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda r: setattr(r.machine, "load_average", 1.5), "load average 1.50 before the first measurement"),
        (lambda r: r.machine.threads_environment.update(OMP_NUM_THREADS=None), "OMP_NUM_THREADS is not set here"),
        (lambda r: r.settings.update(threads=[1, 8]), "8 threads on 4 physical cores"),
        (lambda r: r.machine.features.remove("avx512_vnni"), "no VNNI or dot-product instructions: int8 is slower"),
        (lambda r: r.machine.features.clear(), "the system does not say what its CPU can do"),
        (
            lambda r: setattr(r.artifacts[1], "precision", "bf16"),
            "no bf16 instructions: bf16 is emulated here (student)",
        ),
        (
            lambda r: setattr(r.artifacts[1], "precision", "fp16"),
            "no fp16 instructions: fp16 is emulated here (student)",
        ),
        (
            lambda r: setattr(r.artifacts[1].cells[2], "spread", 0.2),
            "in 1 of 12 cells (p90 - p10) / p50 is above 15%, at most 20% (student, batch 8, length 32, threads 1)",
        ),
        (lambda r: setattr(r.artifacts[0].cells[0], "calls", 20), "1 of 12 cells, down to 20 calls"),
        (lambda r: setattr(r.artifacts[2].cells[0], "failed", "MemoryError"), "model.onnx: MemoryError"),
    ],
)
def test_a_reason_for_doubt_gives_one_warning(report, change, warning):
    change(quiet(report))
    [found] = warnings_of(report)
    assert warning in found


@pytest.mark.parametrize("feature", ["avx_vnni", "avx512_vnni", "amx_int8", "dotprod", "i8mm"])
def test_vnni_of_any_kind_and_arms_dot_product_are_enough_for_int8(report, feature):
    quiet(report).machine.features[:] = [feature]
    assert warnings_of(report) == []


def test_a_process_that_died_is_told_once(report):
    assert sum("broken.onnx: its process was killed" in text for text in warnings_of(report)) == 1


def test_the_terminal_shows_every_figure_and_warning(report, capsys):
    show(report)
    said = capsys.readouterr().out
    for part in (
        "89.30",
        "-0.70 (-1.80 to +0.40)",
        "-0.30 (-0.80 to +0.20)",
        "8.0×",
        "6.00",
        "failed",
        "700.00",
        "22.00",
    ):
        assert part in said
    assert all(f"warning: {text}" in said for text in report.warnings)
    assert max(map(len, said.splitlines())) > 80, "not folded to a log's width"


def test_the_model_card_holds_tables_warnings_machine_and_plots(report):
    text = to_markdown(report, list(PLOTS))
    assert "| model.onnx | 89.30 | -0.70 (-1.80 to +0.40) | -0.30 (-0.80 to +0.20) |" in text
    assert "| model.onnx | 1 | 128 | 1 | 6.00 | 6.30 | 6.60 | 7.50 | 6.12 | 8.00× | 167 | 0.12 | 6% |" in text
    assert "| broken.onnx | 1 | 128 | 1 | failed |" in text
    assert all(f"- {warning}" in text for warning in report.warnings)
    assert "A CPU (avx2, fma, avx512f, avx512_vnni), 4 cores" in text and "torch 2.13.0" in text
    assert "![accuracy against bytes](accuracy_bytes.png)" in text


def test_without_a_task_there_is_no_accuracy_in_table_and_plots(report, tmp_path):
    report.settings["task"] = None
    for row in report.artifacts:
        row.accuracy = None
    assert "validation examples" not in to_markdown(report, [])
    assert draw(report, tmp_path) == ["latency_length.png"]


def test_three_plots_are_drawn(report, tmp_path):
    assert draw(report, tmp_path) == list(PLOTS)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in PLOTS)
