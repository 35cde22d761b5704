"""A model as a function of its embeddings, given or tapped."""

import pytest
import torch
import transformers
from torch import nn

from fastkd.explain import Classifier, gradient_attribution, saliency
from fastkd.models.architectures import embeddings_of

_SIZES = {"vocab_size": 30, "max_position_embeddings": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZES |= {"hidden_size": 16, "intermediate_size": 24, "num_labels": 3}
ARCHITECTURES = {
    "roberta": lambda: transformers.RobertaConfig(**_SIZES, pad_token_id=0),
    "electra": lambda: transformers.ElectraConfig(**_SIZES, embedding_size=8),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=30, max_position_embeddings=20, n_layers=1, n_heads=2, dim=16, hidden_dim=24, num_labels=3
    ),
    "mpnet": lambda: transformers.MPNetConfig(**_SIZES, pad_token_id=0),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}


@pytest.mark.parametrize("where", ["word_embeddings", "whole layer"])
def test_the_embeddings_put_back_give_the_same_logits(bert, batch, where):
    classifier = Classifier(bert, bert.bert.embeddings if where == "whole layer" else None)
    embeddings = classifier.embed(batch)
    assert embeddings.shape == (3, 9, 16)
    torch.testing.assert_close(classifier.logits(batch, embeddings), bert(**batch).logits)


def test_other_embeddings_give_other_logits(classifier, batch):
    moved = classifier.embed(batch) * 1.5
    assert not torch.allclose(classifier.logits(batch, moved), classifier.logits(batch))


def test_nothing_above_the_embeddings_runs_for_them(classifier, bert, batch):
    bert.bert.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    classifier.embed(batch)


def test_no_hook_stays_behind(classifier, bert, batch):
    classifier.logits(batch, classifier.embed(batch))
    with classifier.watch():
        bert(**batch)
    assert not any(module._forward_hooks for module in bert.modules())
    assert not any("forward" in vars(module) for module in bert.modules())


def test_given_embeddings_are_explained_without_a_module(bert, batch):
    """Any function of them will do, such as a compiled model."""
    vectors = bert.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"]}
    function = Classifier(lambda inputs_embeds, attention_mask: bert(None, attention_mask, inputs_embeds=inputs_embeds))
    torch.testing.assert_close(saliency(function, inputs), saliency(Classifier(bert), batch))


def test_a_function_is_explained_through_a_tapped_module(bert, batch):
    """Such as the forward that a training loop has wrapped."""
    tapped = Classifier(bert.forward, bert.bert.embeddings)
    torch.testing.assert_close(saliency(tapped, batch), saliency(Classifier(bert, bert.bert.embeddings), batch))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_architecture_offers_its_embeddings(architecture, side, batch):
    """Its positions come from the ids, whichever side the padding is on."""
    model = transformers.AutoModelForSequenceClassification.from_config(ARCHITECTURES[architecture]()).eval()
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    for embeddings in (None, embeddings_of(model)):
        classifier = Classifier(model, embeddings)
        torch.testing.assert_close(classifier.logits(batch, classifier.embed(batch)), model(**batch).logits)
        scores = gradient_attribution(classifier, batch, create_graph=True)
        slopes = torch.autograd.grad(scores.square().sum(), list(model.parameters()), allow_unused=True)
        assert all(slope is None or slope.isfinite().all() for slope in slopes)


def test_labels_are_no_input(classifier, batch):
    assert classifier.logits(batch | {"labels": torch.tensor([99, 99, 99])}).shape == (3, 3)


def test_neither_special_tokens_nor_padding_can_be_masked(classifier, batch):
    assert classifier.maskable(batch).sum(1).tolist() == [7, 5, 4]
    assert Classifier(classifier.model).maskable(batch).sum(1).tolist() == [9, 7, 6]


def test_the_mask_baseline_keeps_special_tokens_and_positions(classifier, bert, batch):
    embeddings = classifier.embed(batch)
    baseline = classifier.baseline(batch, "mask", embeddings)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] > 4, 3)
    torch.testing.assert_close(baseline, bert.bert.embeddings(input_ids=ids))
    assert torch.equal(baseline[:, 0], embeddings[:, 0])


def test_draws_replay_the_dropout_above_the_embeddings(classifier, bert, batch):
    bert.config.hidden_dropout_prob = 0.5
    for module in bert.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    bert.train()
    with classifier.watch() as seen:
        first = bert(**batch).logits
    torch.testing.assert_close(classifier.logits(batch, seen.embeddings, seen.draws), first)
    assert not torch.allclose(classifier.logits(batch, seen.embeddings), first)


class NoEmbeddings(nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids.double()[:, :3]


def test_a_model_that_offers_no_embeddings_is_named(batch):
    with pytest.raises(ValueError, match="NoEmbeddings offers no embeddings: it has no get_input_embeddings"):
        saliency(Classifier(NoEmbeddings()), batch)


def test_a_model_that_takes_no_embeddings_is_named(batch):
    inputs = {"inputs_embeds": torch.ones(3, 9, 4), "attention_mask": batch["attention_mask"]}
    with pytest.raises(ValueError, match="its forward takes no inputs_embeds"):
        saliency(Classifier(NoEmbeddings()), inputs)


def test_embeddings_of_another_model_are_refused(bert):
    with pytest.raises(ValueError, match="is no module of"):
        Classifier(bert, nn.Embedding(3, 3))


def test_a_compiled_model_is_refused(bert):
    with pytest.raises(ValueError, match="is compiled"):
        Classifier(torch.compile(bert), bert.bert.embeddings)


def test_embeddings_that_run_twice_are_refused(bert, batch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, **inputs):
            return self.bert(**inputs).logits + self.bert(**inputs).logits

    classifier = Classifier(Twice(), bert.bert.embeddings)
    with pytest.raises(RuntimeError, match="ran 2 times"):
        classifier.logits(batch, classifier.embed(batch))


def test_a_module_that_gives_no_vector_for_each_token_is_refused(bert, batch):
    with pytest.raises(ValueError, match="a vector for each token is needed"):
        Classifier(bert, bert.classifier).embed(batch)


def test_a_model_with_no_logits_is_refused(bert, batch):
    with pytest.raises(ValueError, match="a classifier's logits"):
        Classifier(bert.bert).logits(batch)


def test_a_mask_baseline_needs_the_masks_id(bert, batch):
    classifier = Classifier(bert)
    with pytest.raises(ValueError, match="mask_id"):
        classifier.baseline(batch, "mask", classifier.embed(batch))
