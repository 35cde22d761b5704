"""cos_nce in Triton: tensors in, tensors out. Schemas, formula and reference stand in fastkd/ops/cos_nce.py, the
kernels in _cos_nce_device.py."""

import math

import torch
import triton
from torch import Tensor

from ._cos_nce_device import rows, run_sums, scale, totals  # noqa: TID251

_PROGRAMS = 1056  # that add up one sum, eight per multiprocessor of an H200: each leaves one row of fp32 behind
_WIDEST = 8192  # columns that a program holds


def _tile(width: int, elements: int, warps: int) -> dict[str, int]:
    """Rows of a program that holds so many elements, or one row where it is wider; as many elements per warp."""
    block = min(max(16, triton.next_power_of_2(width)), _WIDEST)
    rows = max(1, elements // block)
    warps = rows * block * warps // elements
    return {"WIDTH": width, "BLOCK": block, "ROWS": rows, "num_warps": warps, "enable_fp_fusion": True}


def _strides(vectors: Tensor) -> tuple[int, list[int]]:
    """What divides the strides, so that the compiler knows how far addresses are aligned, and the strides in it."""
    strides = vectors.stride()[:3]
    unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


def _mask(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if mask is None else (mask, *mask.stride())


def _chunks(samples: int, columns: int) -> tuple[int, int]:
    """How many chunks, and samples in each: from sizes alone, so that every device adds in the same order."""
    span = triton.cdiv(samples, max(1, min(_PROGRAMS // columns, triton.cdiv(samples, 16))))
    return triton.cdiv(samples, span), span


def cos_nce_sums(vectors: Tensor, mask: Tensor | None, classes: Tensor | None, num_classes: int) -> Tensor:
    layers, samples, positions, width = vectors.shape
    columns = layers * positions
    sums = torch.empty((layers, 1 + num_classes, positions, width), dtype=torch.float32, device=vectors.device)
    if not vectors.numel():
        return sums.zero_()
    unit, strides = _strides(vectors)
    chunks, span = _chunks(samples, columns)
    sizes = (samples, positions, 1 + num_classes, chunks, span)
    tile = _tile(width, 2048, 4)
    blocks = triton.cdiv(width, tile["BLOCK"])
    # A chunk leaves its sum behind; of those of classes, its first and its last.
    edges = torch.empty(
        (columns, chunks * (2 if num_classes else 1) if chunks > 1 else 0, width),
        dtype=torch.float32,
        device=sums.device,
    )
    operands = (sums, edges, vectors, *strides, *_mask(mask))
    grid = (columns * chunks * blocks,)
    with torch.cuda.device_of(vectors):
        run_sums[grid](*operands, None, None, None, *sizes, **tile, UNIT=unit, maxnreg=64)
        if chunks > 1:
            small = tile | {"BLOCK": 32, "ROWS": 64, "num_warps": 4}
            totals[(columns * triton.cdiv(width, 32),)](sums, edges, None, *sizes, **small)
        if num_classes:
            in_order, order = torch.sort(classes, stable=True)
            bounds = torch.arange(num_classes + 1, dtype=classes.dtype, device=classes.device)
            begins = torch.searchsorted(in_order, bounds)
            run_sums[grid](*operands, order, in_order, begins, *sizes, **tile, UNIT=unit, maxnreg=96)
            totals[(columns * num_classes * blocks,)](sums, edges, begins, *sizes, **tile)
    return sums


def cos_nce(
    student: Tensor, teacher: Tensor, sums: Tensor, counts: Tensor, mask: Tensor | None, excluded: Tensor | None,
    own: bool, weights: Tensor | None, divisor: int, with_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layers, samples, positions, width = student.shape
    losses = torch.empty((layers, samples, positions), dtype=torch.float32, device=student.device)
    grad = torch.empty(student.shape if with_grad else (0,), dtype=student.dtype, device=student.device)
    if not student.numel():
        return losses, grad
    (unit_s, strides_s), (unit_t, strides_t) = _strides(student), _strides(teacher)
    tile = _tile(width, 1024, 1)  # one warp and no barrier up to 1024 columns
    span = 4 * tile["ROWS"]  # the sum of the negatives is loaded once in that many rows
    chunks = triton.cdiv(samples, span)
    with torch.cuda.device_of(student):
        rows[(layers * positions * chunks,)](
            losses, grad, student, *strides_s, teacher, *strides_t, sums, counts, *_mask(mask), excluded, weights,
            0 if weights is None else weights.stride(0), 1 / divisor, samples, positions, sums.shape[1], chunks, span,
            **tile, UNIT_S=unit_s, UNIT_T=unit_t, OWN=own, WITH_GRAD=with_grad,
        )  # fmt: skip
    return losses, grad


def scale_gradient(grad: Tensor, factor: Tensor) -> None:
    """By the schema of fastkd/ops/upstream.py."""
    if grad.numel():
        with torch.cuda.device_of(grad):
            blocks = min(triton.cdiv(grad.numel(), 2048), 4096)
            scale[(blocks,)](grad, factor, grad.numel(), BLOCK=2048, num_warps=4, enable_fp_fusion=True)
