"""Embedding lookups in operators that every runtime has, for exported graphs alone; the formula of the sparse code
stands in `fastkd/ops/sparse_embedding.py`.

What is read per token is one row of k atoms and one of k weights, whether the token is coded or not: a kept one is its
own row once, with weight 1. So a lookup is three Gathers and one small batched MatMul, where multiplying and summing
takes longer in onnxruntime, and a branch by the kind of token adds nine operators. A file that held these V rows of
atoms would be larger than the code; `at_load` has them written as a computation on constants, which a runtime that
folds constants does once, while it loads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.embeddings.code import encode_rows
from fastkd.embeddings.module import SparseEmbedding
from fastkd.ops.sparse_arrays import Arrays

_WORTH_ROUNDING = 4096  # numbers: what smaller tables would save, the graph takes up


class RowLookup(nn.Module):
    """ids (B, L) int64 -> (B, L, D) fp32, read in a table whose int8 rows have one scale each.

    at_load: the table is scaled as a whole when the runtime loads it, otherwise row by row as it is read.
    """

    def __init__(self, table: Tensor, scale: Tensor | None, at_load: bool):
        super().__init__()
        self.at_load = at_load
        self.register_buffer("table", table)
        self.register_buffer("scale", None if scale is None else scale[:, None])

    def forward(self, ids: Tensor) -> Tensor:
        if self.scale is None:
            return F.embedding(ids, self.table.float()) if self.at_load else F.embedding(ids, self.table).float()
        if self.at_load:
            return F.embedding(ids, self.table.float() * self.scale.float())
        return F.embedding(ids, self.table).float() * F.embedding(ids, self.scale).float()


class SparseLookup(nn.Module):
    """ids (B, L) int64 -> (B, L, D) fp32, as `SparseEmbedding` gives them, for every stored format.

    arrays: of the code. at_load: keep them as they are and lay them out by token when the runtime loads them;
    otherwise the layout by token is what is kept, in the narrowest formats that hold it.
    """

    def __init__(self, arrays: Arrays, at_load: bool):
        super().__init__()
        self.at_load = at_load
        self.has_atoms, self.has_residual = len(arrays.kept) > 0, arrays.residual is not None
        if self.has_atoms:
            self.kept = RowLookup(arrays.kept, arrays.kept_scale, at_load)
        if self.has_residual:
            parts, centroids, width = arrays.codebook.shape
            self.codebook = RowLookup(arrays.codebook.reshape(parts * centroids, width), None, at_load)
            self.register_buffer("first", centroids * torch.arange(parts, dtype=torch.int32))
        self.num_kept = len(arrays.kept)
        if at_load:
            for name in ("slot", "atom_ids", "atom_weights", "weight_scale", "residual"):
                self.register_buffer(name, getattr(arrays, name))
            return
        atoms, weights, coded, residual = _by_token(arrays, self.num_kept)
        narrow = torch.int16 if self.num_kept <= torch.iinfo(torch.int16).max else torch.int32
        self.register_buffer("atoms", atoms.to(narrow))
        exact = bool((weights.half().float() == weights).all())
        self.register_buffer("weights", weights.half() if exact else weights)
        self.register_buffer("coded", coded.half())
        self.register_buffer("residual", residual)

    def forward(self, ids: Tensor) -> Tensor:
        atoms, weights, coded, residual = _by_token(self, self.num_kept) if self.at_load else self._laid_out()
        found = []
        if self.has_atoms:
            rows = self.kept(F.embedding(ids, atoms).to(torch.int32))
            found.append((F.embedding(ids, weights).float().unsqueeze(2) @ rows).squeeze(2))
        if self.has_residual:
            codes = F.embedding(ids, residual).to(torch.int32) + self.first
            found.append(self.codebook(codes).flatten(2) * F.embedding(ids, coded).float())
        return sum(found[1:], found[0])

    def _laid_out(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.atoms, self.weights, self.coded, self.residual


def _by_token(code: Arrays | SparseLookup, num_kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Atoms (V, k) int32, their weights (V, k) fp32, whether a token is coded (V, 1) fp32, and its residual (V, m)."""
    place = code.slot.to(torch.int32)
    kept = (place < num_kept)[:, None]
    coded = (~kept).float()
    (rows, k) = code.atom_ids.shape
    if rows == 0 or k == 0:  # kept rows alone, or product quantisation of all others
        atoms, weights = torch.where(kept, place[:, None], 0), kept.float()
    else:
        row = (place - num_kept).clamp(min=0)
        weights = code.atom_weights.float()
        if code.weight_scale is not None:
            weights = weights * code.weight_scale.float()[:, None]
        once = F.one_hot(torch.zeros(1, dtype=torch.int64), k).float()
        atoms = torch.where(kept, place[:, None], code.atom_ids.to(torch.int32).index_select(0, row))
        weights = torch.where(kept, once, weights.index_select(0, row))
    residual = code.residual
    if residual is not None:
        residual = residual.index_select(0, (place - num_kept).clamp(min=0))
    return atoms, weights, coded, residual


def use_lookups(model: nn.Module, *, int8: bool, at_load: bool) -> None:
    """Put the lookups above in the place of every `SparseEmbedding` of `model` and, for int8, of its dense tables.

    A dense input table is scaled row by row as it is read, so that it stays int8 in memory; of the small ones all rows
    are scaled at once.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseEmbedding):
            arrays = module.code.arrays
            if int8:
                kept, scale = encode_rows(_numbers(arrays.kept, arrays.kept_scale), torch.int8)
                arrays = arrays._replace(kept=kept, kept_scale=scale)
            lookup = SparseLookup(arrays, at_load)
        elif int8 and type(module) is nn.Embedding and module.weight.numel() >= _WORTH_ROUNDING:
            lookup = RowLookup(*encode_rows(module.weight.detach(), torch.int8), at_load and "position" in name)
        else:
            continue
        model.set_submodule(name, lookup)


def _numbers(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows.float() if scale is None else rows.float() * scale[:, None]
