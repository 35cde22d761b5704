"""From a model to what is shipped: export, quantise, measure, gate.

Everything is loaded on first use; onnx, onnxruntime, openvino and nncf (the extra `edge`) only where they are needed.
"""

import importlib

_ON_FIRST_USE = {
    "Artifact": "artifact",
    "open_artifact": "artifact",
    "load_runtime": "runtimes",
    "export": "export_run",
    "report": "report_run",
    "gate": "gate_run",
}

__all__ = list(_ON_FIRST_USE)


def __getattr__(name: str):
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'fastkd.edge' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"fastkd.edge.{_ON_FIRST_USE[name]}"), name)
    globals()[name] = found
    return found


def __dir__():
    return sorted([*globals(), *_ON_FIRST_USE])
