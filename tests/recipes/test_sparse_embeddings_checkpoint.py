"""The formats and the files of a checkpoint, and that a copy of it keeps to them without changing a number."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastkd.recipes.sparse_embeddings_checkpoint import (
    bytes_on_disk,
    copy_sentence_files,
    narrow,
    narrowed,
    round_table,
    save_narrowed,
    stored_dtype,
    weight_files,
)

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def model():
    """A tiny encoder in fp32 whose numbers fp16 holds."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertModel(config).half().float()


@pytest.mark.parametrize("size", ["50GB", "10KB"])
def test_every_file_of_weights_is_found_and_no_other(model, tmp_path, size):
    model.save_pretrained(tmp_path, max_shard_size=size)
    (tmp_path / "other.safetensors").touch()
    files = weight_files(tmp_path)
    assert (len(files) > 1) == (size == "10KB")
    assert sorted(files) == sorted(tmp_path.glob("model*.safetensors"))
    assert bytes_on_disk(files) == sum(file.stat().st_size for file in files) > 0


def test_a_checkpoint_of_pickled_tensors_has_a_file_and_a_format_too(model, tmp_path):
    torch.save(model.half().state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    assert stored_dtype(weight_files(tmp_path)) == fp16


def test_without_files_there_is_no_format(tmp_path):
    assert weight_files(tmp_path) == []
    assert stored_dtype([]) is None


def test_the_format_is_that_of_most_numbers(model, tmp_path):
    model.half()
    model.pooler.float()
    model.save_pretrained(tmp_path)
    assert stored_dtype(weight_files(tmp_path)) == fp16


@pytest.mark.parametrize(
    ("dtype", "to", "expected"),
    [
        (fp32, fp16, fp16),
        (fp32, bf16, fp32),  # 1.00390625 has nine bits
        (fp32, fp32, fp32),
        (fp16, bf16, fp16),
        (fp16, fp32, fp16),
        (fp32, None, fp32),
        (torch.int64, fp16, torch.int64),
    ],
)
def test_a_tensor_is_narrowed_only_where_no_number_changes(dtype, to, expected):
    tensor = torch.tensor([1.00390625, -2.5]).to(dtype)
    assert narrowed(tensor, to).dtype == expected
    assert torch.equal(narrowed(tensor, to).to(dtype), tensor)


def test_what_is_saved_narrow_is_loaded_as_before(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before["pooler.dense.bias"][0] = model.pooler.dense.bias[0] = 1e-9
    written = save_narrowed(narrow(model, fp16), tmp_path, fp32)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in on_disk.items() if tensor.dtype == fp32} == {"pooler.dense.bias"}
    assert written == (tmp_path / "model.safetensors").stat().st_size
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert loaded.dtype == fp32
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_a_table_is_rounded_unless_a_number_overflows(model):
    table = model.embeddings.word_embeddings.weight
    with torch.no_grad():
        table[3, 4] = 1.0001
    round_table(model, fp16)
    assert table.dtype == fp32 and table[3, 4] == 1
    with torch.no_grad():
        table[3, 4], table[3, 5] = 1.0001, 1e6
    round_table(model, fp16)
    assert table[3, 5] == 1e6 and table[3, 4] != 1


def test_the_files_of_a_sentence_transformers_model_are_copied(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "1_Pooling").mkdir(parents=True)
    copy.mkdir()
    (source / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "model.safetensors").write_text("weights")
    copy_sentence_files(source, copy)
    copied = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    assert copied == {"modules.json", "1_Pooling/config.json"}


def test_a_model_without_modules_has_nothing_copied(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "copy").mkdir()
    copy_sentence_files(tmp_path / "source", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())
