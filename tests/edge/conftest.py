"""Tiny models in folders, and files exported from them, made once for all tests."""

import random

import pytest
import torch
import transformers

import fastkd
from fastkd.data import train_wordpiece
from fastkd.embeddings import compress_embeddings
from fastkd.ops.sparse_arrays import Arrays

WIDTH, POSITIONS, KEPT = 48, 40, 30
# With the usual 0.02 so small a model gives one answer to every text, and int8 would be calibrated on that alone.
_WIDE = {"initializer_range": 0.2}
_SIZES = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": WIDTH, "intermediate_size": 64, **_WIDE}
_DISTIL = {"n_layers": 1, "n_heads": 4, "dim": WIDTH, "hidden_dim": 64, **_WIDE}
_LABELS = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
CONFIGS = {
    "bert": (transformers.BertConfig, _SIZES),
    "distilbert": (transformers.DistilBertConfig, _DISTIL),
    "roberta": (transformers.RobertaConfig, {**_SIZES, "type_vocab_size": 1, "pad_token_id": 0}),
    "electra": (transformers.ElectraConfig, {**_SIZES, "embedding_size": 16}),
    "mpnet": (transformers.MPNetConfig, {**_SIZES, "pad_token_id": 0}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {**_SIZES, "type_vocab_size": 1, "pad_token_id": 0}),
}
EXTENSIONS = {"onnx": "onnx", "openvino": "xml", "torch": "pt2"}


@pytest.fixture(scope="session")
def edge_texts(tmp_path_factory):
    """A txt file of forty short texts."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 5))) for _ in range(60)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(40)))
    return file


@pytest.fixture(scope="session")
def edge_tokenizer(edge_texts):
    return train_wordpiece(edge_texts.read_text().splitlines(), 120, max_length=POSITIONS - 2)


@pytest.fixture(scope="session")
def edge_folder(tmp_path_factory, edge_tokenizer):
    """edge_folder("roberta", "sparse"): a folder with a tiny model of random weights and its tokenizer. The table is
    "dense", or a "sparse" code of fp16 rows, of "int8" rows and weights, with a "residual", or one of residuals alone
    ("pq"); head: an auto class, or labels=1 for a regression."""
    made = {}

    def make(architecture="bert", table="dense", auto=transformers.AutoModelForSequenceClassification, **changes):
        key = (architecture, table, auto, *changes.items())
        if key not in made:
            kind, sizes = CONFIGS[architecture]
            labels = {} if changes else _LABELS
            config = kind(
                vocab_size=len(edge_tokenizer), max_position_embeddings=POSITIONS, **{**sizes, **labels, **changes}
            )
            torch.manual_seed(0)
            model = auto.from_config(config).eval()
            for parameter in model.parameters():  # biases of zero would hide that one is left out
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
            if table != "dense":
                model = compress_embeddings(model, _code(model.get_input_embeddings().weight.detach(), table))
            made[key] = tmp_path_factory.mktemp("model") / f"{architecture}-{table}"
            model.save_pretrained(made[key])
            edge_tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory, edge_folder, edge_texts):
    """exported("bert", "sparse", to="openvino", int8=True): the artifact of `edge_folder`'s model."""
    from fastkd.edge import export

    made = {}

    def make(architecture="bert", table="dense", to="onnx", int8=False, **head):
        key = (architecture, table, to, int8, *head.items())
        if key not in made:
            out = tmp_path_factory.mktemp("exported") / f"model.{EXTENSIONS[to]}"
            texts = [edge_texts] if to == "openvino" and int8 else []
            made[key] = export(edge_folder(architecture, table, **head), out, to=to, int8=int8, texts=texts)
        return made[key]

    return make


@pytest.fixture(scope="session")
def ids_and_mask(edge_tokenizer):
    """Two texts of 11 and 8 tokens, among them every kind of token."""
    ids = torch.randint(5, len(edge_tokenizer), (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 8:] = mask[1, 8:] = 0
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


def _code(table, kind) -> fastkd.SparseCode:
    """A code of the table's shape, kept rows from it in an order of their own, atoms and weights at random."""
    tokens, width = table.shape
    kept, atoms = (0, 0) if kind == "pq" else (KEPT, 3)
    residual = 4 if kind in ("pq", "residual") else 0
    slot = torch.randperm(tokens)
    rows = table[torch.argsort(slot)[:kept]].half()
    weights = torch.randn(tokens - kept, atoms).half()
    kept_scale = weight_scale = None
    if kind == "int8":
        kept_scale, weight_scale = rows.float().abs().amax(1) / 127, (weights.float().abs().amax(1) / 127).half()
        rows = (rows.float() / kept_scale[:, None]).round().to(torch.int8)
        weights = (weights.float() / weight_scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return fastkd.SparseCode(
        Arrays(
            slot=slot.to(torch.uint16),
            kept=rows,
            kept_scale=kept_scale,
            atom_ids=torch.randint(max(kept, 1), (tokens - kept, atoms)).to(torch.uint16),
            atom_weights=weights,
            weight_scale=weight_scale,
            residual=torch.randint(256, (tokens - kept, residual), dtype=torch.uint8) if residual else None,
            codebook=0.05 * torch.randn(residual, 256, width // residual) if residual else None,
        )
    )
