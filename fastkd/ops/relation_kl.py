r"""Attention-relation KL divergence (MiniLMv2, arXiv 2012.15828, equations 5 to 8).

A width-D projection X (all attention heads concatenated) is cut anew into `num_heads` relation heads of width
d = D / num_heads. For one sequence of n valid tokens and one head,

    A = X Xᵀ / √d                      (self relation; left · rightᵀ / √d for a cross relation such as Q·Kᵀ)
    R = softmax of each row of A       over the valid columns, with `causal` over columns j ≤ i only
    loss of the sequence = 1 / (num_heads · n) · Σ_heads Σ_rows KL(R_teacher ‖ R_student)

`reduction="mean"` sums the sequences and divides by their number, empty ones included; `"none"` returns one value
per sequence. A sequence without a valid token has loss zero and gradient zero.

Gradient, with P and S the teacher's and student's rows and G = S − P (every row of G sums to zero):

    self:   dX     = (G + Gᵀ) X / √d          X stands on both sides of the product: the second half is easily forgotten
    cross:  dLeft  = G Right / √d ,  dRight = Gᵀ Left / √d

Forward returns the loss and, where the student needs it, this gradient with the factor 1 / (num_heads · n · B), so that
backward has nothing to do where upstream is one; in fp16, where it would underflow, backward multiplies by it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import backends, plain_tensors, sequences, upstream

_library = torch.library.Library("fastkd", "FRAGMENT")

# One schema for every backend.
#   student, teacher (and *_right for a cross relation): (B, L, D) padded, or (T, D) packed; last dimension dense
#   starts (B,) int64   row at which a sequence begins in a packed tensor; zeros for padded ones
#   lengths (B,) int32  valid tokens of each sequence
#   order (B, L) int32  for a padded batch with a mask: the valid positions of each sequence first, ascending, then
#                       the others; None where the first `lengths` positions are the valid ones
#   max_length          at least the largest of `lengths`; SymInt, so that torch.compile need not fix it
#   divisor             of the gradients: what the reduction divides the losses by; SymInt, like max_length
# Returns the loss of each sequence (B,) fp32 (fp64 for fp64), and the gradients in the student's dtype and shape,
# contiguous, zero in every row that belongs to no sequence, and with the factor 1 / (num_heads · n · divisor) before
# they are rounded; in fp16 without it. Gradients that are not wanted (`with_grad` false, or no right operand) are
# empty tensors.
_SCHEMA = (
    "(Tensor student, Tensor? student_right, Tensor teacher, Tensor? teacher_right, Tensor starts, Tensor lengths,"
    " Tensor? order, SymInt max_length, int num_heads, bool causal, SymInt divisor,"
    " bool with_grad) -> (Tensor, Tensor, Tensor)"
)
_KERNEL_BACKENDS = ("reference", "cpp", "triton", "cuda")


class Call(NamedTuple):
    """The arguments of one call, in the schema's order; the flop formula has shapes in the place of tensors."""

    student: Tensor
    student_right: Tensor | None
    teacher: Tensor
    teacher_right: Tensor | None
    starts: Tensor
    lengths: Tensor
    order: Tensor | None
    max_length: int
    num_heads: int
    causal: bool
    divisor: int
    with_grad: bool


def _heads(x: Tensor, valid: Tensor, num_heads: int) -> Tensor:
    """(B, L, D) to (B, heads, L, d). A padded position may hold anything, NaN included, and 0 · NaN is NaN: cleared."""
    return x.masked_fill(~valid[:, :, None], 0).unflatten(2, (num_heads, -1)).transpose(1, 2)


def _pairs(lengths: Tensor, max_length: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Which positions (B, L) and which pairs of them (B, 1, L, L) count."""
    positions = torch.arange(max_length, device=lengths.device)
    valid = positions < lengths[:, None]
    pairs = (valid[:, :, None] & valid[:, None, :])[:, None]
    return valid, pairs & (positions <= positions[:, None]) if causal else pairs


def _log_relations(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    scores = left @ right.transpose(2, 3) / math.sqrt(left.shape[-1])
    # A large finite fill keeps rows without any valid column free of NaN; those rows are dropped by the caller.
    return scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).log_softmax(-1)


def _divergence(log_student: Tensor, log_teacher: Tensor, pairs: Tensor) -> Tensor:
    return (log_teacher.exp() * (log_teacher - log_student)).masked_fill(~pairs, 0).sum((1, 2, 3))


def eager_relation_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    lengths: Tensor,
    num_heads: int,
    causal: bool = False,
) -> Tensor:
    """The definition in plain torch, differentiable: right-padded pairs (left, right) of (B, L, D) to losses (B,).

    Every kernel is tested against this in fp64; in the tensors' own dtype it is the `eager` that benchmarks time.
    """
    valid, pairs = _pairs(lengths, student[0].shape[1], causal)
    log_student, log_teacher = (
        _log_relations(*(_heads(x, valid, num_heads) for x in operands), pairs) for operands in (student, teacher)
    )
    return _divergence(log_student, log_teacher, pairs) / (num_heads * lengths.clamp(min=1))


def _reference(
    student, student_right, teacher, teacher_right, starts, lengths, order, max_length, num_heads, causal, divisor,
    with_grad,
):  # fmt: skip
    """The same in fp32 (or fp64) behind the common schema. The gradient is written out: there is no autograd."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    rows = torch.arange(max_length, device=student.device) if order is None else order[:, :max_length].long()
    if student.dim() == 3:
        rows = torch.arange(student.shape[0], device=student.device)[:, None] * student.shape[1] + rows
    else:  # packed: positions behind the end of a sequence stay inside the tensor, `valid` drops them
        rows = (starts[:, None] + rows).clamp(max=max(student.shape[0] - 1, 0))
    valid, pairs = _pairs(lengths, max_length, causal)

    def operands(*tensors: Tensor | None) -> list[Tensor]:
        return [_heads(x.reshape(-1, x.shape[-1])[rows].to(dtype), valid, num_heads) for x in tensors if x is not None]

    def scattered(grad: Tensor) -> Tensor:
        out = student.new_zeros(student.shape).view(-1, student.shape[-1])
        return out.index_put_((rows[valid],), grad.transpose(1, 2).flatten(2)[valid].to(student.dtype)).view(
            student.shape
        )

    with torch.autocast(student.device.type, enabled=False):  # results must not depend on the caller's autocast
        x, y = operands(student, student_right), operands(teacher, teacher_right)
        log_student, log_teacher = _log_relations(x[0], x[-1], pairs), _log_relations(y[0], y[-1], pairs)
        terms = num_heads * lengths.clamp(min=1)
        losses = _divergence(log_student, log_teacher, pairs) / terms
        grads = [student.new_empty(0), student.new_empty(0)]
        if with_grad:
            g = (log_student.exp() - log_teacher.exp()).masked_fill(~pairs, 0) / math.sqrt(x[0].shape[-1])
            if student.dtype != torch.float16:
                g = g / (terms * divisor)[:, None, None, None]
            left, right = g @ x[-1], g.transpose(2, 3) @ x[0]
            grads = (
                [scattered(left + right), grads[1]] if student_right is None else [scattered(left), scattered(right)]
            )
    return losses, *grads


def _fake(
    student, student_right, teacher, teacher_right, starts, lengths, order, max_length, num_heads, causal, divisor,
    with_grad,
):  # fmt: skip
    losses = student.new_empty(starts.shape, dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    grads = [
        student.new_empty(x.shape) if with_grad and x is not None else student.new_empty(0)
        for x in (student, student_right)
    ]
    return losses, *grads


def _triton(*arguments):
    from fastkd.kernels.relation_kl import relation_kl as launch

    return launch(*arguments)


for _name in _KERNEL_BACKENDS:
    _library.define(f"relation_kl_{_name}{_SCHEMA}")
    torch.library.register_fake(f"fastkd::relation_kl_{_name}", _fake, lib=_library)
_library.impl("relation_kl_reference", _reference, "CompositeExplicitAutograd")
_library.impl("relation_kl_triton", _triton, "CUDA")
_OPS = {name: getattr(torch.ops.fastkd, f"relation_kl_{name}").default for name in _KERNEL_BACKENDS}


backends.register_kernels("relation_kl", widest=128)


class _RelationKL(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # apply() binds names by inspection, on every call
        *call, reduced, backend = inputs
        losses, *grads = _OPS[backend](*call)
        return _reduce(losses, Call(*call).divisor, reduced), *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        *call, _, ctx.backend = inputs
        call = Call(*call)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.folded = call.student.dtype != torch.float16
        ctx.terms = call.num_heads * call.divisor
        ctx.save_for_backward(*output[1:], call.starts, None if ctx.folded else call.lengths)

    @staticmethod
    def backward(ctx, factor, *_):
        upstream.refuse_second_derivative("relation_kl")
        if factor is None:
            return (None,) * 14
        *grads, starts, lengths = ctx.saved_tensors
        if not ctx.folded:
            factor = factor / (ctx.terms * lengths.clamp(min=1))
        if factor.dim():
            factor = _by_row(factor, grads[0], starts)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        scaled = [upstream.times(grad, factor, ctx.backend) if needed else None for grad, needed in wanted]
        return *scaled, *(None,) * 12


def _by_row(factor: Tensor, grad: Tensor, starts: Tensor) -> Tensor:
    """Factors of the sequences (B,) as they expand to a gradient (B, L, D), or, packed, (T, D)."""
    if grad.dim() == 3:
        return factor[:, None, None]
    # Each row takes the factor of the last sequence that has begun, or zero.
    rows = torch.arange(grad.shape[0], device=grad.device)
    return F.pad(factor, (1, 0))[torch.searchsorted(starts, rows, right=True)][:, None]


def _reduce(losses: Tensor, divisor: int, reduced: bool) -> Tensor:
    return losses.sum() / divisor if reduced else losses


def relation_kl(
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Tensor | tuple[Tensor, Tensor],
    num_heads: int,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL divergence between teacher's and student's self-attention relations; the formula stands above.

    Args:
        student: raw projections before the head split, (B, L, D_student), or (T, D_student) with `cu_seqlens`;
            fp32, bf16, fp16 (fp64 on the reference). A pair (left, right) gives the cross relation, e.g. (query, key).
        teacher: the same with the teacher's width and, if it likes, another dtype. Gets no gradient.
        num_heads: relation heads; divides both widths.
        mask: (B, L), true or nonzero where a token is valid. Any pattern: padding left or right, or holes. Causal
            order is the order among the valid tokens.
        cu_seqlens: (B + 1,) integer offsets of the sequences in packed tensors, ascending.
        max_seqlen: the longest sequence of a packed batch; without it the GPU kernels plan for T.
        causal: a row sees the columns up to its own position only.
        reduction: `"mean"` (sum over sequences / B, empty ones included), `"sum"`, or `"none"` (B,).
        backend: `"auto"`, `"reference"`, `"cpp"`, `"triton"`, `"cuda"`.

    Returns:
        The loss in nats, fp32 (fp64 for fp64 input): a scalar, or (B,) for `"none"`.

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit, before any work; NaN in a CPU teacher.
        RuntimeError: an explicitly chosen backend cannot run, or a derivative is asked for that there is none of: a
            second one, forward mode, or one by a transform of torch.func (vmap included).
    """
    lefts, rights = _operands(student, teacher)
    _check_operands(lefts, rights, num_heads, cu_seqlens is not None)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}; allowed are 'mean', 'sum' and 'none'")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, not {type(causal).__name__}")
    x = lefts["student"]
    # A double-precision teacher asks for the same backends as a double-precision student.
    dtype = torch.float64 if torch.float64 in (x.dtype, lefts["teacher"].dtype) else x.dtype
    width = max(operand.shape[-1] for operand in lefts.values()) // num_heads
    length = x.shape[-2] if max_seqlen is None else max_seqlen
    chosen = backends.resolve("relation_kl", backend, x.device, dtype, width, length)
    starts, lengths, order, longest = sequences.layout(x, mask, cu_seqlens, max_seqlen)
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, rights.get("student")) if t is not None)
    divisor = max(starts.shape[0], 1) if reduction == "mean" else 1
    rest = (starts, lengths, order, longest, num_heads, causal, divisor, with_grad)
    call = Call(x, rights.get("student"), lefts["teacher"], rights.get("teacher"), *rest)
    reduced = reduction != "none"
    if with_grad:
        loss, _, _ = _RelationKL.apply(*call, reduced, chosen)
    else:
        loss = _reduce(_OPS[chosen](*call)[0], divisor, reduced)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not loss.isfinite().all():
        _raise_not_finite(_OPS[chosen](*call._replace(with_grad=False))[0], lefts, rights)
    return loss


def _raise_not_finite(losses: Tensor, lefts: dict[str, Tensor], rights: dict[str, Tensor]) -> None:
    """Name the sequences and the tensor behind a loss that is not finite, whose `losses` are computed once more."""
    sequences = torch.isfinite(losses).logical_not().nonzero().flatten().tolist()
    for name in ("teacher", "student"):
        for x in (lefts[name], rights.get(name)):
            if x is not None and not torch.isfinite(x).all():
                raise ValueError(f"{name} holds NaN or infinity; the loss of sequences {sequences[:8]} is not finite")
    raise ValueError(f"the loss of sequences {sequences[:8]} is not finite: the relation scores overflow")


def _operands(student, teacher) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    lefts, rights = {}, {}
    if isinstance(student, (tuple, list)) != isinstance(teacher, (tuple, list)):
        raise TypeError("student and teacher must both be one tensor (self relation) or both a pair (left, right)")
    for name, given in (("student", student), ("teacher", teacher)):
        pair = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        if len(pair) not in (1, 2) or not all(isinstance(x, Tensor) for x in pair):
            raise TypeError(f"{name} must be a tensor or a pair (left, right) of tensors, not {type(given).__name__}")
        for x in pair:
            plain_tensors.check_plain("relation_kl", name, x)
        # A last dimension that is not dense cannot be read in rows.
        pair = tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in pair)
        lefts[name] = pair[0]
        if len(pair) == 2:
            rights[name] = pair[1]
    return lefts, rights


def _check_operands(lefts: dict[str, Tensor], rights: dict[str, Tensor], num_heads: int, packed: bool) -> None:
    dims, form = (2, "(T, D) with cu_seqlens") if packed else (3, "(B, L, D)")
    leading, device = lefts["student"].shape[:-1], lefts["student"].device
    for side, tensors in (("left", lefts), ("right", rights)):
        for name, x in tensors.items():
            what = f"{name} ({side})" if rights else name
            if x.dim() != dims:
                raise ValueError(f"{what} has shape {tuple(x.shape)}; expected {form}")
            if not x.is_floating_point() or x.dtype not in (*backends.KERNEL_DTYPES, torch.float64):
                raise TypeError(f"{what} is {x.dtype}; allowed are float32, bfloat16, float16 and float64")
            if x.shape[-1] == 0:
                raise ValueError(f"{what} has shape {tuple(x.shape)}: its width is zero")
            if x.shape[:-1] != leading:
                raise ValueError(
                    f"{what} has shape {tuple(x.shape)}, but the student has {tuple(lefts['student'].shape)}:"
                    " only the width may differ"
                )
            if x.device != device:
                raise ValueError(f"{what} is on {x.device}, the student on {device}")
            if name == "teacher" and x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{what} requires a gradient; relation_kl gives none to the teacher: detach it")
            if side == "right" and x.shape != lefts[name].shape:
                raise ValueError(
                    f"the {name}'s right operand has shape {tuple(x.shape)}, its left {tuple(lefts[name].shape)}"
                )
            if side == "right" and x.dtype != lefts[name].dtype:
                raise TypeError(f"the {name}'s right operand is {x.dtype}, its left {lefts[name].dtype}")
    check_num_heads(num_heads, {name: x.shape[-1] for name, x in lefts.items()})


def check_num_heads(num_heads: int, widths: dict[str, int]) -> None:
    """Raise a ValueError with the nearest allowed numbers unless `num_heads` divides every width."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, not {type(num_heads).__name__}")
    for name, width in widths.items():
        if num_heads < 1 or width % num_heads:
            common = math.gcd(*widths.values())
            allowed = [h for h in range(1, common + 1) if common % h == 0]
            nearest = sorted(sorted(allowed, key=lambda h: abs(math.log(h / max(num_heads, 1))))[:2])
            hint = " and ".join(map(str, nearest)) + (" divide both" if len(nearest) > 1 else " divides both")
            raise ValueError(f"num_heads={num_heads} does not divide the {name}'s width {width}; {hint}")
