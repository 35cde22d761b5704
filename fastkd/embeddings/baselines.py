"""What a sparse code is judged against: other ways to store an embedding table in fewer bytes. Whatever these return
has `nbytes` and `dense()`, like a `SparseCode`; those with a size to choose take the largest that fits a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.embeddings.code import SparseCode, decode_rows, encode_rows
from fastkd.embeddings.fit import FORMATS, check_table, fit, importance_of, index_dtype, rank_tokens
from fastkd.embeddings.residual import product_quantise
from fastkd.ops.sparse_arrays import Arrays


@dataclass(frozen=True, eq=False)
class StoredTable:
    """A table as some method stores it.

    Attributes:
        arrays: what is stored.
        table: (V, D) fp32, made of these arrays alone.
        size: what the method chose: kept rows, rank, bits.
    """

    arrays: tuple[Tensor, ...]
    table: Tensor
    size: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.table.to(dtype)


def rare_as_unknown(
    weight: Tensor,
    counts: Tensor,
    budget: int,
    *,
    unknown_id: int,
    special_ids: Iterable[int] = (),
    rows: str = "float32",
) -> StoredTable:
    """Special and frequent tokens keep their row, all others have that of `unknown_id`. `rows` as in `SparseCode.fit`.

    Raises ValueError as `SparseCode.fit` does, and where not even the special rows fit `budget`.
    """
    check_table(weight)
    vocabulary, width = weight.shape
    order, _ = rank_tokens(counts, vocabulary, 1.0, {unknown_id, *special_ids})
    order = order.to(weight.device)
    index = index_dtype(vocabulary)
    per_row = width * FORMATS[rows].itemsize + (4 if rows == "int8" else 0)
    num_kept = min(vocabulary, (budget - vocabulary * index.itemsize) // per_row)
    least = len({unknown_id, *special_ids})
    if num_kept < least:
        raise ValueError(_too_small(budget, least * per_row + vocabulary * index.itemsize))
    stored, scale = encode_rows(weight.detach()[order[:num_kept]], FORMATS[rows])
    slot = order.argsort()
    slot = torch.where(slot < num_kept, slot, slot[unknown_id])
    arrays = (slot.to(index), stored) if scale is None else (slot.to(index), stored, scale)
    return StoredTable(arrays, decode_rows(stored, scale)[slot], num_kept)


def low_rank(weight: Tensor, budget: int) -> StoredTable:
    """Truncated SVD, the best approximation of its rank: factors (V, r) and (r, D) in fp16."""
    check_table(weight)
    vocabulary, width = weight.shape
    rank = min(width, budget // (2 * (vocabulary + width)))
    if rank < 1:
        raise ValueError(_too_small(budget, 2 * (vocabulary + width)))
    exact = weight.detach().double()
    directions = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -rank:]  # right singular vectors, largest last
    left, right = (exact @ directions).half(), directions.T.half()
    return StoredTable((left, right), left.float() @ right.float(), rank)


def integer_rows(weight: Tensor, bits: int = 8) -> StoredTable:
    """Every row as integers of 8 or 4 bits and one scale, its largest number in fp32 (8 bits) or fp16 (4 bits)."""
    check_table(weight)
    if bits == 8:
        stored, scale = encode_rows(weight.detach().float(), torch.int8)
        return StoredTable((stored, scale), decode_rows(stored, scale), bits)
    if bits != 4 or weight.shape[1] % 2:
        raise ValueError(f"bits={bits} for a width of {weight.shape[1]}; allowed are 8, and 4 for an even width")
    exact = weight.detach().float()
    scale = (exact.abs().amax(1, keepdim=True) / 7).half()
    integers = (exact / torch.where(scale > 0, scale, 1).float()).round().clamp(-7, 7).to(torch.int8) + 8
    packed = (integers[:, ::2] | (integers[:, 1::2] << 4)).view(torch.uint8)
    unpacked = torch.stack((packed & 15, packed >> 4), 2).flatten(1).float() - 8
    return StoredTable((packed, scale), unpacked * scale.float(), bits)


def product_quantised(weight: Tensor, budget: int, counts: Tensor | None = None) -> SparseCode:
    """Product quantisation of all rows, with the most bytes a row that fit: a sparse code that keeps no row.

    counts: (V,), makes frequent rows count for more (`fit.importance_of`); by default all rows are equal.
    """
    check_table(weight)
    vocabulary, width = weight.shape
    index = index_dtype(vocabulary)
    fixed = 2 * 256 * width + vocabulary * index.itemsize
    fitting = [m for m in range(1, width + 1) if width % m == 0 and fixed + vocabulary * m <= budget]
    if not fitting:
        raise ValueError(_too_small(budget, fixed + vocabulary))
    importance = None if counts is None else importance_of(torch.as_tensor(counts))
    residual, codebook = product_quantise(weight.detach(), fitting[-1], importance)
    arrays = Arrays(
        slot=torch.arange(vocabulary, device=weight.device).to(index),
        kept=torch.empty(0, width, device=weight.device),
        kept_scale=None,
        atom_ids=torch.empty(vocabulary, 0, dtype=torch.uint16, device=weight.device),
        atom_weights=torch.empty(vocabulary, 0, dtype=torch.float16, device=weight.device),
        weight_scale=None,
        residual=residual,
        codebook=codebook,
    )
    return SparseCode(arrays)


def random_neighbours(
    weight: Tensor,
    counts: Tensor,
    keep: float = 0.1,
    atoms: int = 8,
    *,
    special_ids: Iterable[int] = (),
    rows: str = "float32",
    weights: str = "float16",
) -> SparseCode:
    """`SparseCode.fit` with kept rows drawn at random in the place of the nearest; the same draw every time."""
    return fit(weight, counts, keep, atoms, special_ids, rows, weights, 0, None, None, 1e-3, search=_Drawn)


class _Drawn:
    def __init__(self, candidates: Tensor):
        self.number = len(candidates)
        self.generator = torch.Generator().manual_seed(0)

    def nearest(self, x: Tensor, k: int) -> Tensor:
        """(N, D) -> (N, k) different candidates."""
        return torch.rand(len(x), self.number, generator=self.generator).topk(k).indices.to(x.device)


def _too_small(budget: int, least: int) -> str:
    return f"budget={budget} bytes; the least for this table is {least}"
