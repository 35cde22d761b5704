"""`fastkd compress-embeddings` and `fastkd densify` as commands, from a folder to a folder."""

import json
import os
import random

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import fastkd
from fastkd.cli import main
from fastkd.data import train_wordpiece


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with SST-2's columns and split names; the label is whether a sentence has more words of the first half
    of the alphabet. Words are as frequent as in language (Zipf)."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 5))) for _ in range(150)]
    for split, count in (("train", 400), ("validation", 40)):
        rows = []
        for _ in range(count):
            chosen = draw.choices(words, weights=[1 / rank for rank in range(1, 151)], k=draw.randint(3, 9))
            rows.append((" ".join(chosen), int(sum(word < "n" for word in chosen) * 2 > len(chosen))))
        pd.DataFrame(rows, columns=["sentence", "label"]).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A folder with a tiny classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_wordpiece(pd.read_parquet(data / "train.parquet")["sentence"].tolist(), 200, max_length=32)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def compress(model, data):
    """compress("--keep", "0.2"): the command's exit status; the text is the task's train split."""

    def run(*words, text=True):
        source = ["--text", data / "train.parquet", "--text-column", "sentence"] if text else []
        words = ["compress-embeddings", model, "--max-length", "32", *source, "--out", "small", *words]
        return main([str(word) for word in words])

    return run


def load(folder="small"):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_model_is_compressed_and_its_figures_are_shown(compress, model, data, capsys):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert compress("--keep", "0.2", "--atoms", "4") == 0
    said = capsys.readouterr().out
    for part in (
        "embedding table",
        "whole model",
        "bytes on disk",
        "tokens kept whole",
        "of the text",
        "reconstruction error",
        "small",
    ):
        assert part in said
    embedding = load().get_input_embeddings()
    assert isinstance(embedding, fastkd.SparseEmbedding)
    assert (len(embedding.weight), embedding.atom_ids.shape[1]) == (int(0.2 * embedding.num_embeddings), 4)
    assert embedding.weight.dtype == embedding.atom_weights.dtype == torch.float16
    [found] = transformers.pipeline("text-classification", "small", device="cpu")("ab cd")
    assert found["label"] in ("negative", "positive")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before, "the original stays as it is"
    assert os.listdir() == ["small"]


@pytest.mark.parametrize(
    ("words", "rows", "atoms", "residual"),
    [
        (["--method", "residual", "--rows", "int8", "--weights", "int8"], torch.int8, 8, 2),
        (["--method", "pq", "--rows", "fp32"], torch.float32, 0, 4),
    ],
)
def test_other_methods_and_formats(compress, words, rows, atoms, residual):
    assert compress("--keep", "0.2", *words) == 0
    arrays = load().get_input_embeddings().arrays
    assert (arrays.kept.dtype, arrays.atom_ids.shape[1], arrays.residual.shape[1]) == (rows, atoms, residual)


def test_densify_goes_the_way_back(compress, capsys):
    assert compress("--keep", "0.2") == 0
    assert main(["densify", "small", "--out", "dense"]) == 0
    assert "loads without fastkd" in capsys.readouterr().out
    assert "quantization_config" not in json.loads(open("dense/config.json").read())
    ids = torch.randint(5, 100, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(load("dense")(ids).logits, load()(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained("dense")("ab")["input_ids"]


def test_a_checkpoint_stored_in_fp16_stays_so_and_computes_in_fp32(model, data, tmp_path, capsys):
    stored = changed(model, tmp_path / "stored")
    weights = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, stored / "model.safetensors", {"format": "pt"})
    original = load(stored)
    words = ["--text", str(data / "train.parquet"), "--text-column", "sentence", "--max-length", "32"]
    assert main(["compress-embeddings", str(stored), *words, "--keep", "0.2", "--out", "small"]) == 0
    assert main(["densify", "small", "--out", "dense"]) == 0
    said, sizes = capsys.readouterr().out, []
    for folder in (stored, tmp_path / "small", tmp_path / "dense"):
        file = folder / "model.safetensors"
        sizes.append(file.stat().st_size)
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}
    assert f"{sizes[0]:,} -> {sizes[1]:,} bytes on disk" in said
    assert f"{sizes[1]:,} -> {sizes[2]:,} bytes on disk" in said
    assert sizes[1] < sizes[0] == sizes[2]
    assert {load(folder).dtype for folder in (stored, "small", "dense")} == {torch.float32}
    for folder in ("small", "dense"):
        for name, tensor in original.state_dict().items():
            assert "word_embeddings" in name or torch.equal(tensor, load(folder).state_dict()[name])


def test_counts_are_kept_and_used_again(compress, model):
    assert compress("--keep", "0.2", "--save-counts", "new/counts") == 0
    first = load().state_dict()
    assert compress("--keep", "0.2", "--counts", "new/counts", "--overwrite", text=False) == 0
    assert all(torch.equal(tensor, first[name]) for name, tensor in load().state_dict().items())


def test_a_budget_takes_the_best_code_that_fits(compress, capsys):
    assert compress("--budget", "8kB") == 0
    said = capsys.readouterr().out
    assert "Pareto front" in said and "->" in said
    swept = json.loads(open("small/sweep.json").read())
    [chosen] = [code for code in swept["codes"] if code["chosen"]]
    fitting = [code for code in swept["codes"] if code["nbytes"] <= 8000]
    assert chosen["quality"] == max(code["quality"] for code in fitting)
    assert fitting == swept["codes"], "none that is too large is tried"
    assert sum(array.nbytes for array in load().get_input_embeddings().buffers()) == chosen["nbytes"]
    assert open("small/sweep.png", "rb").read(4) == b"\x89PNG"


def test_a_drop_is_measured_on_what_was_held_out_of_train(compress, data, capsys):
    words = ["--eval", "sst2", "--data", data, "--max-drop", "2", "--rows", "int8", "--weights", "int8"]
    assert compress(*words, text=False) == 0
    swept = json.loads(open("small/sweep.json").read())
    [chosen] = [code for code in swept["codes"] if code["chosen"]]
    assert chosen["quality"] >= swept["dense"]["quality"] - 0.02
    smaller = [code for code in swept["codes"] if code["nbytes"] < chosen["nbytes"]]
    assert all(code["quality"] < swept["dense"]["quality"] - 0.02 for code in smaller)
    held_out = 20  # 5 % of 400
    assert (chosen["quality"] * held_out) == pytest.approx(round(chosen["quality"] * held_out), abs=0.51)
    assert "accuracy, held out" in capsys.readouterr().out


def test_a_task_scores_a_single_code_as_well(compress, data, capsys):
    assert compress("--keep", "0.3", "--eval", "sst2", "--data", data, text=False) == 0
    assert "accuracy, held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "1"], "keep=1.0; the share of rows kept whole lies between 0 and 1"),
        (["--keep", "nan"], "keep=nan"),
        (["--keep", "0.08", "--atoms", "17"], "atoms=17, but only 16 rows are kept"),
        (["--keep", "0.9", "--atoms", "33"], "atoms=33; allowed are 1 to 32, the width of the table"),
        (["--keep", "0.00001"], "keep=1e-05 of 200 rows is 0, with 5 special tokens to keep; the least is 0.025"),
        (["--save-counts", "."], "save_counts=. is a folder; name a file"),
        (["--save-counts", "small/counts"], "save_counts=small/counts lies in out=small"),
        (["--text-column", "text"], "has no column 'text' (text_column); it has 'sentence', 'label'"),
        (["--budget", "12 parsecs"], "budget='12 parsecs': bytes are needed, such as 12MB"),
        (["--budget", "1MB", "--max-drop", "1"], "budget and max_drop: give one of them"),
        (["--budget", "1MB", "--keep", "0.1"], "keep and atoms are chosen where budget"),
        (["--budget", "10"], "budget=10 bytes is too small for this table; the least for sparse is 3,420 bytes"),
        (["--max-drop", "0.5"], "Name a task (--eval)"),
        (["--max-drop", "-1", "--eval", "sst2"], "max_drop=-1.0"),
        (["--method", "pq", "--atoms", "4"], "atoms=4: in product quantisation"),
        (["--eval", "sst3"], "unknown task 'sst3'"),
        (["--max-length", "3000"], "3000"),
        (["--counts", "nowhere"], "counts=nowhere is no file"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(compress, words, message, capsys):
    assert compress(*words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and said.startswith("fastkd compress-embeddings: ")
    assert not os.listdir()


@pytest.mark.parametrize(
    "words", [["--keep", "0.00001"], ["--atoms", "1000"], ["--rows", "fp16", "--budget", "9B"], ["--eval", "mrpc"]]
)
def test_a_mistake_is_found_before_tokens_are_counted(compress, data, words, monkeypatch):
    def counted(*args, **kwargs):
        raise AssertionError("counted")

    monkeypatch.setattr("fastkd.recipes.sparse_embeddings.count_tokens", counted)
    assert compress(*words, "--data", data) == 2


@pytest.mark.parametrize("flag", ["--out", "--save-counts"])
def test_a_place_that_cannot_be_written_is_named_before_the_model_is_loaded(compress, tmp_path, flag, capsys):
    (tmp_path / "file").touch()
    assert compress(flag, "file/below/new") == 2
    name = flag[2:].replace("-", "_")
    assert f"{name}=file/below/new cannot be written: {tmp_path / 'file'} takes no files" in capsys.readouterr().err


def test_the_least_budget_that_is_named_works(compress, capsys):
    assert compress("--budget", "10") == 2
    assert compress("--budget", capsys.readouterr().err.split()[-2].replace(",", "")) == 0


def test_no_text_at_all_is_a_mistake(compress, capsys):
    assert compress(text=False) == 2
    assert "no text: token frequencies need a corpus (--text)" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--method", "--rows", "--weights"])
def test_an_unknown_name_lists_the_known_ones(compress, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        compress(flag, "int5")
    assert stopped.value.code == 2
    assert "invalid choice: 'int5' (choose from" in capsys.readouterr().err


def test_an_output_folder_that_holds_something_is_left_alone_unless_told(compress, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    assert compress("--keep", "0.2") == 2
    assert "out=small is not empty" in capsys.readouterr().err
    assert os.listdir("small") == ["mine.txt"]
    assert compress("--keep", "0.2", "--overwrite") == 0
    assert "mine.txt" not in os.listdir("small") and os.listdir() == ["small"]


@pytest.mark.parametrize("inside", ["", "below"])
def test_the_original_is_not_written_over(model, data, inside, capsys):
    words = ["--text", str(data / "train.parquet"), "--text-column", "sentence", "--overwrite"]
    assert main(["compress-embeddings", str(model), *words, "--out", str(model / inside)]) == 2
    assert "stays as it is" in capsys.readouterr().err


def test_what_fails_while_writing_leaves_nothing_behind(compress, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.BertForSequenceClassification, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        compress("--keep", "0.2")
    assert not os.listdir()


@pytest.mark.parametrize("name", ["does/not/exist", "."])
def test_what_is_no_model_is_named(name, data, capsys):
    words = ["--text", str(data / "train.parquet"), "--text-column", "sentence", "--out", "../small"]
    for command in (["compress-embeddings", name, *words], ["densify", name, "--out", "../small"]):
        assert main(command) == 2
        assert f"model={name} is no model" in capsys.readouterr().err


def changed(model, folder, **fields):
    """A copy of the model's folder with other entries in config.json."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_task_with_another_number_of_labels_is_refused(model, tmp_path, capsys):
    for split in ("train", "validation"):
        frame = pd.DataFrame({"sentence1": ["a"] * 4, "sentence2": ["b"] * 4, "label": [1.0, 2.0, 3.0, 4.0]})
        frame.to_parquet(tmp_path / f"{split}.parquet")
    words = ["--max-length", "32", "--eval", "stsb", "--data", str(tmp_path), "--max-drop", "1", "--out", "small"]
    assert main(["compress-embeddings", str(model), *words]) == 2
    assert "task=stsb has 1 labels, the model's head gives 2" in capsys.readouterr().err


def test_a_task_with_the_same_labels_in_another_order_is_refused(model, data, tmp_path, capsys):
    labels = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    flipped = changed(model, tmp_path / "flipped", **labels)
    words = ["--max-length", "32", "--eval", "sst2", "--data", str(data), "--out", "small"]
    assert main(["compress-embeddings", str(flipped), *words]) == 2
    assert "orders its labels negative, positive, the model's head positive, negative" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with MRPC's columns."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation"):
        words = [f"{chr(97 + row)} b" for row in range(26)]
        frame = pd.DataFrame({"sentence1": words, "sentence2": [f"c {word}" for word in words], "label": [0, 1] * 13})
        frame.to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_task_with_other_labels_is_refused(model, pairs, capsys):
    words = ["--max-length", "32", "--eval", "mrpc", "--data", str(pairs), "--out", "small"]
    assert main(["compress-embeddings", str(model), *words]) == 2
    said = capsys.readouterr().err
    assert "task=mrpc has the labels not_equivalent, equivalent, the model's head negative, positive" in said


def test_labels_without_a_name_pass_for_any(model, pairs, tmp_path):
    labels = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    nameless = changed(model, tmp_path / "nameless", **labels)
    words = ["--max-length", "32", "--keep", "0.2", "--eval", "mrpc", "--data", str(pairs), "--out", "small"]
    assert main(["compress-embeddings", str(nameless), *words]) == 0


def test_the_data_of_another_task_is_refused(compress, data, pairs, capsys):
    assert compress("--eval", "mrpc", "--data", data) == 2
    assert "mrpc train lacks the columns sentence1, sentence2; it has sentence, label" in capsys.readouterr().err
    assert compress("--eval", "cola", "--data", pairs) == 2
    assert "cola train lacks the column sentence; it has sentence1, sentence2, label" in capsys.readouterr().err


@pytest.mark.parametrize("dense", [False, True])
def test_a_damaged_checkpoint_is_named_in_one_line(compress, model, tmp_path, dense, capsys):
    assert compress("--keep", "0.2") == 0
    for what in ("cut", "classifier"):
        damaged = changed(model if dense else tmp_path / "small", tmp_path / what)
        file = damaged / "model.safetensors"
        if what == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            save_file(load_file(file) | {"classifier.weight": torch.zeros(3, 32)}, file, {"format": "pt"})
        assert main(["densify", str(damaged), "--out", "dense"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"fastkd densify: model={damaged} is no model: ") and "model.safetensors" in said
        assert what == "cut" or ("classifier.weight has shape (3, 32)" in said and "(2, 32) by config.json" in said)


def test_a_tied_head_and_a_compressed_model_are_refused(compress, model, data, tmp_path, capsys):
    masked = tmp_path / "masked"
    BertForMaskedLM(transformers.AutoConfig.from_pretrained(model)).save_pretrained(masked)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(masked)
    assert compress("--keep", "0.2") == 0
    words = ["--text", str(data / "train.parquet"), "--text-column", "sentence", "--out", "other"]
    for source, message in ((masked, "BertForMaskedLM ties"), ("small", "compressed already")):
        assert main(["compress-embeddings", str(source), *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["densify", str(model), "--out", "other"]) == 2
    assert "is not compressed" in capsys.readouterr().err
    assert not os.path.exists("other")
