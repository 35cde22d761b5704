"""One way to call every artifact, whatever runs it. torch is imported only for what it runs."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from fastkd.edge.artifact import Artifact
from fastkd.edge.extras import required

MODES = ("eager", "compile", "int8")
Run = Callable[[dict[str, np.ndarray]], np.ndarray]
_LIBRARIES = {"onnx": "onnxruntime", "openvino": "openvino"}


@dataclass(frozen=True)
class Runtime:
    """A loaded artifact: `runtime(input_ids, attention_mask, token_type_ids=None)`, each int64 (B, L), gives float32
    (B, labels) or (B, D).

    Raises ValueError before anything runs on: arrays that are not (B, L) alike, an id outside the vocabulary, a token
    type that the model has not, or more tokens than it has positions. Token types that the model takes and that are not
    given are 0.
    """

    name: str
    run: Run
    inputs: tuple[str, ...]
    vocabulary: int
    types: int
    max_length: int | None

    def __call__(self, input_ids, attention_mask, token_type_ids=None) -> np.ndarray:
        ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        for name, array in given.items():
            if array.ndim != 2 or array.shape != ids.shape or not array.size or array.dtype.kind not in "iub":
                raise ValueError(
                    f"{name} is {array.dtype} of shape {array.shape}; integers of shape (batch, length) are needed, "
                    "all inputs alike and none empty"
                )
        _check_range("input_ids holds", ids, self.vocabulary, "tokens of the vocabulary")
        if "token_type_ids" in self.inputs:
            _check_range("token_type_ids holds", types, self.types, "token types")
        if self.max_length is not None and ids.shape[1] > self.max_length:
            raise ValueError(f"input_ids has {ids.shape[1]} tokens a text; the model has {self.max_length} positions")
        return self.run({name: np.ascontiguousarray(given[name], dtype=np.int64) for name in self.inputs})


def load_runtime(artifact: Artifact, threads: int = 1, mode: str = "eager") -> Runtime:
    """Load an artifact into the runtime of its format, on the CPU.

    Args:
        artifact: of `open_artifact`.
        threads: that one call uses; there is never more than one call at a time. torch's are those of the process.
        mode: for a transformers folder: "eager", "compile" (torch.compile, dynamic shapes) or "int8" (torch's dynamic
            quantisation of linear layers).

    Raises ValueError on a runtime that is not installed, naming the extra, a mode that is not known, or threads below
    1.
    """
    if threads < 1:
        raise ValueError(f"threads={threads}; 1 or more are needed")
    if mode not in MODES or (mode != "eager" and artifact.format != "torch"):
        allowed = f"one of {', '.join(MODES)}" if artifact.format == "torch" else "only 'eager' here"
        raise ValueError(f"mode={mode!r} for an artifact of format {artifact.format}; allowed is {allowed}")
    library = import_library(artifact.format)
    if artifact.format == "torch":
        return library.load_folder(artifact, threads, mode)
    load = {"onnx": _onnxruntime, "openvino": _openvino}.get(artifact.format) or library.LOADERS[artifact.format]
    name, run, inputs = load(artifact, threads)
    manifest = artifact.manifest
    inputs = inputs if manifest is None else tuple(manifest.inputs)
    max_length = None if manifest is None else manifest.max_length
    return Runtime(name, run, inputs, *artifact.sizes(), max_length)


def import_library(format: str) -> ModuleType:
    """Import what runs artifacts of this format. Raises ValueError where it is not installed."""
    if format in _LIBRARIES:
        return required(_LIBRARIES[format])
    return importlib.import_module("fastkd.edge.torch_runtimes")


def _onnxruntime(artifact: Artifact, threads: int) -> tuple[str, Run, tuple[str, ...]]:
    ort = required("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    names = tuple(each.name for each in session.get_inputs())
    return f"onnxruntime {ort.__version__}", lambda inputs: session.run(None, inputs)[0], names


def _openvino(artifact: Artifact, threads: int) -> tuple[str, Run, tuple[str, ...]]:
    openvino = required("openvino")
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Where a CPU has bf16 instructions OpenVINO would round all fp32 to it, unasked.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(str(artifact.path), "CPU", options)
    request = model.create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return request.infer(inputs)[0].copy()

    names = tuple(port.get_any_name() for port in model.inputs)
    return f"openvino {openvino.__version__.split('-')[0]}", run, names


def _check_range(what: str, ids: np.ndarray, bound: int, of: str) -> None:
    outside = ids[(ids < 0) | (ids >= bound)]
    if outside.size:
        raise ValueError(f"{what} {outside[0]}, outside the {bound} {of}")
