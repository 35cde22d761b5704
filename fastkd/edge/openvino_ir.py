"""An ONNX graph as OpenVINO's intermediate representation, fp32 or int8 by NNCF's post-training quantisation."""

import math
import tempfile
from pathlib import Path

from fastkd.edge.artifact import part_of
from fastkd.edge.capture import quiet
from fastkd.edge.extras import required

CALIBRATION_TEXTS = 300


def to_openvino(graph):
    """The openvino.Model of an onnx.ModelProto."""
    openvino = required("openvino")
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        required("onnx").save(graph, path)
        model = openvino.convert_model(path)
        model.validate_nodes_and_infer_types()
        return model.clone()  # with weights in memory, where those of the file that goes away would be mapped


def quantise(model, tokenizer, texts: list[str], inputs: tuple[str, ...], max_length: int):
    """int8 by NNCF, with ranges of activations taken over `texts`, one by one, `CALIBRATION_TEXTS` of them at most."""
    nncf = required("nncf")

    def encode(text: str) -> dict:
        encoded = tokenizer(text, truncation=True, max_length=max_length, return_tensors="np", verbose=False)
        return {name: encoded[name] if name in encoded else 0 * encoded["input_ids"] for name in inputs}

    data = nncf.Dataset(texts[:CALIBRATION_TEXTS], encode)
    with quiet():
        return nncf.quantize(
            model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=min(len(texts), CALIBRATION_TEXTS)
        )


def save(model, path: Path) -> None:
    """NAME.xml and NAME.bin; weights as they are, not rounded to fp16."""
    required("openvino").save_model(model, path, compress_to_fp16=False)


def weights_of(model) -> list[tuple[str, int, int]]:
    """Name, bytes and count of numbers of every weight; where the conversion has renamed it, by the operator that reads
    it."""
    found = []
    for each in model.get_ordered_ops():
        if each.get_type_name() == "Constant":
            name = _name_with_a_part(each)
            found.append((name, each.get_byte_size(), math.prod(each.get_output_shape(0))))
    return found


def _name_with_a_part(operator) -> str:
    """Its name, or that of the first operator downstream that says what part of the model it belongs to."""
    name = operator.get_friendly_name()
    while part_of(operator.get_friendly_name()) == "other":
        readers = operator.output(0).get_target_inputs()
        if len(readers) != 1:
            return name
        [reader] = readers
        operator = reader.get_node()
        if operator.get_output_size() == 0:
            return name
    return operator.get_friendly_name()
