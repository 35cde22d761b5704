"""Lets transformers load compressed models, without loading transformers: the quantizer is registered when
transformers' own list of quantizers is first imported, or at once if it has been."""

import importlib
import sys
from importlib.machinery import PathFinder

_REGISTRY = "transformers.quantizers.auto"
_QUANTIZER = "fastkd.embeddings.quantizer"


class _OnImportOfTheRegistry:
    """Finds one module, where every other finder would find it, and has the quantizer imported right after it."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == _REGISTRY else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Have `sparse_embedding` among transformers' quantization methods, now or as soon as transformers is imported."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _OnImportOfTheRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImportOfTheRegistry())
