"""fastkd: small and fast Transformer encoders by distillation.

`import fastkd` loads the operators and losses alone; everything else is loaded on first use, because importing
transformers costs more than a second.
"""

import importlib

from fastkd import losses, ops
from fastkd.embeddings import registration
from fastkd.ops import cos_nce, relation_kl, sparse_embedding, use_backend
from fastkd.registration import on_import

__version__ = "0.1.0"

registration.register()  # lets from_pretrained load models with a SparseEmbedding
on_import("transformers.models.auto.modeling_auto", "fastkd.models.bilstm")  # and BiLSTM students

_ON_FIRST_USE = {
    "tap": "fastkd.models",
    "create_student": "fastkd.models",
    "create_bilstm": "fastkd.models",
    "ReplaceableEncoder": "fastkd.models",
    "SparseCode": "fastkd.embeddings",
    "SparseEmbedding": "fastkd.embeddings",
}
_ROOMS = ("models", "data", "embeddings", "explain", "recipes", "edge", "kernels", "benchmarks", "cli")

__all__ = ["cos_nce", "losses", "ops", "relation_kl", "sparse_embedding", "use_backend", *_ON_FIRST_USE]


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastkd.{name}")
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_ON_FIRST_USE, *_ROOMS])
