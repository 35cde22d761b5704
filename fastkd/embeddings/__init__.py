"""Partial sparse coding of embeddings: token counts, fit, the layer, models that load like any other.

Everything is loaded on first use: `import fastkd` passes through here, and what knows models needs transformers.
"""

import importlib

_ON_FIRST_USE = {
    "SparseCode": "code",
    "count_tokens": "counts",
    "save_counts": "counts",
    "load_counts": "counts",
    "continuations": "counts",
    "SparseEmbedding": "module",
    "compress_embeddings": "compress",
    "densify": "compress",
}

__all__ = list(_ON_FIRST_USE)


def __getattr__(name: str):
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'fastkd.embeddings' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastkd.embeddings.{_ON_FIRST_USE[name]}"), name)


def __dir__():
    return sorted([*globals(), *_ON_FIRST_USE])
