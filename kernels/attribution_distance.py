"""attribution_distance in Triton: tensors in, tensors out. Schema, formula and reference stand in
fastkd/ops/attribution_distance.py, the kernels in _attribution_distance_device.py."""

import math

import torch
import triton
from torch import Tensor

from ._attribution_distance_device import compare, gradients, scores  # noqa: TID251

_WIDEST = 4096  # columns that a program holds


def _tile(width: int) -> dict[str, int]:
    """Rows of a program of about 1024 numbers per warp."""
    block = min(max(16, triton.next_power_of_2(width)), _WIDEST)
    return {
        "WIDTH": width,
        "BLOCK": block,
        "ROWS": max(1, 2048 // block),
        "num_warps": max(2, block // 1024),
        "enable_fp_fusion": True,
    }


def _strides(x: Tensor) -> tuple[int, list[int]]:
    """What divides the strides, so that the compiler knows how far addresses are aligned, and the strides in it."""
    strides = x.stride()[:-1]
    unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


def attribution_distance(
    gradient: Tensor, inputs: Tensor | None, teacher: Tensor, mask: Tensor | None, weighted: bool, reduce: str,
    norm: str, kind: str, gradient_wanted: bool, inputs_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, classes, length, width = gradient.shape
    device = gradient.device
    sums = torch.empty((batch, classes), dtype=torch.float32, device=device)
    of_gradient = torch.empty(gradient.shape if gradient_wanted else (0,), dtype=gradient.dtype, device=device)
    of_inputs = torch.empty(inputs.shape if inputs_wanted else (0,), dtype=gradient.dtype, device=device)
    if not gradient.numel():
        return sums.zero_(), of_gradient, of_inputs.zero_()
    wanted = gradient_wanted or inputs_wanted
    # Tensors of their own: what a part of one is aligned to would depend on the batch, and be compiled for.
    found, pull = (torch.empty((batch, classes, length), dtype=torch.float32, device=device) for _ in range(2))
    (unit, strides), (unit_x, strides_x) = _strides(gradient), (1, [0, 0]) if inputs is None else _strides(inputs)
    masked = (None, 0, 0) if mask is None else (mask, *mask.stride())
    tile = _tile(width)
    tiles = triton.cdiv(length, tile["ROWS"])
    operands = (gradient, *strides, inputs, *strides_x)
    form = {"UNIT": unit, "UNIT_X": unit_x, "SUM": reduce == "sum"}
    with torch.cuda.device_of(gradient):
        scores[(batch * classes * tiles,)](found, *operands, *masked, classes, length, tiles, **tile, **form)
        compare[(batch * classes,)](
            sums, pull if wanted else None, found, teacher, *masked, 1 / batch, classes, length, SPAN=256,
            WEIGHTED=weighted, NORM=norm, KIND=kind, num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
        if wanted:
            gradients[(batch * tiles * triton.cdiv(width, tile["BLOCK"]),)](
                of_gradient if gradient_wanted else None, of_inputs if inputs_wanted else None, found, pull,
                *operands, classes, length, tiles, **tile, **form,
            )  # fmt: skip
    return sums, of_gradient, of_inputs
