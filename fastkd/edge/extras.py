"""Packages of the extra `edge`, imported where they are first needed."""

import importlib
from types import ModuleType

_HOW = {"executorch": "pip install executorch"}


def required(module: str) -> ModuleType:
    """The module; raises a ValueError that says how to get it where it is not installed."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        how = _HOW.get(package, "pip install 'fastkd[edge]'")
        raise ValueError(f"{package} is not installed: {how}") from error
