"""One way to call every artifact, whatever runs it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastkd.edge.artifact import Artifact
from fastkd.edge.extras import required
from fastkd.edge.served import ServedModel, load_served

MODES = ("eager", "compile", "int8")
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


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
    if artifact.format == "torch":
        return _torch(artifact, threads, mode)
    name, run, inputs = _LOADERS[artifact.format](artifact, threads)
    config, manifest = artifact.config(), artifact.manifest
    inputs = inputs if manifest is None else tuple(manifest.inputs)
    max_length = None if manifest is None else manifest.max_length
    return Runtime(name, run, inputs, config.vocab_size, getattr(config, "type_vocab_size", 0) or 0, max_length)


def torch_runtime(served: ServedModel, name: str = f"torch {torch.__version__}") -> Runtime:
    """The model itself as a runtime, on as many threads as torch has."""
    config = served.config
    types = getattr(config, "type_vocab_size", 0) or 0
    return Runtime(name, _of_module(served), served.inputs, config.vocab_size, types, served.max_length)


def _torch(artifact: Artifact, threads: int, mode: str) -> Runtime:
    torch.set_num_threads(threads)
    served = load_served(artifact.path)
    name = f"torch {torch.__version__} {mode}"
    if mode == "int8":
        from torch.ao.quantization import quantize_dynamic

        served.model = quantize_dynamic(served.model, {torch.nn.Linear}, dtype=torch.qint8)
    elif mode == "compile":
        served.compile(dynamic=True)
    return torch_runtime(served, name)


def _of_module(module: Callable) -> Run:
    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return run


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


def _torch_export(artifact: Artifact, threads: int) -> tuple[str, Run, tuple[str, ...]]:
    torch.set_num_threads(threads)
    program = torch.export.load(artifact.path)
    names = tuple(program.graph_signature.user_inputs)
    module = program.module()
    # It takes its inputs by place, in the order in which a Runtime hands them over.
    return f"torch {torch.__version__} export", _of_module(lambda **inputs: module(*inputs.values())), names


def _executorch(artifact: Artifact, threads: int) -> tuple[str, Run, tuple[str, ...]]:
    runtime = required("executorch.runtime")
    if artifact.manifest is None:
        raise ValueError(f"{artifact.path} has no manifest: the order of its inputs is not known")
    # A .pte file of the XNNPACK backend takes its threads from the process; Python cannot set them.
    method = runtime.Runtime.get().load_program(artifact.path).load_method("forward")
    names = tuple(artifact.manifest.inputs)

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return method.execute([torch.from_numpy(inputs[name]) for name in names])[0].numpy().copy()

    return "executorch", run, names


_LOADERS = {
    "onnx": _onnxruntime,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "executorch": _executorch,
}


def _check_range(what: str, ids: np.ndarray, bound: int, of: str) -> None:
    outside = ids[(ids < 0) | (ids >= bound)]
    if outside.size:
        raise ValueError(f"{what} {outside[0]}, outside the {bound} {of}")
