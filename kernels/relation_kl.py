"""relation_kl in Triton: outputs, tiles and launches. What the kernels do is said in `_relation_kl_device.py`."""

import math

import torch
import triton
from torch import Tensor

from ._relation_kl_device import gradient_sweep, row_sweep, sequence_losses, short  # noqa: TID251

# Tiles by architecture (`_architecture`) and bytes per element of the wider dtype. The first row that fits counts, by
# the padded head widths of student and teacher together and, for `short`, the longest sequence. They are as large as
# registers allow without a spill: docs/kernels/relation_kl_triton.md. fp32 does without tensor cores.
#             widths, length, rows, warps
_SHORT = {
    (10, 2): ((256, 16, 16, 1), (256, 32, 32, 2), (256, 64, 64, 8), (128, 128, 64, 8)),
    (9, 2): ((256, 16, 16, 1), (256, 32, 32, 2), (256, 64, 64, 4), (96, 128, 64, 4)),
    (8, 2): ((256, 16, 16, 1), (256, 32, 32, 2), (192, 64, 64, 4), (64, 128, 64, 4)),
    (8, 4): ((64, 32, 32, 4), (256, 32, 32, 8)),
}
#              widths, rows, columns, warps, stages, registers per thread (None: as the compiler likes)
_SWEEPS = {
    (10, 2): ((256, 64, 64, 8, 3, None),),
    (9, 2): ((128, 64, 64, 4, 3, None), (256, 64, 64, 8, 2, None)),
    (8, 2): ((32, 64, 64, 4, 4, None), (128, 64, 64, 4, 3, None), (256, 64, 64, 8, 2, None)),
    (8, 4): ((64, 32, 32, 4, 2, None), (128, 32, 32, 8, 2, 255), (256, 16, 16, 4, 2, None)),
}


def _architecture(device: torch.device) -> int:
    """8, 9 or 10: whose matrix instructions Triton uses. Consumer Blackwell (12) has those of Ampere."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: 9, 10: 10, 11: 10}.get(major, 8)


def relation_kl(
    student: Tensor,
    student_right: Tensor | None,
    teacher: Tensor,
    teacher_right: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    order: Tensor | None,
    max_length: int,
    num_heads: int,
    causal: bool,
    divisor: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each sequence and the student's gradient, by the schema of fastkd/ops/relation_kl.py.

    Takes fp32, bf16 and fp16, on CUDA, or on the CPU under TRITON_INTERPRET=1. Lengths, batch and strides compile
    nothing anew; what does is the model (head widths, dtypes), the form, and the class of `max_length` in `_SHORT`.

    Raises:
        ValueError: a relation head is wider than 128.
    """
    packed, cross = student.dim() == 2, student_right is not None
    right_s, right_t = (student_right, teacher_right) if cross else (student, teacher)
    width_s, width_t = student.shape[-1] // num_heads, teacher.shape[-1] // num_heads
    if max(width_s, width_t) > 128:
        raise ValueError(
            f"num_heads={num_heads} gives relation heads of width {width_s} (student) and {width_t} (teacher);"
            " the Triton kernel takes widths up to 128"
        )
    batch, length, rows = starts.shape[0], student.shape[-2], student.shape[:-1].numel()
    max_length = min(max_length, length)

    # Blocks of padding write the zeros of a padded gradient; behind the last packed sequence there is no program.
    allocate = torch.zeros if packed or max_length < length else torch.empty
    grad, grad_right = (
        allocate(student.shape if wanted else 0, dtype=student.dtype, device=student.device)
        for wanted in (with_grad, with_grad and cross)
    )
    losses = torch.empty(batch, dtype=torch.float32, device=student.device)
    if batch == 0 or max_length == 0:
        return losses.zero_(), grad, grad_right

    def strides(x: Tensor) -> tuple[int, int]:
        return x.stride(-2), 0 if packed else x.stride(0)

    unit_s = math.gcd(16, width_s, *strides(student), *strides(right_s))
    unit_t = math.gcd(16, width_t, *strides(teacher), *strides(right_t))

    def operands(own_s: Tensor, other_s: Tensor, own_t: Tensor, other_t: Tensor) -> list[Tensor | int]:
        pairs = ((own_s, unit_s), (other_s, unit_s), (own_t, unit_t), (other_t, unit_t))
        return [value for x, unit in pairs for value in (x, *(stride // unit for stride in strides(x)))]

    padded_s, padded_t = (max(16, triton.next_power_of_2(width)) for width in (width_s, width_t))
    size = max(student.element_size(), teacher.element_size())
    tiles = (_architecture(student.device) if size == 2 else 8, size)
    fitting = (row for row in _SHORT[tiles] if padded_s + padded_t <= row[0] and max_length <= row[1])
    _, tile, own, warps = next(fitting, (0, 0, 0, 0))
    if not tile:
        _, own, other, warps, stages, registers = next(row for row in _SWEEPS[tiles] if padded_s + padded_t <= row[0])
    blocks = triton.cdiv(max_length, tile or own)
    # One partial sum per block of rows. Packed sequence i, which starts at row s, uses the slots from s // own + i on.
    slots = rows // (tile or own) + batch if packed else batch * blocks
    partial = torch.empty((num_heads, slots), dtype=torch.float32, device=student.device)

    left = operands(student, right_s, teacher, right_t)
    tokens = (starts, lengths, order, 0 if order is None else order.stride(0))
    partials = (partial, slots, 1 if packed else blocks)
    s_grad = (student.shape[-1] // unit_s, 0 if packed else length * student.shape[-1] // unit_s)
    weight = 1 / (num_heads * divisor)
    scales = (math.log2(math.e) / math.sqrt(width_s), math.log2(math.e) / math.sqrt(width_t))
    options = {"num_warps": warps, "enable_fp_fusion": True}
    constants = {
        "WIDTH_S": width_s, "PADDED_S": padded_s, "UNIT_S": unit_s,
        "WIDTH_T": width_t, "PADDED_T": padded_t, "UNIT_T": unit_t,
        "OWN": own, "CAUSAL": causal, "INTERPRETED": not isinstance(short, triton.JITFunction),
    }  # fmt: skip
    with torch.cuda.device_of(student):
        if tile:
            short[batch, num_heads](
                *left, *tokens, *partials, grad, grad_right, *s_grad, weight, *scales, max_length, **constants,
                TILE=tile, CROSS=cross, PACKED=packed, WITH_GRAD=with_grad, **options, num_stages=1,
            )  # fmt: skip
        else:
            # Two numbers per model, head and row: 16 bytes. And the scores that `row_sweep` measures from, per head.
            stats = torch.empty((4, num_heads, rows if with_grad else 0), dtype=torch.float32, device=student.device)
            origin = torch.empty((batch, num_heads, 2), dtype=torch.float32, device=student.device)
            scratch = (origin, stats, num_heads * rows, rows, 0 if packed else length)
            sizes = (*scales, max_length, num_heads, blocks)
            grid = (batch * blocks, num_heads)
            constants["OTHER"] = other
            options |= {"num_stages": stages, "maxnreg": registers}
            row_sweep[grid](
                *left, *tokens, *partials, *scratch, *sizes, **constants, SYMMETRIC=not (cross or causal),
                WITH_GRAD=with_grad, **options,
            )  # fmt: skip
            if with_grad:
                gradient_sweep[grid](
                    *left, *tokens, grad, *s_grad, weight, *scratch, *sizes, **constants, ROWS=True, COLUMNS=not cross,
                    PACKED=packed, **options,
                )  # fmt: skip
            if with_grad and cross:
                right = operands(right_s, student, right_t, teacher)
                gradient_sweep[grid](
                    *right, *tokens, grad_right, *s_grad, weight, *scratch, *sizes, **constants, ROWS=False,
                    COLUMNS=True, PACKED=packed, **options,
                )  # fmt: skip
        sequence_losses[(batch,)](
            losses, starts, lengths, *partials, max_length, num_heads, OWN=tile or own, CHUNK=256, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return losses, grad, grad_right
