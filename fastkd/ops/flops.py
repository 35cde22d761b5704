"""Importing this module teaches torch's `FlopCounterMode` the fused ops, which it counts as zero otherwise.

It stands apart because `torch.utils.flop_counter` imports triton, which `import fastkd` must not.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

import fastkd.ops.attribution_distance
import fastkd.ops.cos_nce
import fastkd.ops.sparse_embedding  # noqa: F401  define ops that are looked up below
from fastkd.ops.relation_kl import Call
from fastkd.ops.sparse_arrays import Arrays

_RELATION_KL = [getattr(torch.ops.fastkd, f"relation_kl_{name}") for name in ("reference", "cpp", "triton", "cuda")]


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


def _sparse_embedding(name: str) -> list:
    return [getattr(torch.ops.fastkd, f"{name}_{backend}") for backend in ("reference", "cpp", "triton")]


@register_flop_formula(_sparse_embedding("sparse_embedding"))
def sparse_embedding_flops(ids, *shapes, out_shape=None) -> int:
    """Weighted sums of one lookup as if every token were rare: which are is not visible in shapes."""
    arrays = Arrays(*shapes[:8])
    return 2 * math.prod(ids) * arrays.atom_ids[1] * arrays.kept[1]


@register_flop_formula(_sparse_embedding("sparse_embedding_backward"))
def sparse_embedding_backward_flops(upstream, ids, *shapes, out_shape=None) -> int:
    """The same for each gradient wanted."""
    *arrays, _, kept_wanted, weights_wanted = shapes
    return (kept_wanted + weights_wanted) * sparse_embedding_flops(ids, *arrays)


@register_flop_formula(_sparse_embedding("embedding_block"))
def embedding_block_flops(ids, type_ids, position_ids, *shapes, out_shape=None) -> int:
    """That of its lookup: torch counts no additions and no LayerNorm either."""
    return sparse_embedding_flops(ids, *shapes)


def _cos_nce(name: str) -> list:
    return [getattr(torch.ops.fastkd, f"{name}_{backend}") for backend in ("reference", "cpp", "triton", "cuda")]


@register_flop_formula(_cos_nce("cos_nce_sums"))
def cos_nce_sums_flops(vectors, *shapes, out_shape=None) -> int:
    """The norm and the sum of every vector; a mask is not visible in shapes."""
    return 2 * 2 * math.prod(vectors)


@register_flop_formula(_cos_nce("cos_nce"))
def cos_nce_flops(student, *shapes, out_shape=None) -> int:
    """Two norms and two dot products of every row, and with a gradient a sum of three multiples."""
    with_grad = shapes[-1]
    return 2 * (4 + 3 * with_grad) * math.prod(student)


_ATTRIBUTION_DISTANCE = [
    getattr(torch.ops.fastkd, f"attribution_distance_{name}") for name in ("reference", "cpp", "triton", "cuda")
]


@register_flop_formula(_ATTRIBUTION_DISTANCE)
def attribution_distance_flops(gradient, inputs, *shapes, out_shape=None) -> int:
    """Two multiplications and additions of every number for the scores, and two for each gradient wanted; a mask is not
    visible in shapes."""
    *_, gradient_wanted, inputs_wanted = shapes
    return 2 * 2 * (1 + gradient_wanted + inputs_wanted) * math.prod(gradient)
