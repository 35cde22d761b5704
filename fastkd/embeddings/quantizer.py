"""Compressed models for transformers: `from_pretrained`, `save_pretrained`, `Trainer`, `pipeline` and `push_to_hub`
take them like any other, because to transformers a sparse-coded embedding is one more quantization method.

The checkpoint holds the code under the embedding's name (see `SparseEmbedding`), and `quantization_config` in
config.json what must be known to make room for it. This file is imported while transformers is (see `registration.py`),
so it may not import its models.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastkd.embeddings.code import check_arrays
from fastkd.embeddings.input_embedding import input_embedding
from fastkd.embeddings.module import STATE_NAMES, SparseEmbedding
from fastkd.ops.sparse_arrays import Arrays

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "sparse_embedding"
_ALLOWED = {
    "rows": ("float32", "float16", "bfloat16", "int8"),
    "weights": ("float32", "float16", "int8"),
    "weight_scale": (None, "float32", "float16"),
    "codebook": (None, "float32", "float16"),
}


@register_quantization_config(METHOD)
@dataclass(kw_only=True)
class SparseEmbeddingConfig(QuantizationConfigMixin):
    """What config.json says about the code beside the vocabulary size and the width, which the model's own fields give.

    num_kept: rows stored whole (M).
    num_atoms: atoms of each other row (k).
    rows, weights: formats of kept rows and of atom weights.
    weight_scale: format of the weights' scales, for int8 weights only.
    residual_bytes: bytes per coded row of a quantised residual (m), with `codebook`, the format of its codebook.
    """

    quant_method: str = METHOD
    num_kept: int
    num_atoms: int
    rows: str
    weights: str
    weight_scale: str | None = None
    residual_bytes: int = 0
    codebook: str | None = None

    def __post_init__(self):
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"quantization_config: {name}={getattr(self, name)!r}; allowed are {', '.join(map(str, allowed))}"
                )
        for name in ("num_kept", "num_atoms", "residual_bytes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"quantization_config: {name}={getattr(self, name)!r}; a whole number is needed")
        for name, given, of, needed in (
            ("weight_scale", self.weight_scale, "weights", self.weights == "int8"),
            ("codebook", self.codebook, "residual_bytes", self.residual_bytes > 0),
        ):
            if (given is not None) != needed:
                raise ValueError(f"quantization_config: {name}={given!r} where {of}={getattr(self, of)!r}")

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        names = {field.name for field in fields(cls)}
        needed = {"num_kept", "num_atoms", "rows", "weights"}
        wrong = sorted(needed - config_dict.keys() | config_dict.keys() - names)
        if wrong:
            raise ValueError(
                f"quantization_config of this model: {', '.join(wrong)} is missing or not known; it was made by "
                "another version of fastkd, or changed since"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @classmethod
    def of(cls, arrays: Arrays) -> SparseEmbeddingConfig:
        """The entry that describes these arrays."""
        return cls(
            num_kept=len(arrays.kept),
            num_atoms=arrays.atom_ids.shape[1],
            rows=_name(arrays.kept),
            weights=_name(arrays.atom_weights),
            weight_scale=_name(arrays.weight_scale),
            residual_bytes=0 if arrays.residual is None else arrays.residual.shape[1],
            codebook=_name(arrays.codebook),
        )

    def room_for(self, num_embeddings: int, width: int) -> Arrays:
        """Uninitialised arrays of the shapes and formats described, on the default device; indices in int32, because
        transformers casts what is floating and takes integers over as the checkpoint has them."""
        coded, sub_vectors = num_embeddings - self.num_kept, self.residual_bytes
        if coded < 0 or (sub_vectors and width % sub_vectors):
            raise ValueError(
                f"quantization_config: num_kept={self.num_kept} and residual_bytes={sub_vectors} do not fit a table of "
                f"{num_embeddings} tokens and width {width}"
            )
        formats = {name: getattr(torch, getattr(self, name) or "float32") for name in _ALLOWED}
        empty = {name: partial(torch.empty, dtype=dtype) for name, dtype in formats.items()}
        indices = partial(torch.empty, dtype=torch.int32)
        return Arrays(
            slot=indices(num_embeddings),
            kept=empty["rows"](self.num_kept, width),
            kept_scale=torch.empty(self.num_kept, dtype=torch.float32) if self.rows == "int8" else None,
            atom_ids=indices(coded, self.num_atoms),
            atom_weights=empty["weights"](coded, self.num_atoms),
            weight_scale=empty["weight_scale"](coded) if self.weight_scale else None,
            residual=torch.empty(coded, sub_vectors, dtype=torch.uint8) if sub_vectors else None,
            codebook=empty["codebook"](sub_vectors, 256, width // sub_vectors) if sub_vectors else None,
        )


@register_quantizer(METHOD)
class SparseEmbeddingQuantizer(HfQuantizer):
    """Puts a `SparseEmbedding` in the place of the input embedding before a checkpoint is loaded, checks what was
    loaded, and takes it out again where a dense model is asked for."""

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "a model is not compressed while it is loaded: load it as it is, then "
                "fastkd.embeddings.compress_embeddings(model, code), or use `fastkd compress-embeddings`"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **kwargs) -> None:
        dense = input_embedding(model)
        room = self.quantization_config.room_for(dense.num_embeddings, dense.embedding_dim)
        _check_stored(room, checkpoint_files or [], _source(model))
        sparse = SparseEmbedding(room, padding_idx=dense.padding_idx, dtype=dense.weight.dtype)
        model.set_input_embeddings(sparse)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        embedding = model.get_input_embeddings()
        # transformers marks every tensor that it has read, and only warns about those that it has not.
        if embedding.weight.is_meta:
            raise ValueError(
                f"{_source(model)}: the coded input embedding cannot be checked where offload_buffers leaves it on disk"
            )
        missing = [name for name, array in embedding.named_buffers() if not getattr(array, "_is_hf_initialized", False)]
        if missing:
            raise ValueError(f"{_source(model)} lacks {', '.join(missing)} of the coded input embedding")
        try:
            check_arrays(embedding.arrays)
        except ValueError as error:
            raise ValueError(f"{_source(model)}, coded input embedding: {error}") from error
        mark_as_compressed(model, self)

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, SparseEmbedding):
            raise ValueError(
                f"the input embedding of this compressed {type(model).__name__} was replaced by a "
                f"{type(embedding).__name__}; to make it dense use fastkd.embeddings.densify(model)"
            )
        if len(embedding.arrays.kept) == embedding.num_embeddings:
            raise ValueError(
                "all rows are kept and none is coded: a program without fastkd would take the stored rows for a dense "
                "table, whatever their order and format. Keep fewer rows, or save the model uncompressed"
            )
        return super().get_state_dict_and_metadata(model)

    def _dequantize(self, model: PreTrainedModel, dtype=None) -> PreTrainedModel:
        # Not `dtype`, which is what config.json says: the rest of the model may have been cast since.
        model.set_input_embeddings(dense_embedding(model.get_input_embeddings()))
        return unmark(model)


def mark_as_compressed(model: PreTrainedModel, quantizer: SparseEmbeddingQuantizer) -> PreTrainedModel:
    """Set what transformers looks at in a quantized model, once its `SparseEmbedding` is in place."""
    model.hf_quantizer = quantizer
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config
    # transformers refuses .half() and .float() where this is true; here only the embedding has formats of its own.
    model.is_quantized = False
    for part in _models_in(model):
        part.resize_token_embeddings = _refuse_to_resize
        # DistributedDataParallel broadcasts buffers, and neither gloo nor NCCL knows uint16. They never change.
        part._ddp_params_and_buffers_to_ignore = [
            f"{name}.{indices}"
            for name, module in part.named_modules()
            if isinstance(module, SparseEmbedding)
            for indices in ("slot", "atom_ids")
        ]
    return model


def unmark(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `mark_as_compressed`, once a dense embedding is in place again."""
    model.hf_quantizer.remove_quantization_config(model)
    for part in _models_in(model):
        del part.resize_token_embeddings, part._ddp_params_and_buffers_to_ignore
    return model


def dense_embedding(embedding: SparseEmbedding) -> nn.Embedding:
    """The ordinary embedding that looks up the same rows, as a parameter of the dtype that was looked up."""
    table = embedding.code.dense(embedding.dtype)
    return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=embedding.padding_idx)


def _models_in(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and its base model."""
    return [module for module in model.modules() if hasattr(type(module), "resize_token_embeddings")]


def _refuse_to_resize(*args, **kwargs):
    raise ValueError(
        "resize_token_embeddings: the input embedding is sparse-coded and has no place for other tokens; resize "
        "fastkd.embeddings.densify(model), and compress that again"
    )


def _check_stored(room: Arrays, files: list[str], source: str) -> None:
    """Raise a ValueError where a file holds a coded array in another shape or format than config.json says:
    transformers would cast it to the format of the room that was made for it, and say nothing."""
    from transformers.modeling_utils import load_state_dict  # not there yet when this file is imported

    headers = {}
    for file in files:
        try:
            headers |= {name: (file, array) for name, array in load_state_dict(file, map_location="meta").items()}
        except SafetensorError as error:
            raise ValueError(
                f"{source}: {Path(file).name} is no safetensors file, or not all of one: {error}"
            ) from error
    code = next((name.removesuffix("slot") for name in headers if name.endswith(".slot")), None)
    for field, wanted in room._asdict().items():
        name = STATE_NAMES[field]
        file, stored = headers.get(f"{code}{name}", (None, None))
        if wanted is None or stored is None:
            continue
        formats = ["uint16", "int32"] if wanted.dtype == torch.int32 else [_name(wanted)]
        if stored.shape != wanted.shape or _name(stored) not in formats:
            raise ValueError(
                f"{source}: by config.json {name} of the coded input embedding is {tuple(wanted.shape)} "
                f"{' or '.join(formats)}; {Path(file).name} holds {tuple(stored.shape)} {_name(stored)}"
            )


def _source(model: PreTrainedModel) -> str:
    return model.config.name_or_path or type(model).__name__


def _name(array: Tensor | None) -> str | None:
    return None if array is None else str(array.dtype).removeprefix("torch.")
