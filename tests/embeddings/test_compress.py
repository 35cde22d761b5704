"""A dense model in, a compressed one out, and back."""

import json

import pytest
import torch
import transformers
from torch import nn

import fastkd
from fastkd.embeddings import compress_embeddings, densify
from fastkd.ops.sparse_arrays import Arrays


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_compressed_model_computes_with_the_rows_of_the_code(make_model, make_code, architecture, batch):
    model = make_model(architecture)
    code = make_code(model)
    compressed = compress_embeddings(model, code)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(code.dense())
    torch.testing.assert_close(logits(compressed, batch), logits(model, batch))


def test_the_given_model_stays_as_it_is(make_model, make_code, batch):
    model = make_model()
    before, config = state_of(model), model.config.to_dict()
    compressed = compress_embeddings(model, make_code(model))
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.add_(1)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_padding_dtype_and_mode_are_those_of_the_model(make_model, make_code):
    model = make_model("roberta").half().train()
    embedding = compress_embeddings(model, make_code(model, rows=torch.float16)).get_input_embeddings()
    assert (embedding.padding_idx, embedding.dtype, embedding.training) == (1, torch.float16, True)


def test_the_dense_table_is_not_copied_on_the_way(make_model, make_code):
    model = make_model()
    compressed = compress_embeddings(model, make_code(model))
    assert sum(p.numel() for p in compressed.parameters()) == sum(p.numel() for p in model.parameters()) - 90 * 32


def test_densify_gives_the_same_model_in_an_ordinary_checkpoint(make_model, make_code, architecture, batch, tmp_path):
    compressed = compress_embeddings(make_model(architecture), make_code(make_model(architecture)))
    dense = densify(compressed)
    torch.testing.assert_close(logits(dense, batch), logits(compressed, batch))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(loaded, batch), logits(dense, batch))
    assert loaded.get_input_embeddings().padding_idx == compressed.get_input_embeddings().padding_idx


def test_densify_leaves_the_compressed_model_as_it_is(make_model, make_code, batch):
    compressed = compress_embeddings(make_model(), make_code(make_model()))
    before = logits(compressed, batch)
    densify(compressed).resize_token_embeddings(100)
    assert torch.equal(logits(compressed, batch), before)
    with pytest.raises(ValueError, match="densify"):
        compressed.resize_token_embeddings(100)


def test_densify_takes_a_trainable_model_and_one_in_half_precision(make_model, make_code, batch):
    compressed = compress_embeddings(make_model(), make_code(make_model()))
    compressed.get_input_embeddings().trainable = True
    dense = densify(compressed.half())
    assert {p.dtype for p in dense.parameters()} == {torch.float16}
    assert dense.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("auto", "architecture", "message"),
    [
        ("AutoModelForMaskedLM", "bert", r"BertForMaskedLM ties cls.predictions.decoder.weight"),
        ("AutoModelForMaskedLM", "modernbert", r"ModernBertForMaskedLM ties decoder.weight"),
        ("AutoModelForCausalLM", "roberta", r"RobertaForCausalLM ties lm_head.decoder.weight"),
    ],
)
def test_a_tied_head_is_refused_by_name(make_model, make_code, auto, architecture, message):
    model = make_model(architecture, getattr(transformers, auto), is_decoder=auto == "AutoModelForCausalLM")
    with pytest.raises(ValueError, match=message):
        compress_embeddings(model, make_code(model))


def test_an_untied_masked_head_is_taken(make_model, make_code, batch):
    model = make_model("bert", transformers.AutoModelForMaskedLM, tie_word_embeddings=False)
    assert logits(compress_embeddings(model, make_code(model)), batch).shape == (2, 11, 90)


def test_a_table_shared_by_hand_is_refused(make_model, make_code):
    model = make_model()
    model.extra = nn.Linear(32, 90)
    model.extra.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"ties extra\.weight"):
        compress_embeddings(model, make_code(model))


def test_a_model_without_a_recognised_embedding_is_refused():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    code = fastkd.SparseCode(Arrays(*(torch.empty(0, 0),) * 8))
    with pytest.raises(ValueError, match=r"ViTModel: .*only a plain nn.Embedding can be coded"):
        compress_embeddings(transformers.ViTModel(config), code)


def test_an_embedding_that_does_more_than_look_up_is_refused(make_model, make_code):
    class Scaled(nn.Embedding):
        pass

    for embedding, found in ((Scaled(90, 32), "a Scaled"), (nn.Embedding(90, 32, max_norm=1.0), "max_norm")):
        model = make_model()
        code = make_code(model)
        model.set_input_embeddings(embedding)
        with pytest.raises(ValueError, match=f"{found}.*only a plain nn.Embedding"):
            compress_embeddings(model, code)


def test_a_compressed_model_is_not_compressed_again(make_model, make_code):
    model = make_model()
    compressed = compress_embeddings(model, make_code(model))
    with pytest.raises(ValueError, match="compressed already"):
        compress_embeddings(compressed, make_code(model))


def test_a_code_of_another_table_is_refused(make_model, make_code):
    code = make_code(make_model("electra"))
    with pytest.raises(ValueError, match=r"shape \(90, 16\), the model's is \(90, 32\)"):
        compress_embeddings(make_model("bert"), code)


def test_densify_refuses_a_dense_model_and_what_is_no_model(make_model):
    with pytest.raises(ValueError, match="BertForSequenceClassification is not compressed"):
        densify(make_model())
    with pytest.raises(TypeError, match="Linear"):
        densify(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Linear"):
        compress_embeddings(nn.Linear(2, 2), None)
