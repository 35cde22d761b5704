"""Sentence embeddings: what modules.json of sentence-transformers says is part of the exported graph."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from fastkd.edge import export, load_runtime
from fastkd.edge.served import Pooling, ServedModel, load_served, read_pooling


@pytest.fixture
def sentence_folder(edge_folder, tmp_path):
    """sentence_folder("cls_token", "Normalize"): an encoder as sentence-transformers saves it."""

    def make(pooling, *further):
        folder = tmp_path / "encoder"
        shutil.copytree(edge_folder("bert", auto=transformers.AutoModel), folder)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        kinds = {"Transformer": "", "Pooling": "1_Pooling"} | {name: f"2_{name}" for name in further}
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
        (folder / "modules.json").write_text(json.dumps(modules))
        return folder

    return make


def test_an_exported_encoder_gives_the_mean_over_the_mask_at_length_one(sentence_folder, ids_and_mask, tmp_path):
    folder = sentence_folder("mean_tokens", "Normalize")
    artifact = export(folder, tmp_path / "out/model.onnx")
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        tokens = model(**{name: torch.from_numpy(array) for name, array in ids_and_mask.items()}).last_hidden_state
    pooled = np.stack([tokens[0].mean(0).numpy(), tokens[1, :8].mean(0).numpy()])
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(load_runtime(artifact)(**ids_and_mask), expected, atol=1e-5)
    assert artifact.task == "sentence-embedding" and artifact.manifest.pooling == {"mode": "mean", "normalize": True}


def test_without_sentence_transformers_files_it_is_the_plain_mean(edge_folder):
    assert load_served(edge_folder("bert", auto=transformers.AutoModel)).pooling == Pooling("mean", False)


def test_the_first_tokens_vector_where_it_is_asked_for(sentence_folder, ids_and_mask):
    served = load_served(sentence_folder("cls_token"))
    inputs = {name: torch.from_numpy(array) for name, array in ids_and_mask.items()}
    torch.testing.assert_close(served(**inputs), served.model(**inputs).last_hidden_state[:, 0])


def test_another_pooling_is_refused_by_name(sentence_folder):
    with pytest.raises(ValueError, match="pools by max_tokens; mean and cls are known"):
        read_pooling(sentence_folder("max_tokens"))


def test_a_further_module_is_refused_by_name(sentence_folder):
    with pytest.raises(ValueError, match="has a Dense"):
        read_pooling(sentence_folder("mean_tokens", "Dense"))


def test_a_head_that_is_not_served_is_refused_by_name(edge_folder):
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, num_hidden_layers=1, hidden_size=12))
    with pytest.raises(ValueError, match="a BertForMaskedLM is not exported"):
        ServedModel(model)
