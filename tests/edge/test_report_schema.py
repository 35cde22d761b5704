"""report.json: what version 1 looks like, and what is refused. A test that fails here asks for a new SCHEMA version."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastkd.edge.machine import Machine
from fastkd.edge.report_schema import SCHEMA, Accuracy, Cell, Difference, Process, Report, Row, read_report, to_json

GOLDEN = Path(__file__).with_name("test_report_golden.json")
PAGE = Path(__file__).parents[2] / "docs/edge_report_schema.md"


def test_version_1_is_read_and_written_as_it_was():
    assert SCHEMA == 1, "a new version needs a golden report of its own"
    assert to_json(read_report(GOLDEN)) == GOLDEN.read_text(encoding="utf-8")


def test_the_parts_of_a_report_are_read_as_what_they_are():
    report = read_report(GOLDEN)
    onnx = report.artifacts[2]
    assert isinstance(report.machine, Machine)
    assert isinstance(onnx.accuracy.against_fp32, Difference) and onnx.accuracy.against_fp32.points == -0.3
    assert onnx.cell((8, 128, 1)).p50_ms == 40 and onnx.cell((8, 129, 1)) is None
    assert onnx.process(1).memory_peak_bytes == 700_000_000 and onnx.process(2) is None
    assert (report.teacher.name, onnx.metric, report.main_cell()) == ("teacher", 0.893, (1, 128, 1))


@pytest.mark.parametrize("part", [Report, Machine, Row, Process, Cell, Accuracy, Difference])
def test_every_field_is_described(part):
    page = PAGE.read_text(encoding="utf-8")
    missing = [field.name for field in dataclasses.fields(part) if f"`{field.name}`" not in page]
    assert not missing


@pytest.mark.parametrize("version", [0, 2, "1.1"])
def test_another_version_is_refused_with_both_named(tmp_path, version):
    found = json.loads(GOLDEN.read_text(encoding="utf-8")) | {"schema": version}
    (tmp_path / "report.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"has schema version {version}, this fastkd reads version 1"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON", '{"schema": 1}', '{"schema": 1, "format": "onnx"}'])
def test_another_file_is_no_report(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is no report"):
        read_report(tmp_path / "report.json")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.json is no file"):
        read_report("nowhere.json")


@pytest.mark.parametrize("damage", [{"colour": "red"}, {"machine": {"cpu": "A CPU"}}, {"artifacts": [{"name": "x"}]}])
def test_a_field_too_many_or_too_few_is_refused(tmp_path, damage):
    found = json.loads(GOLDEN.read_text(encoding="utf-8")) | damage
    (tmp_path / "report.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="no report of schema version 1"):
        read_report(tmp_path / "report.json")
