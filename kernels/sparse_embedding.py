"""sparse_embedding in Triton: tensors in, tensors out. Schemas, formula and reference stand in
fastkd/ops/sparse_embedding.py, the kernels in _sparse_embedding_device.py."""

import torch
import triton
from torch import Tensor

from ._sparse_embedding_device import block, contributions, kept_gradient, lookup, weight_gradient  # noqa: TID251


def _plan(width: int) -> dict[str, int]:
    """A program's columns, and the warps that share them: eight or sixteen numbers each."""
    columns = max(16, triton.next_power_of_2(width))
    warps = min(8, max(1, columns // 256))
    return {"WIDTH": width, "BLOCK": columns, "num_warps": warps, "enable_fp_fusion": True}


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _sizes(slot: Tensor, kept: Tensor, atom_ids: Tensor, residual: Tensor | None) -> tuple[int, int, int, int]:
    return slot.shape[0], kept.shape[0], atom_ids.shape[1], 0 if residual is None else residual.shape[1]


def sparse_embedding(ids: Tensor, *arrays_and_dtype) -> Tensor:
    *arrays, dtype = arrays_and_dtype
    ids, *arrays = _dense(ids, *arrays)
    slot, kept, _, atom_ids, _, _, residual, _ = arrays
    width = kept.shape[1]
    out = torch.empty((*ids.shape, width), dtype=dtype, device=ids.device)
    if out.numel():
        with torch.cuda.device_of(ids):
            lookup[(ids.numel(),)](out, ids, *arrays, *_sizes(slot, kept, atom_ids, residual), **_plan(width))
    return out


def embedding_block(ids: Tensor, type_ids: Tensor | None, position_ids: Tensor | None, *rest) -> Tensor:
    *tensors, eps, dtype = rest
    ids, type_ids, position_ids, *tensors = _dense(ids, type_ids, position_ids, *tensors)
    arrays, (positions, types, norm_weight, norm_bias) = tensors[:8], tensors[8:]
    slot, kept, _, atom_ids, _, _, residual, _ = arrays
    width = kept.shape[1]
    out = torch.empty((*ids.shape, width), dtype=dtype, device=ids.device)
    rows = ids.shape[-1], positions.shape[0], 0 if types is None else types.shape[0]
    if out.numel():
        with torch.cuda.device_of(ids):
            block[(ids.numel(),)](
                out, ids, type_ids, position_ids, *arrays, positions, types, norm_weight, norm_bias, eps, *rows,
                *_sizes(slot, kept, atom_ids, residual), **_plan(width),
            )  # fmt: skip
    return out


def _segments(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the contributions to each of `count` rows begin in the list sorted by rows, and that list."""
    in_order, places = torch.sort(rows, stable=True)
    begins = torch.searchsorted(in_order, torch.arange(count + 1, dtype=rows.dtype, device=rows.device))
    return begins, places


def sparse_embedding_backward(
    upstream: Tensor, ids: Tensor, slot: Tensor, kept: Tensor, kept_scale: Tensor | None, atom_ids: Tensor,
    atom_weights: Tensor, weight_scale: Tensor | None, residual: Tensor | None, codebook: Tensor | None,
    padding_idx: int, kept_wanted: bool, weights_wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    upstream, ids, slot, kept, kept_scale, atom_ids, atom_weights, weight_scale = _dense(
        upstream, ids, slot, kept, kept_scale, atom_ids, atom_weights, weight_scale
    )
    (rows, width), (coded, atoms) = kept.shape, atom_ids.shape
    d_kept = torch.zeros(kept.shape if kept_wanted else 0, dtype=kept.dtype, device=ids.device)
    d_weights = torch.zeros(atom_weights.shape if weights_wanted else 0, dtype=atom_weights.dtype, device=ids.device)
    if not ids.numel():
        return d_kept, d_weights
    slots, padded = max(atoms, 1), triton.next_power_of_2(max(atoms, 1))
    row_of, weight_of = (
        torch.empty(ids.numel() * slots, dtype=t, device=ids.device) for t in (torch.int32, torch.float)
    )
    coded_of = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    plan = _plan(width)
    with torch.cuda.device_of(ids):
        contributions[(ids.numel(),)](
            row_of, weight_of, coded_of, ids, padding_idx, slot, kept_scale, atom_ids, atom_weights, weight_scale,
            slot.shape[0], rows, coded, atoms, PADDED=padded, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        if d_kept.numel():
            plan |= {"BLOCK": min(plan["BLOCK"], 256), "num_warps": 1}
            grid = rows, triton.cdiv(width, plan["BLOCK"])
            kept_gradient[grid](d_kept, upstream, *_segments(row_of, rows), weight_of, slots, **plan)
        if d_weights.numel():
            plan |= {"BLOCK": min(plan["BLOCK"], 256), "num_warps": 4}
            weight_gradient[(coded,)](
                d_weights, upstream, *_segments(coded_of, coded), kept, kept_scale, atom_ids, atoms, PADDED=padded,
                **plan,
            )  # fmt: skip
    return d_kept, d_weights
