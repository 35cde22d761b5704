"""`fastkd report` on files that `fastkd export` wrote: every format that the suite can run, every mode of a folder."""

import json

import pytest

from fastkd.cli import main


@pytest.fixture(scope="module")
def report(exported, edge_folder, tmp_path_factory):
    """One report of a folder in three modes and of an .onnx, an .xml and a .pt2 file, made from the command line."""
    files = [exported("bert", "sparse", to) for to in ("onnx", "openvino", "torch")]
    out = tmp_path_factory.mktemp("report") / "report"
    artifacts = [str(edge_folder("bert", "sparse")), *(str(file.path) for file in files)]
    cells = ["--lengths", "8", "--batches", "1", "--rounds", "1", "--modes", "eager,compile,int8"]
    main(["report", *artifacts, *cells, "--out", str(out)])
    return json.loads((out / "report.json").read_text())


def test_every_format_and_mode_has_its_figures(report):
    rows = report["artifacts"]
    assert [row["format"] for row in rows] == ["torch"] * 3 + ["onnx", "openvino", "torch-export"]
    assert [row["mode"] for row in rows] == ["eager", "compile", "int8", None, None, None]
    for row in rows:
        [cell] = row["cells"]
        assert cell["failed"] is None and cell["p50_ms"] > 0 and cell["speedup"] > 0


def test_a_runtime_without_torch_starts_with_less_memory_than_the_folder_that_it_came_from(report):
    peaks = [row["processes"][0]["memory_peak_bytes"] for row in report["artifacts"]]
    eager, _, _, onnx, openvino, _ = peaks
    assert onnx < eager / 2 and openvino < eager
