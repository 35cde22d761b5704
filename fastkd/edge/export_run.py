"""From a model in a folder or on the hub to an exported file that was compared with torch before it is called done."""

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from fastkd.data import load_corpus
from fastkd.edge import executorch_program, onnx_graph, openvino_ir
from fastkd.edge.artifact import FORMATS, Artifact, open_artifact, sizes_by_part, with_other
from fastkd.edge.capture import capture
from fastkd.edge.extras import required
from fastkd.edge.manifest import Manifest, manifest_path, read_manifest
from fastkd.edge.runtimes import load_runtime
from fastkd.edge.served import ServedModel, load_served
from fastkd.edge.torch_runtimes import torch_runtime
from fastkd.edge.verify import BOUNDS, LONGEST, Verification, verify
from fastkd.embeddings.module import SparseEmbedding
from fastkd.models.loading import load_tokenizer
from fastkd.recipes.training import check_vocabulary

TARGETS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "executorch": ".pte"}
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_INT8 = {"onnx": (), "openvino": ("nncf",)}


class RefusedError(ValueError):
    """An exported file that differs from torch by more than its bound; the message says where it was kept."""


@dataclass
class Export:
    """Settings of an export; `run()` does it.

    Args:
        model: folder or hub id: a sequence classifier or regressor, or an encoder, whose sentence embeddings are pooled
            as its sentence-transformers files say (without them: the mean over the mask).
        out: the file, NAME.onnx, NAME.xml, NAME.pt2 or NAME.pte as `to` asks. Its manifest NAME.onnx.json, config.json
            and the tokenizer are written beside it; several exports of one model share a folder.
        to: "onnx", "openvino", "torch" (torch.export) or "executorch".
        int8: matrices and embedding rows in int8; for onnx and openvino.
        texts: corpora (see `load_corpus`), `text_column` their column: more to compare on, and for int8 with openvino
            what activations are calibrated on, up to 300 texts of `max_length` tokens.
        max_difference: from torch, as a share of the largest number that torch gives; 1e-4, and 0.25 for int8.
        overwrite: replace `out`.

    Raises ValueError, before any work, on settings that do not fit together.
    """

    model: str
    out: str
    to: str = "onnx"
    int8: bool = False
    texts: Sequence[str] = field(default_factory=list)
    text_column: str = "text"
    max_length: int = 128
    max_difference: float | None = None
    overwrite: bool = False

    def __post_init__(self):
        if self.to not in TARGETS:
            raise ValueError(f"to={self.to!r}; allowed are {', '.join(TARGETS)}")
        self.path = Path(self.out).expanduser().resolve()
        if self.path.suffix != TARGETS[self.to]:
            raise ValueError(f"out={self.out}: a file for {self.to} ends in {TARGETS[self.to]}")
        if self.int8 and self.to not in _INT8:
            raise ValueError(f"int8 is for {' and '.join(_INT8)}, not for {self.to}")
        if self.int8 and self.to == "openvino" and not self.texts:
            raise ValueError("int8 for openvino is calibrated on texts of the kind it is used for: give some (--texts)")
        if self.max_difference is not None and not self.max_difference > 0:
            raise ValueError(f"max_difference={self.max_difference}; a share above 0 is needed, e.g. 0.05")
        taken = [each for each in _files(self.path) if each.exists()]
        if taken and not self.overwrite:
            raise ValueError(f"out={self.out}: {taken[0].name} is there already; name another, or overwrite it")
        for package in (*_NEEDS.get(self.to, ()), *(_INT8[self.to] if self.int8 else ())):
            required(package)
        if self.to == "executorch":
            required("executorch.exir")

    @property
    def precision(self) -> str:
        return "int8" if self.int8 else "fp32"

    def run(self) -> Artifact:
        """Export, compare, and put the files in place; prints the comparison and the bytes.

        Raises RefusedError where the difference is above the bound: the file is kept as NAME.refused.onnx.
        """
        served = load_served(self.model).float()
        tokenizer = load_tokenizer(self.model)
        check_vocabulary(tokenizer, model=served.model)
        digest = _digest(served)
        self._check_folder(digest, served)
        texts = self._texts()
        partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            tokenizer.save_pretrained(partial)
            served.config.save_pretrained(partial)
            file = partial / self.path.name
            weights = self._write(served, tokenizer, texts, file)
            artifact = Artifact(file, FORMATS[file.suffix], self.precision)
            bound = BOUNDS[self.precision] if self.max_difference is None else self.max_difference
            _manifest(self, served, digest, artifact, weights, None).write(manifest_path(file))
            exported = load_runtime(open_artifact(file), torch.get_num_threads())  # torch's threads stay
            found = verify(exported, torch_runtime(served), tokenizer, texts, bound)
            manifest = _manifest(self, served, digest, artifact, weights, found)
            manifest.write(manifest_path(file))
            self._put_in_place(partial, found)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _show(manifest, self.path, exported.name)
        return open_artifact(self.path)

    def _texts(self) -> list[str]:
        if not self.texts:
            return []
        corpus = load_corpus(list(self.texts), text_column=self.text_column)
        return [row["text"] for row in itertools.islice(corpus, openvino_ir.CALIBRATION_TEXTS)]

    def _check_folder(self, digest: str, served: ServedModel) -> None:
        """One model a folder: its config and tokenizer are those of every exported file in it."""
        folder = self.path.parent
        for other in (each for suffix in FORMATS for each in folder.glob(f"*{suffix}") if each != self.path):
            manifest = read_manifest(other)
            if manifest is not None and manifest.source_digest != digest:
                raise ValueError(f"out={self.out}: {other.name} in that folder was exported from another model")
        if (folder / "config.json").is_file():
            there = AutoConfig.from_pretrained(folder)
            if _described(there) != _described(served.config):
                raise ValueError(f"out={self.out}: the config.json in that folder is another model's")

    def _write(self, served: ServedModel, tokenizer, texts: list[str], file: Path) -> list[tuple[str, int, int]]:
        """Write the exported file; returns name, bytes and count of its weights."""
        # onnxruntime folds constants while it loads; the others would do so while exporting, or at every call.
        onnx, largest = self.to == "onnx", (None, None)
        if self.to == "executorch":
            largest = executorch_program.LARGEST_BATCH, served.max_length or LONGEST
        program = capture(served, int8=self.int8 and onnx, at_load=onnx, largest=largest)
        if self.to in ("torch", "executorch"):
            torch.export.save(program, file) if self.to == "torch" else executorch_program.save(program, file)
            tensors = {**program.state_dict, **program.constants}
            return [(name, each.nbytes, each.numel()) for name, each in tensors.items() if hasattr(each, "nbytes")]
        graph = onnx_graph.to_onnx(program, served.inputs, _output(served))
        if self.to == "onnx":
            graph = onnx_graph.quantise(graph) if self.int8 else graph
            required("onnx").save(graph, file)
            return onnx_graph.weights_of(graph)
        model = openvino_ir.to_openvino(graph)
        if self.int8:
            model = openvino_ir.quantise(model, tokenizer, texts, served.inputs, self.max_length)
        openvino_ir.save(model, file)
        return openvino_ir.weights_of(model)

    def _put_in_place(self, partial: Path, found: Verification) -> None:
        folder = self.path.parent
        if not found.passed:
            kept = self.path.with_name(f"{self.path.stem}.refused{self.path.suffix}")
            for source, target in zip(_files(partial / self.path.name), _files(kept), strict=True):
                if source.exists():
                    source.replace(target)
            raise RefusedError(
                f"the exported model differs from torch by {found.relative:.2g} of its largest number, {found.bound:g} "
                f"is allowed (--max-difference); it is kept as {kept}"
            )
        files = _files(self.path)
        exported_into_its_source = Path(self.model).expanduser().resolve() == folder
        for source in sorted(partial.iterdir()):
            there = folder / source.name
            if source.name not in {file.name for file in files} and not (exported_into_its_source and there.exists()):
                source.replace(there)
        for file in reversed(files):  # the artifact itself last
            if (partial / file.name).exists():
                (partial / file.name).replace(file)


def export(model: str | Path, out: str | Path, **settings) -> Artifact:
    """Export `model` to the file `out`; the settings are those of `Export`."""
    return Export(str(model), str(out), **settings).run()


def _files(path: Path) -> list[Path]:
    """The files of an artifact of that name, itself first."""
    return [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else []), manifest_path(path)]


def _output(served: ServedModel) -> str:
    return "sentence_embedding" if served.task == "sentence-embedding" else "logits"


def _described(config) -> dict:
    left_out = (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "_attn_implementation",
        "is_local",
        "local_files_only",
    )
    found = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in found.items() if name not in left_out}


def _digest(served: ServedModel) -> str:
    """Of config, pooling and weights: the same for the same model, wherever it was loaded from."""
    digest = hashlib.sha256(json.dumps([_described(served.config), asdict(served.pooling)], sort_keys=True).encode())
    for name, tensor in sorted(served.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _parameters(served: ServedModel, weights: list[tuple[str, int, int]]) -> dict[str, int]:
    """Numbers in the file, scales and indices included, and numbers that they stand for: those of the dense model."""
    effective = sum(each.numel() for each in served.model.parameters())
    for module in served.model.modules():
        if isinstance(module, SparseEmbedding):
            effective += module.num_embeddings * module.embedding_dim
            effective -= sum(each.numel() for each in module.parameters())
    return {"stored": sum(count for _, _, count in weights), "effective": effective}


def _manifest(export: Export, served: ServedModel, digest: str, artifact: Artifact, weights, found) -> Manifest:
    labels = [served.config.id2label[label] for label in range(served.config.num_labels)]
    width = served.config.hidden_size if served.task == "sentence-embedding" else len(labels)
    parts = {part: nbytes for part, (nbytes, _) in sizes_by_part(weights).items()}
    return Manifest(
        format=artifact.format,
        precision=export.precision,
        source=export.model if not Path(export.model).exists() else Path(export.model).resolve().name,
        source_digest=digest,
        task=served.task,
        labels=labels if served.task == "sequence-classification" else None,
        pooling=asdict(served.pooling) if served.task == "sentence-embedding" else None,
        inputs={name: ["batch", "length"] for name in served.inputs},
        outputs={_output(served): ["batch", width]},
        max_length=served.max_length,
        opset=onnx_graph.OPSET if export.to == "onnx" else None,
        verification={} if found is None else asdict(found),
        bytes=with_other(parts, artifact.nbytes),
        parameters=_parameters(served, weights),
        versions={name: importlib.metadata.version(name) for name in _packages(export)},
    )


def _packages(export: Export) -> tuple[str, ...]:
    extra = (*_NEEDS.get(export.to, ()), *(_INT8[export.to] if export.int8 else ()))
    return ("fastkd", "torch", "transformers", *extra, *(("executorch",) if export.to == "executorch" else ()))


def _show(manifest: Manifest, path: Path, runtime: str) -> None:
    found = manifest.verification
    table = Table(box=box.SIMPLE, title=f"{runtime} against torch")
    for column in ("batch", "length", "", "largest difference"):
        table.add_column(column, justify="right")
    for case in found["cases"]:
        table.add_row(str(case["batch"]), str(case["length"]), case["kind"], f"{case['difference']:.3g}")
    console = Console()
    console.print(table)
    console.print(
        f"largest difference {found['difference']:.3g}, {found['relative']:.2g} of the largest number; "
        f"{found['bound']:g} is allowed"
    )
    parts = ", ".join(f"{part} {nbytes / 1e6:,.2f}" for part, nbytes in manifest.bytes.items())
    console.print(
        f"{path}: {sum(manifest.bytes.values()) / 1e6:,.2f} MB ({parts}), {manifest.precision}", soft_wrap=True
    )
