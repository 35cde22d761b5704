"""What torch runs: a transformers folder and a torch.export program, and an ExecuTorch program, fed its tensors."""

from collections.abc import Callable

import numpy as np
import torch

from fastkd.edge.artifact import Artifact
from fastkd.edge.extras import required
from fastkd.edge.runtimes import Run, Runtime


def load_folder(artifact: Artifact, threads: int, mode: str) -> Runtime:
    """A transformers folder in a mode of `load_runtime`."""
    from fastkd.edge.served import load_served  # with transformers' models, which a program does without

    torch.set_num_threads(threads)
    served = load_served(artifact.path)
    if mode == "int8":
        from torch.ao.quantization import quantize_dynamic

        served.model = quantize_dynamic(served.model, {torch.nn.Linear}, dtype=torch.qint8)
    elif mode == "compile":
        served.compile(dynamic=True)
    return torch_runtime(served, mode)


def torch_runtime(served: "ServedModel", mode: str = "eager") -> Runtime:  # noqa: F821
    """The model itself as a runtime, on as many threads as torch has."""
    config = served.config
    types = getattr(config, "type_vocab_size", 0) or 0
    name = f"torch {torch.__version__} {mode}"
    return Runtime(name, _of_module(served), served.inputs, config.vocab_size, types, served.max_length)


def _of_module(module: Callable) -> Run:
    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return run


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


LOADERS = {"torch-export": _torch_export, "executorch": _executorch}
