"""fastkd: small and fast Transformer encoders by distillation.

`import fastkd` loads the operators and losses alone; everything else is loaded on first use, because importing
transformers costs more than a second.
"""

import importlib

from fastkd import losses, ops
from fastkd.ops import relation_kl, use_backend

__version__ = "0.1.0"

_ON_FIRST_USE = {
    "tap": "fastkd.models",
    "create_student": "fastkd.models",
    "ReplaceableEncoder": "fastkd.models",
}
_ROOMS = ("models", "data", "recipes", "kernels", "benchmarks", "cli")

__all__ = ["losses", "ops", "relation_kl", "use_backend", *_ON_FIRST_USE]


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastkd.{name}")
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_ON_FIRST_USE, *_ROOMS])
