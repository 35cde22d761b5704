"""What counts as an artifact, and what it says about itself."""

import json
import shutil

import pytest
import transformers

from fastkd.edge import open_artifact


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of an exported folder, to spoil."""
    return shutil.copytree(exported("bert", "sparse").path.parent, tmp_path / "copy") / "model.onnx"


def test_a_transformers_folder_is_one(edge_folder):
    artifact = open_artifact(edge_folder("bert"))
    assert (artifact.format, artifact.precision, artifact.task) == ("torch", "fp32", "sequence-classification")
    assert [each.name for each in artifact.files()] == ["model.safetensors"]


def test_bytes_by_part_sum_to_the_bytes_of_the_files(edge_folder, exported):
    for artifact in (open_artifact(edge_folder("roberta")), exported("bert", "sparse"), exported("bert", int8=True)):
        parts = artifact.bytes_by_part()
        assert sum(parts.values()) == artifact.nbytes == sum(file.stat().st_size for file in artifact.files())
        assert all(parts[part] > 0 for part in ("embedding", "encoder", "head"))


def test_a_sparse_coded_table_counts_as_the_table_it_stands_for(edge_folder):
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(edge_folder("bert", "dense"))
    stored, effective = open_artifact(edge_folder("bert", "sparse")).parameters()
    assert effective == sum(each.numel() for each in dense.parameters()) > stored


def test_an_onnx_file_without_our_manifest_opens(copied):
    copied.with_name("model.onnx.json").unlink()
    artifact = open_artifact(copied)
    assert artifact.precision == "fp32" and artifact.task == "sequence-classification"
    parts = artifact.bytes_by_part()
    assert parts["embedding"] > 0 and parts["encoder"] > 0 and sum(parts.values()) == artifact.nbytes


def test_a_manifest_of_another_schema_is_refused(copied):
    manifest = copied.with_name("model.onnx.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    with pytest.raises(ValueError, match="schema version 99, this fastkd reads 1"):
        open_artifact(copied)


def test_an_exported_file_alone_is_refused(copied, tmp_path):
    alone = shutil.copy(copied, tmp_path / "alone.onnx")
    with pytest.raises(ValueError, match=r"without the config\.json and tokenizer"):
        open_artifact(alone)


def test_openvino_without_its_weights_is_refused(copied):
    copied.rename(copied.with_suffix(".xml"))
    with pytest.raises(ValueError, match=r"without model\.bin"):
        open_artifact(copied.with_suffix(".xml"))


@pytest.mark.parametrize(
    ("name", "message"), [("none", "no such file"), ("a.txt", "is no artifact"), ("", "no model's")]
)
def test_what_is_no_artifact_is_refused(name, message, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=message):
        open_artifact(tmp_path / name)
