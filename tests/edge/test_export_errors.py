"""Exports that cannot be, and what is left of them."""

import sys

import pytest
import torch
import transformers

from fastkd.cli import main
from fastkd.edge import export
from fastkd.edge.capture import capture
from fastkd.edge.export_run import Export
from fastkd.edge.onnx_graph import to_onnx
from fastkd.edge.served import ServedModel


@pytest.fixture
def served(edge_folder):
    return ServedModel(transformers.AutoModelForSequenceClassification.from_pretrained(edge_folder("bert")))


def test_what_differs_by_more_than_the_bound_is_kept_aside_with_status_1(edge_folder, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    given = ["export", str(edge_folder("bert")), "--int8", "--max-difference", "1e-9", "--out", str(out)]
    assert main(given) == 1
    assert "1e-09 is allowed" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.refused.onnx", "model.refused.onnx.json"]


class Unexportable(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_operator_that_does_not_export_is_named_with_its_module(served):
    served.model.bert.pooler.activation = Unexportable()
    program = capture(served, int8=False, at_load=True)
    with pytest.raises(ValueError, match=r"bessel_j0.* comes from bert\.pooler\.activation \(Unexportable\)"):
        to_onnx(program, served.inputs, "logits")


class DataDependent(torch.nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_module_that_cannot_be_captured_is_named(served):
    served.model.dropout = DataDependent()
    with pytest.raises(ValueError, match=r"does not export: in dropout \(DataDependent\)"):
        capture(served, int8=False, at_load=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "tflite"}, "to='tflite'; allowed are onnx, openvino, torch, executorch"),
        ({"to": "openvino"}, "a file for openvino ends in .xml"),
        ({"to": "torch", "int8": True, "out": "m.pt2"}, "int8 is for onnx and openvino, not for torch"),
        ({"to": "openvino", "int8": True, "out": "m.xml"}, "calibrated on texts"),
        ({"max_difference": 0.0}, "a share above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(given, message, tmp_path):
    given = {"out": "m.onnx"} | given
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Export("no such model", str(tmp_path / given.pop("out")), **given)


def test_a_file_that_is_there_stays(tmp_path):
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(ValueError, match=r"m\.onnx is there already"):
        Export("no such model", str(tmp_path / "m.onnx"))
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_a_folder_of_another_model_is_refused(exported, edge_folder):
    folder = exported("bert").path.parent
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="was exported from another model"):
        export(edge_folder("roberta"), folder / "other.onnx")
    assert sorted(folder.iterdir()) == before


def test_a_runtime_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"openvino is not installed: pip install 'fastkd\[edge\]'"):
        Export("no such model", str(tmp_path / "m.xml"), to="openvino")


def test_executorch_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ValueError, match="executorch is not installed: pip install executorch"):
        Export("no such model", str(tmp_path / "m.pte"), to="executorch")


def test_a_model_that_is_not_there_is_named_whatever_it_looks_like(tmp_path):
    with pytest.raises(ValueError, match=f"model={tmp_path}/none is no model: no such folder"):
        export(str(tmp_path / "none"), str(tmp_path / "out" / "model.onnx"))
    assert not (tmp_path / "out").exists()
