"""Exported files compute what torch computes, hold what they should, and say what they are."""

import collections
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import fastkd
from fastkd.edge import load_runtime, open_artifact
from fastkd.edge.lookup import SparseLookup
from fastkd.edge.onnx_graph import to_onnx, weights_of
from fastkd.embeddings import SparseCode
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import sparse_embedding

ARTIFACTS = [
    ("bert", "dense", "onnx", True),
    ("bert", "sparse", "onnx", False),
    ("bert", "sparse", "onnx", True),
    ("distilbert", "dense", "openvino", False),
    ("distilbert", "sparse", "onnx", True),
    ("roberta", "dense", "onnx", False),
    ("roberta", "sparse", "openvino", True),
    ("bert", "sparse", "openvino", False),
    ("bert", "sparse", "torch", False),
    ("electra", "sparse", "onnx", False),
    ("mpnet", "int8", "onnx", False),
    ("xlm-roberta", "residual", "onnx", True),
    ("bert", "pq", "openvino", False),
]


@pytest.mark.parametrize(("architecture", "table", "to", "int8"), ARTIFACTS)
def test_an_exported_model_gives_torchs_logits(architecture, table, to, int8, exported, edge_folder, ids_and_mask):
    artifact = exported(architecture, table, to, int8)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(edge_folder(architecture, table))
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(array) for name, array in ids_and_mask.items()}).logits.numpy()
    found = load_runtime(artifact)(**ids_and_mask)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= (0.2 if int8 else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 38), (5, 3)])
def test_batch_and_length_are_free(to, batch, length, exported):
    ids = np.full((batch, length), 7)
    assert load_runtime(exported("bert", "sparse", to))(ids, np.ones_like(ids)).shape == (batch, 2)


@pytest.mark.parametrize("at_load", [True, False])
@pytest.mark.parametrize("kind", ["sparse", "int8", "residual", "pq"])
def test_every_stored_format_is_looked_up_as_the_code_says(kind, at_load, edge_folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(edge_folder("bert", kind))
    arrays = model.get_input_embeddings().arrays
    ids = torch.randperm(len(arrays.slot)).reshape(2, -1) if len(arrays.slot) % 2 == 0 else torch.arange(40)[None]
    expected = sparse_embedding(ids, arrays, backend="reference")
    torch.testing.assert_close(SparseLookup(arrays, at_load)(ids), expected, atol=1e-6, rtol=1e-5)


def test_an_onnx_graph_has_standard_operators_alone(exported):
    for artifact in (exported("bert", "sparse"), exported("bert", "sparse", int8=True)):
        model = onnx.load(artifact.path)
        assert {each.domain for each in model.opset_import if each.domain not in ("", "ai.onnx")} <= {"ai.onnx.ml"}
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert model.opset_import[0].version >= 18
        onnx.checker.check_model(model)


def test_the_sparse_lookup_reads_by_gather_and_sums_by_matmul(exported):
    found = collections.Counter(node.op_type for node in onnx.load(exported("bert", "sparse").path).graph.node)
    assert not found["GatherND"] and not found["ReduceSum"] and not found["IsNaN"]


def test_an_onnx_file_holds_the_code_as_it_is_stored():
    """At the size of a vocabulary; the exporter computes what is made of 8,192 numbers or fewer itself."""
    tokens, kept, atoms = 20_000, 9_000, 4
    arrays = Arrays(
        slot=torch.randperm(tokens).to(torch.uint16),
        kept=torch.randn(kept, 16).half(),
        kept_scale=None,
        atom_ids=torch.randint(kept, (tokens - kept, atoms)).to(torch.uint16),
        atom_weights=torch.randn(tokens - kept, atoms).half(),
        weight_scale=None,
        residual=None,
        codebook=None,
    )
    ids = torch.randint(tokens, (2, 7))
    shape = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(SparseLookup(arrays, at_load=True), (ids,), dynamic_shapes=shape)
    stored = sum(nbytes for _, nbytes, _ in weights_of(to_onnx(program, ("ids",), "rows")))
    assert stored <= SparseCode(arrays).nbytes + 200


def test_int8_holds_matrices_and_embedding_rows_in_a_byte_a_number(exported):
    weights = onnx.load(exported("bert", int8=True).path).graph.initializer
    large = {each.name: each.data_type for each in weights if np.prod(each.dims) >= 2000}
    assert any("word_embeddings" in name for name in large)
    assert set(large.values()) <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_nothing_of_the_machine_stands_in_a_file(to, exported):
    content = exported("bert", "sparse", to).path.read_bytes()
    assert b"site-packages" not in content and str(Path(fastkd.__file__).parent).encode() not in content


def test_the_manifest_says_what_the_file_is(exported, edge_folder):
    artifact = exported("bert", "sparse", int8=True)
    found = json.loads(artifact.path.with_name("model.onnx.json").read_text())
    assert found["schema"] == 1 and found["precision"] == "int8" and found["task"] == "sequence-classification"
    assert found["labels"] == ["negative", "positive"] and found["max_length"] == 40
    assert found["inputs"] == {name: ["batch", "length"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert found["outputs"] == {"logits": ["batch", 2]}
    assert sum(found["bytes"].values()) == artifact.nbytes == artifact.path.stat().st_size
    cases = found["verification"]["cases"]
    assert {(1, 1), (2, 40)} <= {(case["batch"], case["length"]) for case in cases}
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(edge_folder("bert", "dense"))
    assert found["parameters"]["effective"] == sum(each.numel() for each in dense.parameters())


def test_an_artifact_opens_with_its_tokenizer_and_labels(exported):
    artifact = open_artifact(exported("roberta").path)
    assert artifact.format == "onnx" and artifact.task == "sequence-classification"
    assert artifact.config().id2label == {0: "negative", 1: "positive"}
    assert artifact.tokenizer()("abc")["input_ids"]


def test_a_regression_head_gives_one_number(exported, ids_and_mask):
    artifact = exported("bert", num_labels=1)
    assert artifact.task == "regression" and artifact.manifest.labels is None
    assert load_runtime(artifact)(**ids_and_mask).shape == (2, 1)


def test_the_weights_of_an_int8_openvino_file_belong_to_its_parts(exported):
    artifact = exported("roberta", "sparse", "openvino", True)
    graph = artifact.path.stat().st_size
    assert artifact.bytes_by_part()["other"] < graph + 2000, "of 28 kB of weights"
