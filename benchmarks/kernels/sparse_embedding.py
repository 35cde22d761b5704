"""sparse_embedding: lookup, lookup with gradient, and embedding block, against dense and eager forms of the same table.

Every provider gets the same ids: common tokens Zipf(1) over the kept rows, rare ones uniform over the coded rows. The
dense table holds what the code decodes to, and is larger than the last-level cache of most CPUs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.benchmarks.harness import Case, Provider
from fastkd.ops import backends, sparse_embedding
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import eager_embedding_block, eager_sparse_embedding, embedding_block

ATOMS = 8


class Shape(NamedTuple):
    """kind: `lookup`, `training` (lookup, and gradients of kept rows and weights) or `block`; a tenth is kept."""

    kind: str
    sequences: int
    length: int
    width: int
    vocabulary: int
    rows: torch.dtype
    rare_percent: int


_BERT = (32, 128, 768, 30522)
_MAIN = [
    *(Shape("lookup", *_BERT, torch.float32, percent) for percent in (5, 15, 30)),
    *(Shape("lookup", *_BERT, rows, 15) for rows in (torch.float16, torch.int8)),
    Shape("lookup", 1, 128, 768, 30522, torch.float32, 15),
    Shape("training", *_BERT, torch.float32, 15),
    *(Shape("block", *_BERT, rows, 15) for rows in (torch.float32, torch.float16)),
]
_WIDER = [
    *(Shape("lookup", 32, 128, width, 30522, torch.float32, 15) for width in (312, 384)),
    Shape("lookup", 32, 512, 768, 250002, torch.float16, 15),
    Shape("training", 32, 128, 384, 30522, torch.float32, 15),
    *(Shape("block", *_BERT, torch.float32, percent) for percent in (5, 30)),
]
_TINY = [Shape(kind, 2, 7, 12, 50, torch.float32, 30) for kind in ("lookup", "training", "block")]
SHAPES = {"tiny": _TINY, "small": _MAIN, "full": _MAIN + _WIDER}


def cases(shapes: str, device: str):
    """One at a time, because the dense tables are large."""
    for shape in SHAPES[shapes]:
        yield case(shape, device)


def random_code(
    vocabulary: int,
    kept: int,
    width: int,
    atoms: int,
    *,
    rows: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float16,
    residual_bytes: int = 0,
    wide_indices: bool = False,
) -> Arrays:
    """A code of normal rows in any storage format, tokens in random order; also what the tests look up in."""
    coded = vocabulary - kept
    index = torch.int32 if wide_indices else torch.uint16

    def stored(values: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype != torch.int8:
            return values.to(dtype), None
        scale = values.abs().amax(1).div(127) if values.numel() else values.new_zeros(values.shape[0])
        return values.div(scale[:, None]).round().to(torch.int8), scale.to(scale_dtype)

    kept_rows, kept_scale = stored(torch.randn(kept, width), rows, torch.float32)
    share = torch.rand(coded, atoms) + 0.1
    atom_weights, weight_scale = stored(share / share.sum(1, keepdim=True), weights, torch.float16)
    parts = residual_bytes
    return Arrays(
        slot=torch.randperm(vocabulary).to(index),
        kept=kept_rows,
        kept_scale=kept_scale,
        atom_ids=torch.randint(max(kept, 1), (coded, atoms)).to(index),
        atom_weights=atom_weights,
        weight_scale=weight_scale,
        residual=torch.randint(256, (coded, parts), dtype=torch.uint8) if parts else None,
        codebook=torch.randn(parts, 256, width // parts) if parts else None,
    )


def with_dtype(arrays: Arrays, dtype: torch.dtype) -> Arrays:
    """The same numbers, stored in `dtype` without scales."""

    def numbers(values: Tensor, scale: Tensor | None) -> Tensor:
        return values.to(dtype) if scale is None else values.to(dtype) * scale.to(dtype)[:, None]

    return arrays._replace(
        kept=numbers(arrays.kept, arrays.kept_scale), kept_scale=None,
        atom_weights=numbers(arrays.atom_weights, arrays.weight_scale), weight_scale=None,
    )  # fmt: skip


def draw_ids(arrays: Arrays, sequences: int, length: int, rare_percent: int) -> Tensor:
    kept, vocabulary = arrays.kept.shape[0], arrays.slot.shape[0]
    token_at = torch.empty(vocabulary, dtype=torch.int64)
    token_at[arrays.slot.long()] = torch.arange(vocabulary)
    tokens = sequences * length
    common = torch.multinomial(1 / torch.arange(1, kept + 1).double(), tokens, replacement=True)
    rare = torch.randint(kept, vocabulary, (tokens,))
    is_rare = torch.rand(tokens) < rare_percent / 100
    return token_at[torch.where(is_rare, rare, common)].view(sequences, length)


def two_paths(ids: Tensor, arrays: Arrays) -> Tensor:
    """What one writes in eager torch: a gather, an embedding_bag, and both scattered to their places."""
    place = arrays.slot[ids.flatten()].long()
    rare = place >= arrays.kept.shape[0]
    (common_at,), (rare_at,) = (~rare).nonzero(as_tuple=True), rare.nonzero(as_tuple=True)
    row = place[rare_at] - arrays.kept.shape[0]
    # embedding_bag knows no scales, and sums in the rows' dtype, which is too coarse unless it is fp32.
    table = arrays if arrays.kept.dtype == torch.float32 else with_dtype(arrays, torch.float32)
    weights = table.atom_weights[row].to(table.kept.dtype)
    bags = F.embedding_bag(table.atom_ids[row].long(), table.kept, per_sample_weights=weights, mode="sum")
    out = torch.empty(place.shape[0], table.kept.shape[1], device=ids.device)
    out = out.index_copy(0, common_at, F.embedding(place[common_at], table.kept).float())
    return out.index_copy(0, rare_at, bags.float()).view(*ids.shape, -1)


def case(shape: Shape, device: str) -> Case:
    torch.manual_seed(0)
    kept = shape.vocabulary // 10
    arrays = random_code(shape.vocabulary, kept, shape.width, min(ATOMS, kept), rows=shape.rows)
    ids = draw_ids(arrays, shape.sequences, shape.length, shape.rare_percent).to(device)
    arrays = Arrays(*(None if array is None else array.to(device) for array in arrays))
    dense = eager_sparse_embedding(torch.arange(shape.vocabulary, device=device), arrays)
    torch._dynamo.reset()  # without it the second shape would be timed in the code for dynamic shapes
    make = {"lookup": _lookup, "training": _training, "block": _block}[shape.kind]
    exact, providers = make(ids, arrays, dense, [name for name in backends.BACKENDS if _runs(name, device)])
    return Case(
        op="sparse_embedding",
        shape={**shape._asdict(), "rows": str(shape.rows).removeprefix("torch.")},
        length=shape.length,
        tokens=ids.numel(),
        dtype=torch.float32,
        device=device,
        exact=exact,
        providers=[*providers, _copy(ids, arrays)],
    )


def _runs(backend: str, device: str) -> bool:
    return backends.missing_reason("sparse_embedding", backend, torch.device(device), torch.float32) is None


def _inference(name: str, forward: Callable[[], Tensor], role: str = "baseline") -> Provider:
    return Provider(name, forward, lambda result: (), role)


def _lookup(ids: Tensor, arrays: Arrays, dense: Tensor, names: list[str]):
    def exact(dtype: torch.dtype):
        return (eager_sparse_embedding(ids, with_dtype(arrays, dtype), dtype),)

    def fused(name: str) -> Provider:
        return _inference(f"fastkd {name}", lambda: sparse_embedding(ids, arrays, backend=name), "fastkd")

    compiled = torch.compile(two_paths)
    return exact, [
        _inference("dense", lambda: F.embedding(ids, dense)),
        _inference("two paths", lambda: two_paths(ids, arrays)),
        _inference("two paths, torch.compile", lambda: compiled(ids, arrays)),
        *map(fused, names),
    ]


def _training(ids: Tensor, arrays: Arrays, dense: Tensor, names: list[str]):
    arrays = with_dtype(arrays, torch.float32)
    leaves = arrays.kept.requires_grad_(), arrays.atom_weights.requires_grad_()
    upstream = torch.randn(*ids.shape, arrays.kept.shape[1], device=ids.device)

    def gradients(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, leaves, upstream)

    def exact(dtype: torch.dtype):
        kept, weights = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        result = eager_sparse_embedding(ids, arrays._replace(kept=kept, atom_weights=weights), dtype)
        return result.detach(), *torch.autograd.grad(result, (kept, weights), upstream.to(dtype))

    def fused(name: str) -> Provider:
        return Provider(f"fastkd {name}", lambda: sparse_embedding(ids, arrays, backend=name), gradients, "fastkd")

    compiled = torch.compile(two_paths)
    return exact, [
        Provider("two paths", lambda: two_paths(ids, arrays), gradients),
        Provider("two paths, torch.compile", lambda: compiled(ids, arrays), gradients),
        *map(fused, names),
    ]


def _block(ids: Tensor, arrays: Arrays, dense: Tensor, names: list[str]):
    width = arrays.kept.shape[1]
    positions, types, norm_weight, norm_bias = (
        torch.randn(*size, device=ids.device) for size in ((512, width), (2, width), (width,), (width,))
    )

    def exact(dtype: torch.dtype):
        tables = (x.to(dtype) for x in (positions, types, norm_weight, norm_bias))
        return (eager_embedding_block(ids, None, None, with_dtype(arrays, dtype), *tables, 1e-12, dtype),)

    def of_dense(ids: Tensor) -> Tensor:
        """As BERT computes it."""
        x = F.embedding(ids, dense) + F.embedding(torch.arange(ids.shape[1], device=ids.device), positions)
        return F.layer_norm(x + F.embedding(torch.zeros_like(ids), types), (width,), norm_weight, norm_bias, 1e-12)

    def fused(name: str) -> Provider:
        def forward():
            return embedding_block(ids, arrays, positions, norm_weight, norm_bias, types=types, backend=name)

        return _inference(f"fastkd {name}", forward, "fastkd")

    compiled = torch.compile(of_dense, dynamic=False)
    return exact, [
        _inference("dense", lambda: of_dense(ids)),
        _inference("dense, torch.compile", lambda: compiled(ids)),
        *map(fused, names),
    ]


def _copy(ids: Tensor, arrays: Arrays) -> Provider:
    """A copy that moves as many bytes as a lookup must: each distinct row that is needed once, and the result."""
    place = arrays.slot[ids.flatten()].long()
    kept = arrays.kept.shape[0]
    atoms = arrays.atom_ids[(place[place >= kept] - kept).unique()].long().flatten()
    rows = torch.cat([place[place < kept], atoms]).unique().numel()
    moved = rows * arrays.kept.shape[1] * arrays.kept.element_size() + ids.numel() * arrays.kept.shape[1] * 4
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=ids.device)
    return Provider("copy of the bytes", source.clone, lambda result: (), "limit")
