import pytest
import torch
from transformers import ConvBertConfig, ConvBertModel

import fastkd
from fastkd.models import Architecture, architectures, register_architecture
from fastkd.models.architectures import embeddings_of


@pytest.fixture
def convbert(monkeypatch):
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    config = ConvBertConfig(
        vocab_size=50, hidden_size=32, embedding_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20,
    )  # fmt: skip
    return ConvBertModel(config).eval()


def test_an_unknown_architecture_is_refused_with_the_known_ones_and_the_way_to_add_it(convbert):
    with pytest.raises(ValueError, match=r"'convbert'; supported: bert, .*register_architecture\(") as error:
        with fastkd.tap(convbert, [0]):
            pass
    for name in ("roberta", "electra", "distilbert", "mpnet", "deberta-v2", "modernbert"):
        assert name in str(error.value)


def test_a_student_of_an_unknown_architecture_is_refused(convbert):
    with pytest.raises(ValueError, match="unknown architecture 'convbert'"):
        fastkd.create_student(convbert, layers=1)


def test_an_added_architecture_can_be_tapped(convbert):
    register_architecture("convbert", Architecture())
    with fastkd.tap(convbert, [-1], stop_after=True) as taps:
        convbert(torch.arange(6)[None])
    assert taps[-1]["value"].shape == (1, 6, 16)  # ConvBERT halves its attention heads


def test_an_architecture_needs_one_or_three_projections():
    with pytest.raises(ValueError, match="query, key and value"):
        Architecture(projections=("q", "k"))


@pytest.mark.parametrize("head", ["sequence", "bare"])
def test_the_layers_work_on_what_the_embeddings_give(make_model, architecture, head, batch):
    model, given = make_model(architecture, head), []
    embeddings_of(model).register_forward_hook(lambda module, args, output: given.append(output))
    output = model(**batch)
    [vectors] = given
    assert vectors.shape[:2] == batch["input_ids"].shape
    [gradient] = torch.autograd.grad(output[0].sum(), vectors)
    assert gradient[0].abs().sum(-1).gt(0).all()
