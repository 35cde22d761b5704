"""Tiny models of every supported architecture, with random weights."""

import pytest
import torch
import transformers

VOCABULARY = 90
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_labels": 3}
_RELATIVE = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
}

CONFIGS = {
    "bert": lambda: transformers.BertConfig(**_SIZES, **_WIDTHS),
    "roberta": lambda: transformers.RobertaConfig(**_SIZES, **_WIDTHS),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_SIZES, **_WIDTHS),
    "electra": lambda: transformers.ElectraConfig(**_SIZES, **_WIDTHS, embedding_size=16),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=40, n_layers=4, n_heads=4, dim=32, hidden_dim=48, num_labels=3
    ),
    "mpnet": lambda: transformers.MPNetConfig(**_SIZES, **_WIDTHS),
    "deberta-v2": lambda: transformers.DebertaV2Config(**_SIZES, **_WIDTHS, **_RELATIVE, share_att_key=True),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SIZES, **_WIDTHS, local_attention=8, layer_types=["full_attention", "sliding_attention"] * 2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
}  # fmt: skip
ARCHITECTURES = sorted(CONFIGS)

HEADS = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "answer": transformers.AutoModelForQuestionAnswering,
    "masked": transformers.AutoModelForMaskedLM,
    "bare": transformers.AutoModel,
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def make_model():
    """make_model("bert", "sequence", num_hidden_layers=6): a seeded model in eval mode."""

    def make(architecture="bert", head="sequence", seed=0, **changes):
        config = CONFIGS[architecture]()
        if head == "answer":
            config.num_labels = 2  # start and end
        for name, value in changes.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        model = HEADS[head].from_config(config).eval()
        for parameter in model.parameters():  # zero biases and unit norms would hide a part that was not copied
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return model

    return make


@pytest.fixture
def batch():
    """Two sentences of 11 and 8 tokens."""
    ids = torch.randint(5, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}
