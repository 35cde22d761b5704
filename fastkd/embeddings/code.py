"""A sparse-coded embedding table: its arrays, what they stand for, how many bytes they are, and the file they go to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd.ops.sparse_arrays import Arrays, check_layout
from fastkd.ops.sparse_embedding import sparse_embedding
from fastkd.whole_file import whole_file

_OPTIONAL = ("kept_scale", "weight_scale", "residual", "codebook")
_ROWS_AT_ONCE = 4096  # of a table that is decoded: the eager lookup gathers every atom of every row


@dataclass(frozen=True, eq=False)
class SparseCode:
    """A table of V rows of width D as M kept rows and R = V - M coded ones; the formula stands in
    `fastkd/ops/sparse_embedding.py`.

    Attributes:
        arrays: what a lookup reads, with shapes and dtypes as `Arrays` says.
        error: (R,) fp32, ‖row - coded row‖ / ‖row‖ of every coded row, in the order of `arrays.atom_ids`; None unless
            it comes from a fit. (A row of zeros has no relative error; the mean norm of the table stands in.) It is
            not part of the file, nor of `nbytes`.
    """

    arrays: Arrays
    error: Tensor | None = None

    @staticmethod
    def fit(
        weight: Tensor,
        counts: Tensor,
        keep: float = 0.1,
        atoms: int = 8,
        *,
        special_ids: Iterable[int] = (),
        rows: Literal["float32", "float16", "int8"] = "float32",
        weights: Literal["float32", "float16", "int8"] = "float16",
        residual_bytes: int = 0,
        mean_atoms: float | None = None,
        types: Tensor | None = None,
        ridge: float = 1e-3,
    ) -> SparseCode:
        """Code an embedding table (Tamura, Yoshinaga and Neishi, CoNLL 2024): special and frequent tokens keep their
        row, every other row becomes a linear combination of the `atoms` kept rows nearest to it by cosine. The solve
        stands in `fastkd/embeddings/fit.py`. Runs where `weight` is; the result is there too.

        Args:
            weight: (V, D) floating point, finite.
            counts: (V,) how often each token occurs (`fastkd.embeddings.count_tokens`), integer or floating, >= 0.
            keep: M = floor(keep * V) rows are kept, special ones included: those of `special_ids`, then the most
                frequent ones, of equal counts the smaller id. Rounded down, so that the code is never larger than
                asked.
            atoms: k, kept rows per coded row; 0 (with `residual_bytes`) quantises the coded rows as they are.
            special_ids: tokens that keep their row whatever their count (`tokenizer.all_special_ids`), or a tensor.
            rows: format of kept rows; int8 has one fp32 scale per row. The solve runs against the rows as stored.
            weights: format of the k weights; int8 has one fp16 scale per row. They sum to one after rounding as well.
            residual_bytes: m > 0 adds to each coded row what the atoms leave of it, product-quantised to m bytes
                (`fastkd/embeddings/residual.py`; beyond the paper), with centroids that frequent rows pull harder.
                Must divide D.
            mean_atoms: shares R * mean_atoms atoms among the coded rows by their counts, `atoms` at most and one at
                least; what a row lacks are zero weights. This spares no bytes: every row has room for `atoms`.
            types: (V,) integer or boolean; a coded row then takes atoms of its own type only, e.g. word pieces among
                word pieces (`fastkd.embeddings.continuations`).
            ridge: lambda of the solve, relative to the mean squared distance of the atoms.

        Raises TypeError before any work on an argument of another type, and ValueError on: a `weight` that is no finite
        matrix, counts of another length, below zero or infinite, `keep` outside (0, 1], fewer kept rows than special
        ones or than `atoms` (of each type), more atoms than the table is wide, a special id outside the table, an
        unknown format, a `residual_bytes` that does not divide D, a `mean_atoms` outside [1, atoms]; and on values too
        large for fp16 where that is the format.
        """
        from fastkd.embeddings.fit import fit  # which imports this file

        return fit(weight, counts, keep, atoms, special_ids, rows, weights, residual_bytes, mean_atoms, types, ridge)

    @property
    def num_embeddings(self) -> int:
        """V, the tokens."""
        return len(self.arrays.slot)

    @property
    def embedding_dim(self) -> int:
        """D, the width."""
        return self.arrays.kept.shape[1]

    @property
    def num_kept(self) -> int:
        """M, the rows stored whole."""
        return len(self.arrays.kept)

    @property
    def num_atoms(self) -> int:
        """k, the kept rows that every other row is made of."""
        return self.arrays.atom_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the file is some hundred bytes larger."""
        return sum(array.nbytes for array in self.arrays if array is not None)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(V, D): the table that this code stands for."""
        ids = torch.arange(self.num_embeddings, device=self.arrays.slot.device)
        table = torch.empty(self.num_embeddings, self.embedding_dim, dtype=dtype, device=ids.device)
        with torch.no_grad():
            for part, rows in zip(ids.split(_ROWS_AT_ONCE), table.split(_ROWS_AT_ONCE), strict=True):
                rows.copy_(sparse_embedding(part, self, dtype=dtype))
        return table

    def to(self, device: torch.device | str) -> SparseCode:
        """This code on another device."""
        arrays = Arrays(*(None if array is None else array.to(device) for array in self.arrays))
        return SparseCode(arrays, None if self.error is None else self.error.to(device))

    def validate(self) -> None:
        """Raise the ValueError of `check_arrays`, if any."""
        check_arrays(self.arrays)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with the arrays under their names; a file of that name is replaced once the new one
        is complete. Raises ValueError, before anything is written, where the arrays do not fit together, and where
        `path` is a folder or lies in one that does not exist."""
        self.validate()
        if Path(path).is_dir():
            raise ValueError(f"path={path} is a folder; name a file")
        if not Path(path).parent.is_dir():
            raise ValueError(f"path={path}: there is no folder {Path(path).parent}")
        tensors = {
            name: array.detach().cpu().contiguous()
            for name, array in self.arrays._asdict().items()
            if array is not None
        }
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "fastkd.sparse_code"})

    @staticmethod
    def load(path: str | os.PathLike) -> SparseCode:
        """Read what `save` has written, everything checked before use.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no safetensors file, a truncated one, one that holds something else, or arrays that do not fit
                together.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file, or not all of one: {error}") from error
        missing = [name for name in Arrays._fields if name not in tensors and name not in _OPTIONAL]
        unknown = [name for name in tensors if name not in Arrays._fields]
        if missing or unknown:
            raise ValueError(
                f"{path} holds no sparse code: it lacks {_listed(missing)} and has {_listed(unknown)} besides; the "
                f"arrays of one are {_listed(Arrays._fields)}, of which {_listed(_OPTIONAL)} may be absent"
            )
        code = SparseCode(Arrays(*(tensors.get(name) for name in Arrays._fields)))
        try:
            code.validate()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return code


def encode_rows(
    values: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype | None = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """(N, n) floating -> stored rows of `dtype`; for int8 also their (N,) scales, max |row| / 127 in `scale_dtype`.

    Raises ValueError where a finite value has no finite one in `dtype`.
    """
    if dtype != torch.int8:
        stored = values.to(dtype)
        if not stored.isfinite().all():
            raise ValueError(f"{_name(dtype)} cannot hold values up to {values.abs().max():.4g}; float32 and int8 can")
        return stored, None
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    scale = (values.abs().amax(1) / 127).to(scale_dtype)
    scale = torch.where(scale > 0, scale, 1)  # a row of zeros
    stored = (values / scale.to(values.dtype)[:, None]).round().clamp(-127, 127)
    return stored.to(torch.int8), scale


def decode_rows(stored: Tensor, scale: Tensor | None) -> Tensor:
    """What `encode_rows` has stored, as fp32 (fp64 where it is stored in fp64)."""
    values = stored if stored.dtype == torch.float64 else stored.float()
    return values if scale is None else values * scale.to(values.dtype)[:, None]


def check_arrays(arrays: Arrays) -> None:
    """Raise a ValueError that names the first array whose dtype, shape or content does not fit the others: an index
    out of range, a value that is not finite, a scale without int8 rows, a residual without its codebook."""
    try:
        check_layout(arrays)
    except TypeError as error:
        raise ValueError(str(error)) from error
    vocabulary, (kept, width) = len(arrays.slot), arrays.kept.shape
    if not vocabulary or not width:
        raise ValueError(f"kept has shape {(kept, width)} in a table of {vocabulary} tokens; neither may be empty")
    if not arrays.atom_ids.shape[1] and len(arrays.atom_ids) and arrays.residual is None:
        raise ValueError("atom_ids has no atoms per row, and there is no residual either: coded rows would be empty")
    _check_indices("slot", arrays.slot, vocabulary, "the table has as many rows")
    _check_indices("atom_ids", arrays.atom_ids, kept, "so many rows are kept")
    for name in ("kept", "kept_scale", "atom_weights", "weight_scale", "codebook"):
        array = getattr(arrays, name)
        if array is not None and array.is_floating_point() and not array.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")


def _check_indices(name: str, indices: Tensor, bound: int, why: str) -> None:
    if not indices.numel():
        return
    low, high = (int(extreme) for extreme in indices.to(torch.int32).aminmax())
    if low < 0 or high >= bound:
        raise ValueError(f"{name} holds {low if low < 0 else high}; it must lie in [0, {bound}), {why}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
