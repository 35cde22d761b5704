"""Tiny models of every architecture, and codes of their tables that need no fit."""

import pytest
import torch
import transformers

import fastkd
from fastkd.ops.sparse_arrays import Arrays

VOCABULARY, WIDTH = 90, 32
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDTHS = {"hidden_size": WIDTH, "intermediate_size": 48, "num_labels": 2}

CONFIGS = {
    "bert": lambda: transformers.BertConfig(**_SIZES, **_WIDTHS),
    "roberta": lambda: transformers.RobertaConfig(**_SIZES, **_WIDTHS),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_SIZES, **_WIDTHS),
    "electra": lambda: transformers.ElectraConfig(**_SIZES, **_WIDTHS, embedding_size=16),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=40, n_layers=2, n_heads=4, dim=WIDTH, hidden_dim=48
    ),
    "mpnet": lambda: transformers.MPNetConfig(**_SIZES, **_WIDTHS),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SIZES, **_WIDTHS, local_attention=8, layer_types=["full_attention", "sliding_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request):
    return request.param


@pytest.fixture
def make_model():
    """make_model("electra", transformers.AutoModel): a model of random weights in eval mode."""

    def make(architecture="bert", auto=transformers.AutoModelForSequenceClassification, **changes):
        config = CONFIGS[architecture]()
        for name, value in changes.items():
            setattr(config, name, value)
        return auto.from_config(config).eval()

    return make


@pytest.fixture
def make_code():
    """make_code(model, kept=20, atoms=3, rows=torch.float16, ...): a code of the shape of the model's table, kept rows
    from it, in an order of their own, and random atoms."""

    def make(
        model, kept=20, atoms=3, rows=torch.float32, weights=torch.float16, scale=torch.float16, residual=0
    ) -> fastkd.SparseCode:
        table = model.get_input_embeddings().weight.detach()
        vocabulary, width = table.shape
        coded = vocabulary - kept
        slot = torch.randperm(vocabulary)
        inverse = torch.argsort(slot)
        arrays = Arrays(
            slot=slot.to(torch.uint16),
            kept=table[inverse[:kept]].clone(),
            kept_scale=None,
            atom_ids=torch.randint(max(kept, 1), (coded, atoms)).to(torch.uint16),
            atom_weights=torch.randn(coded, atoms),
            weight_scale=None,
            residual=torch.randint(256, (coded, residual), dtype=torch.uint8) if residual else None,
            codebook=0.01 * torch.randn(residual, 256, width // residual) if residual else None,
        )
        return fastkd.SparseCode(_stored(arrays, rows, weights, scale))

    return make


def _stored(arrays, rows, weights, scale):
    kept, kept_scale = _as(arrays.kept, rows)
    atom_weights, weight_scale = _as(arrays.atom_weights, weights)
    return arrays._replace(
        kept=kept,
        kept_scale=kept_scale,
        atom_weights=atom_weights,
        weight_scale=None if weight_scale is None else weight_scale.to(scale),
    )


def _as(values, dtype):
    if dtype != torch.int8:
        return values.to(dtype), None
    scale = values.abs().amax(1) / 127
    return (values / scale[:, None]).round().to(torch.int8), scale


@pytest.fixture
def batch():
    """Two sentences of 11 and 8 tokens."""
    ids = torch.randint(5, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}
