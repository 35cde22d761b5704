"""Lets transformers load what fastkd saves, without loading transformers: a part of fastkd is imported right after that
module of transformers in whose registry it enters itself, or at once if that has been imported."""

import importlib
import sys
from importlib.machinery import PathFinder


class _OnImport:
    """Finds one module, where every other finder would find it, and has another imported right after it."""

    def __init__(self, registry: str, entry: str):
        self.registry, self.entry = registry, entry

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == self.registry else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module(self.entry)

        spec.loader.exec_module = execute_and_register
        return spec


def on_import(registry: str, entry: str) -> None:
    """Import the module `entry` as soon as `registry` is imported, or now if it has been."""
    if registry in sys.modules:
        importlib.import_module(entry)
    elif not any(isinstance(finder, _OnImport) and finder.registry == registry for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(registry, entry))
