"""A torch.export program as an ONNX graph that is small, fast in onnxruntime, and says nothing about this machine."""

import ast
import tempfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from fastkd.edge.capture import does_not_export, quiet
from fastkd.edge.extras import required

# The first with Gelu as one operator; in opset 18 it is a chain of five that onnxruntime does not put together again.
OPSET = 20
_LARGEST = 2**31 - 1  # bytes of a protobuf message


def to_onnx(program: ExportedProgram, inputs: tuple[str, ...], output: str):
    """The graph (an onnx.ModelProto), in operators of the ONNX standard alone, opset `OPSET`, for batches and lengths
    of any size. Weights have the names of the modules that use them.

    Raises ValueError for an operator that ONNX does not have, naming it and its module, for a model above 2 GB, and
    where onnx or onnxscript is not installed.
    """
    required("onnx"), required("onnxscript")
    nbytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    if nbytes > _LARGEST:
        raise ValueError(f"the model has {nbytes / 1e9:.1f} GB of weights; one .onnx file holds 2 GB")
    with quiet():
        try:
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=[output], verbose=False
            )
        except Exception as error:  # torch.onnx wraps whatever a translation raises
            raise does_not_export(program, error) from error
        model = exported.model_proto
    _name_by_module(model.graph)
    _drop_what_is_recorded(model)
    _keep_residual_sums_apart(model.graph)
    _name_dimensions(model.graph)
    return model


def quantise(model):
    """int8 by onnxruntime's dynamic quantisation: matrices rounded per column, activations as they come.

    Embedding rows are int8 already where `capture` was told so: with a scale per row, where onnxruntime would give a
    table one scale for all.
    """
    quantization = required("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(
            model, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=quantization.QuantType.QInt8
        )
        return required("onnx").load(path)


def weights_of(model) -> list[tuple[str, int, int]]:
    """Name, bytes and count of numbers of every weight."""
    to_array = required("onnx.numpy_helper").to_array
    arrays = ((each.name, to_array(each)) for each in model.graph.initializer)
    return [(name, array.nbytes, array.size) for name, array in arrays]


def _name_by_module(graph) -> None:
    """Nodes are called node_MatMul_81 and transposed weights val_7; give both the name of the module they are of."""
    readers = {}
    for place, node in enumerate(graph.node):
        module = _module_of(node)
        node.name = f"{module}/{node.op_type}_{place}" if module else f"{node.op_type}_{place}"
        for name in node.input:
            readers.setdefault(name, module)
    taken, renamed = {each.name for each in graph.initializer}, {}
    for weight in graph.initializer:
        name = weight.name
        if "." not in name and readers.get(name):
            name = f"{readers[name]}.{'weight' if len(weight.dims) > 1 else name}"
        name = name.removeprefix("model.")
        if name != weight.name:
            while name in taken:
                name += "_"
            taken.add(name)
            renamed[weight.name] = weight.name = name
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _module_of(node) -> str:
    recorded = [each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes"]
    modules = [scope for scope in ast.literal_eval(recorded[0])[:-1] if scope] if recorded else []
    return modules[-1].removeprefix("model.") if modules else ""


def _drop_what_is_recorded(model) -> None:
    # torch 2.13's exporter leaves the shapes of weights before they were transposed in value_info, on which the shape
    # inference of onnxruntime 1.31's quantiser fails. Whoever needs shapes infers them.
    del model.graph.value_info[:]
    # Stack traces of the exporting machine: half of the bytes of the graph, and its paths.
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for weight in model.graph.initializer:
        weight.doc_string = ""
        del weight.metadata_props[:]


def _keep_residual_sums_apart(graph) -> None:
    # onnxruntime 1.31 fuses Add and LayerNormalization to an operator that takes several times as long as the two on a
    # CPU, which an int8 encoder feels. It does not fuse Sum, which computes the same.
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        before = made.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"


def _name_dimensions(graph) -> None:
    for each in graph.input:
        for dimension, name in zip(each.type.tensor_type.shape.dim, ("batch", "length"), strict=True):
            dimension.dim_param = name
    for each in graph.output:
        each.type.tensor_type.shape.dim[0].dim_param = "batch"
