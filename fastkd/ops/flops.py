"""Importing this module teaches torch's `FlopCounterMode` the fused ops, which it counts as zero otherwise.

It stands apart because `torch.utils.flop_counter` imports triton, which `import fastkd` must not.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

import fastkd.ops.relation_kl  # noqa: F401  defines the ops that are looked up below

_RELATION_KL = [getattr(torch.ops.fastkd, f"relation_kl_{backend}") for backend in ("reference", "cpp", "triton")]


@register_flop_formula(_RELATION_KL)
def relation_kl_flops(
    student,
    student_right,
    teacher,
    teacher_right,
    starts,
    lengths,
    order,
    max_length,
    num_heads,
    causal,
    with_grad,
    out_shape=None,
) -> int:
    """Matrix products of one call, from shapes: two score matrices, and one more product per gradient wanted.

    Every sequence counts with `max_length` tokens and every pair of them: padding, raggedness and `causal` are not
    visible in shapes, so this is what an eager masked implementation would compute.
    """
    gradients = 0 if not with_grad else 1 if student_right is None else 2
    multiplications = max_length**2 * (student[-1] * (1 + gradients) + teacher[-1])
    return 2 * starts[0] * multiplications
