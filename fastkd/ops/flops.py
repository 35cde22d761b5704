"""Importing this module teaches torch's `FlopCounterMode` the fused ops, which it counts as zero otherwise.

It stands apart because `torch.utils.flop_counter` imports triton, which `import fastkd` must not.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from fastkd.ops.relation_kl import Call

_RELATION_KL = [getattr(torch.ops.fastkd, f"relation_kl_{backend}") for backend in ("reference", "cpp", "triton")]


@register_flop_formula(_RELATION_KL)
def relation_kl_flops(*shapes, out_shape=None) -> int:
    """Matrix products of one call, from shapes: two score matrices, and one more product per gradient wanted.

    Every sequence counts with `max_length` tokens and every pair of them: padding, raggedness and `causal` are not
    visible in shapes, so this is what an eager masked implementation would compute.
    """
    call = Call(*shapes)
    gradients = 0 if not call.with_grad else 1 if call.student_right is None else 2
    multiplications = call.max_length**2 * (call.student[-1] * (1 + gradients) + call.teacher[-1])
    return 2 * call.starts[0] * multiplications
