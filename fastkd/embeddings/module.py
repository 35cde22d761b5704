"""An embedding layer over a sparse code: what stands in a compressed model in place of its `nn.Embedding`."""

from functools import partial

import torch
from torch import Tensor, nn

from fastkd.embeddings.code import SparseCode, check_arrays, decode_rows, encode_rows
from fastkd.ops.sparse_arrays import Arrays, HasArrays, check_layout
from fastkd.ops.sparse_embedding import sparse_embedding

_TRAINED = ("kept", "atom_weights")

# The kept rows go by the name an nn.Embedding has for its table: a program that does not know fastkd then fails on the
# table's shape, where a missing table would only be warned about and drawn at random.
STATE_NAMES = {array: "weight" if array == "kept" else array for array in Arrays._fields}


class SparseEmbedding(nn.Module):
    """Looks ids up in a sparse code; takes the place of an `nn.Embedding` of V tokens and width D.

    ids: (...) int32 or int64 -> (..., D) of `dtype`. Raises IndexError for an id outside [0, V) on a CPU.

    Args:
        code: `fastkd.SparseCode`, or its `Arrays`.
        padding_idx: a token that takes no part in training, as in `nn.Embedding`.
        dtype: of the output; `.half()`, `.to(torch.bfloat16)` and the like change it, and leave the stored formats.
        trainable: whether kept rows and atom weights are parameters (see the attribute). Which atoms a token has stays
            as it is.

    The state dict holds the code in its stored formats, trainable or not: `weight` (the kept rows), `kept_scale`,
    `slot`, `atom_ids`, `atom_weights`, `weight_scale`, `residual`, `codebook`, those that the code has. Loading checks
    all of them before any is taken over.

    The arrays are not copied. Raises ValueError or TypeError where they do not fit together.
    """

    def __init__(
        self,
        code: HasArrays | Arrays,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        trainable: bool = False,
    ):
        super().__init__()
        arrays = code if isinstance(code, Arrays) else getattr(code, "arrays", None)
        if arrays is None:
            raise TypeError(
                f"code is a {type(code).__name__}; a fastkd.SparseCode is needed, such as SparseCode.fit gives"
            )
        check_layout(arrays)
        self.num_embeddings, self.embedding_dim = len(arrays.slot), arrays.kept.shape[1]
        if padding_idx is not None and not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise ValueError(f"padding_idx={padding_idx} is outside the {self.num_embeddings} tokens of the code")
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % self.num_embeddings
        self.dtype = dtype
        for field, array in arrays._asdict().items():
            self.register_buffer(STATE_NAMES[field], array)
        self._formats = arrays.kept.dtype, arrays.atom_weights.dtype, getattr(arrays.weight_scale, "dtype", None)
        self.trainable = trainable

    @property
    def arrays(self) -> Arrays:
        """What the lookup reads; the parameters themselves where it is trainable."""
        # nn.Module's own attribute lookup costs a short call as much as the rows do. Wrappers such as FSDP and
        # parametrisations keep what they replace elsewhere, where only getattr finds it.
        held = {**self._buffers, **self._parameters}
        arrays = Arrays(*[held[name] if name in held else getattr(self, name) for name in STATE_NAMES.values()])
        if arrays.atom_weights.dtype == torch.bfloat16:  # no stored format: the parameters of a bf16 model
            return arrays._replace(atom_weights=arrays.atom_weights.float())
        return arrays

    @property
    def code(self) -> SparseCode:
        """The code in its stored formats, sharing memory with this layer where it is not trainable."""
        return SparseCode(self._stored())

    @property
    def trainable(self) -> bool:
        """Whether kept rows and atom weights are parameters of `dtype`; otherwise all arrays are buffers.

        Set it before the optimizer is made: `model.get_input_embeddings().trainable = True`. Saving rounds the
        parameters to the stored formats.
        """
        return isinstance(self.weight, nn.Parameter)

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        if trainable == self.trainable:
            return
        new = self._decoded(self.arrays) if trainable else self._stored()
        for field, array in new._asdict().items():
            delattr(self, STATE_NAMES[field])
            if trainable and field in _TRAINED:
                self.register_parameter(STATE_NAMES[field], nn.Parameter(array.clone()))  # fp32 rows are the code's own
            else:
                self.register_buffer(STATE_NAMES[field], array)

    def forward(self, ids: Tensor) -> Tensor:
        return sparse_embedding(ids, self, dtype=self.dtype, padding_idx=self.padding_idx)

    @torch.no_grad()
    def _stored(self) -> Arrays:
        """The arrays in their stored formats."""
        if not self.trainable:
            return self.arrays
        rows_format, weights_format, scale_format = self._formats
        kept, kept_scale = encode_rows(self.weight, rows_format)
        weights, weight_scale = encode_rows(self.atom_weights, weights_format, scale_format)
        return self.arrays._replace(kept=kept, kept_scale=kept_scale, atom_weights=weights, weight_scale=weight_scale)

    def _stored_layout(self) -> Arrays:
        """Arrays without content of the shapes and formats that are stored."""
        arrays, (rows_format, weights_format, scale_format) = self.arrays, self._formats
        empty = partial(torch.empty, device="meta")
        return arrays._replace(
            kept=empty(arrays.kept.shape, dtype=rows_format),
            kept_scale=empty(len(arrays.kept), dtype=torch.float32) if rows_format == torch.int8 else None,
            atom_weights=empty(arrays.atom_weights.shape, dtype=weights_format),
            weight_scale=None if scale_format is None else empty(len(arrays.atom_weights), dtype=scale_format),
        )

    def _decoded(self, stored: Arrays) -> Arrays:
        """Stored arrays with kept rows and atom weights as the numbers they stand for, in `dtype`."""
        return stored._replace(
            kept=decode_rows(stored.kept, stored.kept_scale).to(self.dtype),
            kept_scale=None,
            atom_weights=decode_rows(stored.atom_weights, stored.weight_scale).to(self.dtype),
            weight_scale=None,
        )

    def _apply(self, fn, recurse=True):
        # Formats are part of the code: a change of dtype concerns what comes out, and parameters.
        buffers = {id(buffer) for buffer in self.buffers(recurse=False)}

        def keeping_formats(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in buffers and moved.dtype != tensor.dtype else moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keeping_formats, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for field, array in self._stored()._asdict().items():
            if array is not None:
                destination[prefix + STATE_NAMES[field]] = array if keep_vars else array.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        given = Arrays(*(state_dict.get(prefix + name) for name in STATE_NAMES.values()))
        expected = self._stored_layout()
        if all(array is None for array in given):
            absent = [STATE_NAMES[field] for field, array in expected._asdict().items() if array is not None]
            missing_keys.extend(prefix + name for name in absent)
            return
        try:
            for field, array, own in zip(Arrays._fields, given, expected, strict=True):
                if _layout(array) != _layout(own):
                    raise ValueError(f"{STATE_NAMES[field]} is {_layout(array)}, this layer's is {_layout(own)}")
            check_arrays(given)
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.') or 'code'}: {error}")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        with torch.no_grad():
            for field, array in (self._decoded(given) if self.trainable else given)._asdict().items():
                name = STATE_NAMES[field]
                if array is not None and assign:
                    setattr(self, name, nn.Parameter(array.clone()) if name in self._parameters else array)
                elif array is not None:
                    getattr(self, name).copy_(array)

    def extra_repr(self) -> str:
        arrays, padding = self.arrays, "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, kept={len(arrays.kept)} x {self._formats[0]}, "
            f"atoms={arrays.atom_ids.shape[1]} x {self._formats[1]}, trainable={self.trainable}"
        )


def _layout(array: Tensor | None) -> str:
    return "absent" if array is None else f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"
