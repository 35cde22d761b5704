"""What can be shipped and run: a transformers folder, or an exported file with what belongs to it.

transformers' AutoTokenizer and AutoConfig import torch, which a process that runs an exported file does without: they
are imported where they are needed.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safetensors import safe_open

from fastkd.edge.extras import required
from fastkd.edge.manifest import PARTS, Manifest, read_manifest

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch-export", ".pte": "executorch"}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class Artifact:
    """path: the folder or exported file. format: "torch" (a transformers folder), "onnx", "openvino", "torch-export" or
    "executorch". precision: "fp32", "int8" and the like; of a sparse-coded embedding the formats are its own."""

    path: Path
    format: str
    precision: str

    @property
    def folder(self) -> Path:
        """Where config.json and the tokenizer lie."""
        return self.path if self.format == "torch" else self.path.parent

    @cached_property
    def manifest(self) -> Manifest | None:
        """What was written beside an exported file; None for a folder, and for a file that something else exported."""
        return None if self.format == "torch" else read_manifest(self.path)

    def tokenizer(self):
        """The tokenizer. Raises ValueError if there is none."""
        if self.manifest is not None and (self.folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            found = PreTrainedTokenizerFast.from_pretrained(self.folder)
            if found.pad_token is not None:  # else the folder leaves its special tokens to the model's own class
                return found
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.folder} has no tokenizer that loads ({reason})") from error

    def config(self) -> "transformers.PretrainedConfig":  # noqa: F821
        """The model's config, with its labels."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder)

    def sizes(self) -> tuple[int, int]:
        """Tokens of the vocabulary, and token types."""
        written = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.manifest is None or "vocab_size" not in written:  # what is left out has its class' default
            written = self.config().to_dict()
        return written["vocab_size"], written.get("type_vocab_size") or 0

    @property
    def task(self) -> str:
        """ "sequence-classification", "regression" or "sentence-embedding"."""
        if self.manifest is not None:
            return self.manifest.task
        from fastkd.edge.served import task_of

        return task_of(self.config())

    def files(self) -> list[Path]:
        """The files of weights and graph."""
        if self.format == "torch":
            return sorted(self.path.glob("*.safetensors"))
        beside = {"onnx": self.path.with_name(f"{self.path.name}.data"), "openvino": self.path.with_suffix(".bin")}
        weights = beside.get(self.format)
        return [self.path, *([weights] if weights is not None and weights.is_file() else [])]

    @property
    def nbytes(self) -> int:
        """Bytes of `files()`."""
        return sum(file.stat().st_size for file in self.files())

    def bytes_by_part(self) -> dict[str, int]:
        """{"embedding", "encoder", "head", "other"}, summing to `nbytes`; graph and file overhead are other. Of a file
        without our manifest all is other, unless it is ONNX, whose weights are told apart by their names."""
        if self.manifest is not None:
            return dict(self.manifest.bytes)
        return with_other({part: nbytes for part, (nbytes, _) in self._weights().items()}, self.nbytes)

    def parameters(self) -> tuple[int, int]:
        """Numbers stored, and numbers that they stand for: V x D for a sparse-coded table."""
        if self.manifest is not None:
            return self.manifest.parameters["stored"], self.manifest.parameters["effective"]
        stored = sum(count for _, count in self._weights().values())
        config = self.config()
        coded = getattr(config, "quantization_config", None)
        if self.format != "torch" or coded is None:
            return stored, stored
        return stored, stored + self._numbers_spared()

    def _weights(self) -> dict[str, tuple[int, int]]:
        """Bytes and numbers of the weights by part."""
        if self.format == "torch":
            return sizes_by_part((name, nbytes, math.prod(shape)) for name, shape, nbytes in self._tensors())
        if self.format != "onnx":
            return {}
        weights = required("onnx").load(self.path, load_external_data=False).graph.initializer
        element = required("onnx.helper").tensor_dtype_to_np_dtype
        sizes = ((each.name, math.prod(each.dims), element(each.data_type).itemsize) for each in weights)
        return sizes_by_part((name, count * size, count) for name, count, size in sizes)

    def _tensors(self) -> list[tuple[str, list[int], int]]:
        """Name, shape and bytes of each tensor in a folder's safetensors files, from their headers."""
        found = []
        for file in self.files():
            with safe_open(file, framework="np") as tensors:
                del tensors  # opened to have a broken file refused
            with file.open("rb") as opened:
                header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            header.pop("__metadata__", None)
            found += [
                (name, each["shape"], each["data_offsets"][1] - each["data_offsets"][0])
                for name, each in header.items()
            ]
        return found

    def _numbers_spared(self) -> int:
        """V x D less the numbers of a sparse code's arrays."""
        arrays = {name: shape for name, shape, _ in self._tensors()}
        [slot] = [name for name in arrays if name.endswith(".slot")]
        stem = slot.removesuffix("slot")
        code = {name: shape for name, shape in arrays.items() if name.startswith(stem)}
        dense = arrays[slot][0] * arrays[f"{stem}weight"][1]
        return dense - sum(math.prod(shape) for shape in code.values())


def open_artifact(path: str | Path) -> Artifact:
    """The artifact at `path`: a transformers folder, an .onnx, .xml, .pt2 or .pte file.

    Raises ValueError where there is nothing, where it is neither or a BiLSTM, or where config.json or the weights are
    missing.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        if not (found / "config.json").is_file() or not any(found.glob("*.safetensors")):
            raise ValueError(f"{path} is no model's folder: config.json and *.safetensors are needed")
        folder = Artifact(found, "torch", "fp32")
        if folder.config().model_type == "bilstm":
            raise ValueError(f"{path} is a BiLSTM; models of transformers are exported and measured")
        return replace(folder, precision=_precision(folder.config()))
    if not found.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if found.suffix not in FORMATS:
        raise ValueError(f"{path} is no artifact: a model's folder or a file that ends in {', '.join(FORMATS)} is one")
    if not (found.parent / "config.json").is_file():
        raise ValueError(f"{path} stands without the config.json and tokenizer of its model, which belong beside it")
    if found.suffix == ".xml" and not found.with_suffix(".bin").is_file():
        raise ValueError(f"{path} stands without {found.with_suffix('.bin').name}, its weights")
    manifest = read_manifest(found)
    precision = _precision_of_graph(found) if manifest is None else manifest.precision
    return Artifact(found, FORMATS[found.suffix], precision)


def part_of(name: str) -> str:
    """The part of a model that a weight or operator belongs to, by its name."""
    names = re.split(r"[./]", name)
    if any(each in ("embeddings", "embeddings_project") for each in names):
        return "embedding"
    if any(each in ("encoder", "transformer", "layers", "layer") for each in names):
        return "encoder"
    return "head" if any("classifier" in each or each in ("pooler", "head") for each in names) else "other"


def sizes_by_part(weights) -> dict[str, tuple[int, int]]:
    """(name, bytes, numbers) of each weight -> the sums of both by part."""
    found = dict.fromkeys(PARTS, (0, 0))
    for name, nbytes, count in weights:
        part = part_of(name)
        found[part] = (found[part][0] + nbytes, found[part][1] + count)
    return found


def with_other(parts: dict[str, int], total: int) -> dict[str, int]:
    """Bytes by part, where `other` is what the rest leaves of `total`."""
    named = {part: parts.get(part, 0) for part in PARTS if part != "other"}
    return named | {"other": total - sum(named.values())}


def _precision(config) -> str:
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return _PRECISIONS.get(dtype, dtype)


def _precision_of_graph(path: Path) -> str:
    """Of a file that something else exported: int8 where its graph multiplies integers or reads them as fractions."""
    if path.suffix != ".onnx":
        return "unknown"
    nodes = required("onnx").load(path, load_external_data=False).graph.node
    return (
        "int8" if {"MatMulInteger", "DequantizeLinear", "QLinearMatMul"} & {node.op_type for node in nodes} else "fp32"
    )
