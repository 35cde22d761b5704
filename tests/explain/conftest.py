"""Small classifiers in fp64 with random weights: a BERT, and one that is linear in its embeddings."""

import pytest
import torch
import transformers
from torch import nn

from fastkd.explain import Classifier

PAD, CLS, SEP, MASK = range(4)
SPECIAL = (PAD, CLS, SEP)


class LinearClassifier(nn.Module):
    """z_c = Σ_i ⟨w_c,i, e_i⟩ + b_c, with a weight of its own for each position: every explanation of it is known."""

    def __init__(self, vocabulary=30, length=9, width=4, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.weight = nn.Parameter(torch.randn(classes, length, width))
        self.bias = nn.Parameter(torch.randn(classes))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask):
        vectors = self.embedding(input_ids) * attention_mask[..., None]
        return torch.einsum("bld,cld->bc", vectors, self.weight[:, : vectors.shape[1]]) + self.bias


def tiny_bert(seed=0, dropout=0.0, **changes):
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 20, "num_labels": 3, "initializer_range": 0.15}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes | rates | changes)).double()


@pytest.fixture
def bert():
    return tiny_bert().eval()


@pytest.fixture
def classifier(bert):
    """The BERT above, with its whole embedding layer tapped."""
    return Classifier(bert, bert.bert.embeddings, mask_id=MASK, special_ids=SPECIAL)


@pytest.fixture
def dropping():
    """A BERT in training, whose dropout is on, and its classifier."""
    bert = tiny_bert(dropout=0.3).train()
    return bert, Classifier(bert, bert.bert.embeddings, mask_id=MASK, special_ids=SPECIAL)


@pytest.fixture
def linear():
    return Classifier(LinearClassifier().double(), mask_id=MASK, special_ids=SPECIAL)


@pytest.fixture
def batch():
    """Sentences of 7, 5 and 4 words between [CLS] and [SEP], padded to 9 tokens."""
    ids = torch.full((3, 9), PAD)
    for row, words in enumerate((7, 5, 4)):
        draw = torch.Generator().manual_seed(row)
        ids[row, 1 : words + 1] = torch.randint(5, 30, (words,), generator=draw)
        ids[row, 0], ids[row, words + 1] = CLS, SEP
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}
