"""Compressed models in transformers' own calls: loading, saving, casting, training, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn

import fastkd
from fastkd.embeddings import compress_embeddings, densify
from fastkd.embeddings.quantizer import SparseEmbeddingConfig

AutoModel = transformers.AutoModelForSequenceClassification


@pytest.fixture
def compressed(make_model, make_code):
    """compressed("bert", rows=torch.int8): a compressed model in memory."""

    def make(architecture="bert", auto=AutoModel, **formats):
        model = make_model(architecture, auto)
        return compress_embeddings(model, make_code(model, **formats))

    return make


@pytest.fixture
def small(compressed, tmp_path):
    """A compressed BERT on disk."""
    compressed(rows=torch.float16).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def run_python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def change(folder, edit):
    """Rewrite the checkpoint in `folder` after `edit(state)`."""
    file = folder / "model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file, {"format": "pt"})


def test_every_architecture_is_saved_and_loaded_by_the_ordinary_calls(compressed, architecture, batch, tmp_path):
    model = compressed(architecture, rows=torch.int8, weights=torch.int8, residual=4)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded.get_input_embeddings(), fastkd.SparseEmbedding)
    assert loaded.get_input_embeddings().padding_idx == model.get_input_embeddings().padding_idx
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    for found, wanted in zip(loaded.get_input_embeddings().arrays, model.get_input_embeddings().arrays, strict=True):
        assert found is wanted is None or (found.dtype == wanted.dtype and torch.equal(found, wanted))
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_code_without_kept_rows_is_saved_and_loaded(compressed, batch, tmp_path):
    model = compressed(kept=0, atoms=0, residual=8)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForTokenClassification"])
def test_another_head_can_be_put_on_it(small, batch, auto):
    loaded = getattr(transformers, auto).from_pretrained(small)
    assert isinstance(loaded.get_input_embeddings(), fastkd.SparseEmbedding)
    assert loaded(**batch)[0].isfinite().all()


def test_an_encoder_saved_alone_gets_a_head_later(compressed, batch, tmp_path):
    compressed(auto=transformers.AutoModel).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path)(**batch).logits.shape == (2, 2)


def test_it_is_written_in_shards_like_any_other(compressed, batch, tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16])
def test_the_dtype_at_loading_is_that_of_everything_but_the_stored_formats(small, batch, dtype):
    model = AutoModel.from_pretrained(small, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    embedding = model.get_input_embeddings()
    assert embedding.weight.dtype == embedding.atom_weights.dtype == torch.float16
    assert embedding(batch["input_ids"]).dtype == model.dtype == wanted
    assert logits(model, batch).dtype == wanted


def test_half_precision_is_saved_as_such_and_loads_again(small, batch, tmp_path):
    model = AutoModel.from_pretrained(small).half()
    model.save_pretrained(tmp_path / "half")
    loaded = AutoModel.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float16
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_fp16_rows_leave_the_saved_dtype_that_of_the_model(small):
    assert json.loads((small / "config.json").read_text())["dtype"] == "float32"


def test_half_float_and_bfloat16_work_on_the_model(small, batch):
    model = AutoModel.from_pretrained(small)
    before = logits(model, batch)
    assert logits(model.half(), batch).dtype == torch.float16
    assert logits(model.bfloat16(), batch).dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.float16
    torch.testing.assert_close(logits(model.float(), batch), before, atol=0.02, rtol=0)


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}, "cpu"])
def test_a_device_map_is_followed(small, batch, where):
    assert logits(AutoModel.from_pretrained(small, device_map=where), batch).isfinite().all()


def test_what_is_offloaded_to_disk_leaves_the_code_in_memory(small, batch, tmp_path):
    rest = dict.fromkeys(("bert.encoder", "bert.pooler", "dropout", "classifier"), "cpu")
    offloaded = {"device_map": {"bert.embeddings": "disk"} | rest, "offload_folder": tmp_path / "disk"}
    model = AutoModel.from_pretrained(small, **offloaded)
    assert torch.equal(logits(model, batch), logits(AutoModel.from_pretrained(small), batch))
    with pytest.raises(ValueError, match="cannot be checked where offload_buffers"):
        AutoModel.from_pretrained(small, **offloaded, offload_buffers=True)


def test_the_embedding_on_the_meta_device_takes_no_memory_before_loading(compressed):
    arrays = compressed(rows=torch.int8, weights=torch.int8, residual=4).get_input_embeddings().arrays
    with torch.device("meta"):
        room = SparseEmbeddingConfig.of(arrays).room_for(90, 32)
    for found, wanted in zip(room, arrays, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert found.is_meta and found.shape == wanted.shape
            assert found.dtype == (torch.int32 if wanted.dtype == torch.uint16 else wanted.dtype)


def test_a_pipeline_takes_the_folder(small):
    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    tokenizer.save_pretrained(small)
    [found] = transformers.pipeline("text-classification", model=str(small), device="cpu")("a a")
    assert 0 < found["score"] < 1


def test_torch_save_takes_a_whole_model(compressed, batch, tmp_path):
    model = compressed()
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), batch), logits(model, batch))


def test_push_to_hub_uploads_what_save_pretrained_writes(small, monkeypatch):
    uploaded = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    AutoModel.from_pretrained(small).push_to_hub("me/small")
    assert uploaded["model.safetensors"] == (small / "model.safetensors").read_bytes()
    assert json.loads(uploaded["config.json"])["quantization_config"]["quant_method"] == "sparse_embedding"


def test_without_fastkd_loading_fails_instead_of_leaving_a_random_table(small):
    done = run_python(
        "import sys; from transformers import AutoModelForSequenceClassification as A; A.from_pretrained(sys.argv[1])",
        small,
    )
    assert done.returncode != 0
    assert "word_embeddings.weight" in done.stderr


def test_a_fresh_process_loads_it_even_if_transformers_is_imported_first(small):
    done = run_python(
        "import sys, transformers, fastkd\n"
        "m = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "print(type(m.get_input_embeddings()).__name__)",
        small,
    )
    assert done.stdout.strip() == "SparseEmbedding", done.stderr


class TestTraining:
    @pytest.fixture
    def make_trainer(self, tmp_path):
        def make(model, **changes):
            generator = torch.Generator().manual_seed(2)
            ids = torch.randint(5, 90, (32, 8), generator=generator)
            data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [0, 1] * 16})
            settings = {"learning_rate": 1e-2, "max_steps": 8, "report_to": "none", "disable_tqdm": True} | changes
            return transformers.Trainer(
                model,
                transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True, **settings),
                train_dataset=data,
            )

        return make

    def test_the_trainer_takes_it_and_leaves_the_frozen_code_alone(self, small, make_trainer):
        model = AutoModel.from_pretrained(small)
        before = {name: array.clone() for name, array in model.get_input_embeddings().state_dict().items()}
        head = model.classifier.weight.clone()
        make_trainer(model).train()
        assert not torch.equal(model.classifier.weight, head)
        for name, array in model.get_input_embeddings().state_dict().items():
            assert torch.equal(array, before[name]), name

    def test_a_trainable_code_is_trained_saved_and_loaded_in_a_fresh_process(
        self, compressed, make_trainer, batch, tmp_path
    ):
        model = compressed(rows=torch.int8, weights=torch.int8)
        before = {name: array.clone() for name, array in model.get_input_embeddings().state_dict().items()}
        model.get_input_embeddings().trainable = True
        trainer = make_trainer(model)
        trainer.train()
        trainer.save_model(str(tmp_path / "tuned"))
        after = load_file(tmp_path / "tuned" / "model.safetensors")
        for name, array in before.items():
            stored = after[f"bert.embeddings.word_embeddings.{name}"]
            assert stored.dtype == array.dtype
            frozen = name in ("slot", "atom_ids")
            assert torch.equal(stored, array) == frozen, name
        torch.save(batch, tmp_path / "batch.pt")
        done = run_python(
            "import sys, torch, fastkd, transformers\n"
            "m = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
            "torch.save(m(**torch.load(sys.argv[2])).logits.detach(), sys.argv[3])",
            tmp_path / "tuned",
            tmp_path / "batch.pt",
            tmp_path / "logits.pt",
        )
        assert done.returncode == 0, done.stderr
        model.get_input_embeddings().trainable = False  # rounds as saving does
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model.eval(), batch))

    @pytest.mark.parametrize("formats", [{"rows": torch.float16}, {"rows": torch.int8, "weights": torch.int8}])
    def test_training_goes_on_from_a_checkpoint(self, compressed, make_trainer, formats):
        model = compressed(**formats)
        model.get_input_embeddings().trainable = True
        make_trainer(model, max_steps=4, save_steps=4).train()
        resumed = compressed(**formats)
        resumed.get_input_embeddings().trainable = True
        trainer = make_trainer(resumed, max_steps=6)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        moved = (resumed.get_input_embeddings().weight - model.get_input_embeddings().weight).abs().max()
        assert 0 < moved < 0.1, "from the checkpoint, not from the start"

    @pytest.mark.parametrize("part", ["the model", "its encoder"])
    @pytest.mark.parametrize("trainable", [False, True])
    def test_distributed_data_parallel_takes_it(self, compressed, batch, part, trainable):
        """It broadcasts buffers, which fails for uint16 with any number of processes, one included."""
        model = compressed()
        model.get_input_embeddings().trainable = trainable
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model if part == "the model" else model.bert)
            parallel(**batch)[0].sum().backward()
        finally:
            dist.destroy_process_group()
        assert all(parameter.grad is not None for parameter in model.get_input_embeddings().parameters())


class TestRefused:
    def test_a_tied_head_and_densify_is_named(self, small):
        with pytest.raises(ValueError, match=r"BertForMaskedLM ties cls.predictions.decoder.weight.*fastkd densify"):
            transformers.AutoModelForMaskedLM.from_pretrained(small)

    def test_resizing_the_vocabulary(self, small):
        for part in (AutoModel.from_pretrained(small), AutoModel.from_pretrained(small).bert):
            with pytest.raises(ValueError, match=r"resize_token_embeddings: .*densify"):
                part.resize_token_embeddings(100)

    def test_an_index_out_of_range(self, small):
        def edit(state):
            state["bert.embeddings.word_embeddings.atom_ids"][3, 1] = 20

        change(small, edit)
        with pytest.raises(ValueError, match=r"small.*atom_ids"):
            AutoModel.from_pretrained(small)

    def test_a_checkpoint_that_lacks_an_array(self, small):
        change(small, lambda state: state.pop("bert.embeddings.word_embeddings.atom_weights"))
        with pytest.raises(ValueError, match="small lacks atom_weights"):
            AutoModel.from_pretrained(small)

    def test_arrays_of_another_size_than_the_config_says(self, small):
        config = json.loads((small / "config.json").read_text())
        config["quantization_config"]["num_kept"] = 21
        (small / "config.json").write_text(json.dumps(config))
        for ignored in (False, True):
            with pytest.raises(ValueError, match=r"weight of .* is \(21, 32\) .*model.safetensors holds \(20, 32\) fl"):
                AutoModel.from_pretrained(small, ignore_mismatched_sizes=ignored)

    @pytest.mark.parametrize(("name", "wanted"), [("weight", "float16"), ("slot", "uint16 or int32")])
    def test_arrays_of_another_format_than_the_config_says(self, small, name, wanted):
        def edit(state):
            name_in_file = f"bert.embeddings.word_embeddings.{name}"
            state[name_in_file] = state[name_in_file].float()

        change(small, edit)
        with pytest.raises(ValueError, match=rf"config.json {name} of .* {wanted}; model.safetensors holds .* float32"):
            AutoModel.from_pretrained(small)

    def test_a_shard_that_was_cut_short(self, compressed, tmp_path):
        compressed().save_pretrained(tmp_path, max_shard_size="10KB")
        shard = sorted(tmp_path.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"{shard.name} is no safetensors file, or not all of one"):
            AutoModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"rows": "int4"}, "rows='int4'; allowed are float32"),
            ({"num_atoms": -1}, "num_atoms=-1"),
            ({"colour": "blue"}, "colour is missing or not known"),
            ({"num_kept": None}, "num_kept=None"),
            ({"num_kept": 91}, "num_kept=91 and residual_bytes=0 do not fit a table of 90 tokens"),
            ({"residual_bytes": 5, "codebook": "float16"}, "residual_bytes=5 do not fit"),
            ({"residual_bytes": 4}, "codebook=None where residual_bytes=4"),
            ({"weights": "int8"}, "weight_scale=None where weights='int8'"),
        ],
    )
    def test_a_config_that_makes_no_sense(self, small, entry, message):
        config = json.loads((small / "config.json").read_text())
        config["quantization_config"] |= entry
        (small / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(small)

    def test_compression_while_loading(self, make_model, tmp_path):
        make_model().save_pretrained(tmp_path)
        config = SparseEmbeddingConfig(num_kept=9, num_atoms=4, rows="float16", weights="float16")
        with pytest.raises(ValueError, match="load it as it is, then"):
            AutoModel.from_pretrained(tmp_path, quantization_config=config)

    def test_saving_after_the_embedding_was_replaced(self, compressed, tmp_path):
        model = compressed()
        model.set_input_embeddings(nn.Embedding(90, 32))
        with pytest.raises(ValueError, match="was replaced by a Embedding"):
            model.save_pretrained(tmp_path)

    def test_saving_a_code_that_keeps_all_rows(self, compressed, tmp_path):
        with pytest.raises(ValueError, match="all rows are kept"):
            compressed(kept=90).save_pretrained(tmp_path)


def test_dequantize_gives_the_dense_model_in_place(small, batch):
    model = AutoModel.from_pretrained(small)
    wanted = logits(densify(model), batch)
    assert model.dequantize() is model
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert torch.equal(logits(model, batch), wanted)
