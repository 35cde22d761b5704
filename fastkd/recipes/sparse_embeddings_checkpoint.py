"""The weights of a checkpoint as they lie on disk: which files hold them, in which format, and how to keep to it.

A checkpoint is often stored in fp16 or bf16 while its config.json says float32: transformers then computes in fp32 with
numbers that sixteen bits hold. A copy saved by `save_pretrained` alone would take twice the bytes for the same numbers.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from fastkd.embeddings.module import SparseEmbedding


def weight_files(model: str | Path) -> list[Path]:
    """The files that `from_pretrained` reads a model's weights from, all shards; none where it finds them elsewhere."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = _found(model, name)
        if file is not None and file.suffix == ".json":
            return [_found(model, shard) for shard in sorted(set(json.loads(file.read_text())["weight_map"].values()))]
        if file is not None:
            return [file]
    return []


def bytes_on_disk(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """The format of most of the floating numbers in these files, those of a sparse code aside; None without any."""
    tensors = {name: tensor for file in files for name, tensor in load_state_dict(file, map_location="meta").items()}
    codes = tuple(name.removesuffix("slot") for name in tensors if name.endswith(".slot"))
    numbers = Counter()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.startswith(codes):
            numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else None


def narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype` where that is narrower and holds every number of it exactly; itself otherwise."""
    if dtype is None or not tensor.is_floating_point() or dtype.itemsize >= tensor.dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def narrow(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Bring every tensor of the model but its sparse code to `narrowed`, in place."""
    code = model.get_input_embeddings()
    kept = {id(array) for array in code.buffers()} if isinstance(code, SparseEmbedding) else set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in kept:
            tensor.data = narrowed(tensor.data, dtype)
    return model


def round_table(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Round the input embedding to what `dtype` holds, unless a number would overflow."""
    table = model.get_input_embeddings().weight
    if dtype is not None and table.detach().to(dtype).isfinite().all():
        table.data = table.data.to(dtype).to(table.dtype)


def save_narrowed(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> int:
    """Save a model that went through `narrow`; it is loaded in `dtype` as ever. Returns the bytes of its files."""
    model.save_pretrained(folder)
    model.config.dtype = dtype  # save_pretrained has put that of the first tensor
    model.config.save_pretrained(folder)
    return bytes_on_disk(weight_files(folder))


def copy_sentence_files(model: str | Path, folder: Path) -> None:
    """Copy what makes a sentence-transformers model of an encoder: modules.json, its settings, and the files of every
    module but the encoder itself, such as those of the pooling. Nothing where the model has no modules.json.

    Raises ValueError for a model on the hub with a module whose files are not known.
    """
    listed = _found(model, "modules.json")
    if listed is None:
        return
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
    for module in json.loads(listed.read_text(encoding="utf-8")):
        path = module["path"]
        if not path:
            continue
        if Path(model).is_dir():
            names += [str(file.relative_to(model)) for file in sorted(Path(model, path).rglob("*")) if file.is_file()]
        elif module["type"].endswith((".Pooling", ".Normalize")):
            names.append(f"{path}/config.json")
        else:
            raise ValueError(f"model={model}: download it first; modules.json names a {module['type']} in {path}")
    for name in names:
        file = _found(model, name)
        if file is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def _found(model: str | Path, name: str) -> Path | None:
    missing_is_fine = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(model, name, **missing_is_fine)
    return None if path is None else Path(path)
