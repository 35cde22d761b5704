"""The worker inside this process, on a tiny model: texts of exact length, turns, outputs in the examples' order."""

import json
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fastkd.data import train_wordpiece
from fastkd.edge import measure as measuring
from fastkd.edge import open_artifact
from fastkd.edge.measure_texts import PROSE, encode, texts_of_length
from fastkd.edge.measure_worker import Measured, peak_memory, said, serve


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(list(PROSE), vocab_size=150, max_length=64)


@pytest.fixture(scope="module")
def job(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    yield {"path": str(folder), "mode": "eager", "threads": 1, "lengths": [8, 16], "texts": list(PROSE), "started": 0.0}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("length", [3, 8, 64])
def test_texts_have_exactly_the_length_that_is_asked_for(tokenizer, length):
    texts = texts_of_length(tokenizer, PROSE, 3, length)
    assert len(set(texts)) == 3, "each begins elsewhere"
    for text in texts:
        assert len(tokenizer(text)["input_ids"]) in (length, length + 1), "nothing much is cut off"
    inputs = encode(tokenizer, texts, length)
    assert inputs["input_ids"].shape == (3, length) and inputs["attention_mask"].all()
    assert all(array.dtype == np.int64 for array in inputs.values())


def test_short_texts_are_repeated_until_they_fill_the_length(tokenizer):
    [text] = texts_of_length(tokenizer, ["water"], 1, 40)
    assert len(tokenizer(text)["input_ids"]) == 40


def test_pairs_are_encoded_as_pairs(tokenizer):
    inputs = encode(tokenizer, ["the train"], 16, ["the lake"])
    assert inputs["token_type_ids"].max() == 1


def test_a_turn_gives_times_of_calls_and_of_tokenising(job):
    answer = Measured(job, open_artifact(job["path"])).time(2, 8)
    assert 2 <= len(answer["ms"]) <= 20 and min(answer["ms"]) > 0 < answer["tokenize_ms"]


def test_outputs_come_in_the_examples_order_whatever_their_length(job, tmp_path):
    measured = Measured(job, open_artifact(job["path"]))
    texts = [" ".join(PROSE[0].split()[: 1 + row % 9]) for row in range(70)]
    measured.predict(str(tmp_path / "out.npy"), [texts], max_length=16)
    outputs = np.load(tmp_path / "out.npy")
    one_by_one = [measured.runtime(**encode(measured.tokenizer, [text], 16))[0] for text in texts]
    assert outputs.shape == (70, 2) and np.ptp(outputs[:, 0]) > 0.01
    np.testing.assert_allclose(outputs, one_by_one, atol=1e-5)


def test_a_request_that_fails_is_answered_and_the_next_is_served(job):
    answers = []
    requests = [{"do": "time", "batch": 1, "length": 100}, {"do": "memory"}]
    serve(job, [json.dumps(request) for request in requests], answers.append)
    first, failed, memory = answers
    assert first["cold_start_s"] > first["load_s"] > 0 and first["runtime"].startswith("torch")
    assert "positions" in failed["error"]
    assert memory["peak_bytes"] >= first["memory_imports_bytes"] > 0


def test_peak_memory_is_no_less_than_what_is_held_and_stays():
    held = np.ones(2**23)  # 64 MB
    now = psutil.Process().memory_info().rss
    peak = peak_memory()
    del held
    about = 2**20  # the system counts pages in batches
    assert now - about <= peak <= peak_memory() + about


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lengths\nand more"), "lengths"),
        (RuntimeError("no memory"), "RuntimeError: no memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_is_said_in_one_line(error, line):
    assert said(error) == line


@pytest.mark.parametrize(("to", "library"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_the_process_of_an_exported_file_loads_neither_torch_nor_what_trains(to, library, exported, tmp_path):
    job = {"path": str(exported("bert", "sparse", to).path), "mode": None, "threads": 1, "lengths": [8], "started": 0}
    (tmp_path / "job.json").write_text(json.dumps(job | {"texts": list(PROSE)}))
    requests = '{"do": "time", "batch": 1, "length": 8}\n'
    command = [sys.executable, "-X", "importtime", "-P", measuring._WITHOUT_TORCH, tmp_path / "job.json"]
    run = subprocess.run(command, input=requests, capture_output=True, text=True)
    first, timed = map(json.loads, run.stdout.splitlines())
    assert first["runtime"].startswith(library) and timed["ms"]
    loaded = {line.split("|")[-1].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    packages = {name.split(".")[0] for name in loaded}
    assert {library, "tokenizers", "transformers"} <= packages
    assert not packages & {"torch", "datasets", "sklearn", "scipy", "pandas", "accelerate"}
    assert not any(name.startswith(("transformers.models", "transformers.trainer")) for name in loaded)
