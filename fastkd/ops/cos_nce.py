r"""COS-NCE, the angular contrastive loss of LRC-BERT (Fu et al., AAAI 2021, arXiv 2012.07335, equations 1 and 2).

With cos(x, y) = x·y / (‖x‖ ‖y‖), the angular distance g = 1 − cos, a student's vector s, its teacher's vector t and
K negatives n_k, which are teacher's vectors of other samples,

    loss = 1/(2K) · Σ_k [2 − (g(n_k, s) − g(t, s))] + g(t, s)  =  2 − 3/2 · cos(t, s) + 1/2 · mean_k cos(n_k, s)

between 0 and 4. A vector x̂ is x / ‖x‖, and zero where ‖x‖ ≤ 1e-8: such a vector has the cosine 0 with every other, and
no gradient. With K = 0 the mean is the neutral 0: loss = 2 − 3/2 · cos(t, s).

**Collapse.** The loss is linear in the cosines, so of all negatives only their sum is needed, and no B × B matrix.
With T = Σ_j t̂_j over the batch, X_b the sum of those t̂_j that are no negatives of sample b, and K_b = B − their number,

    loss_b = 2 − 3/2 · ŝ_b·t̂_b + 1/(2 K_b) · ŝ_b·(T − X_b)

X_b is t̂_b alone; where samples share an id (`exclude`), it is the sum over all samples of b's id; with explicit
negatives T is their sum, and X_b that of those with b's id. O(B·D) work.

**Gradient**, with u_b = − 3/2 · t̂_b + 1/(2 K_b) · (T − X_b):     d loss_b / d s_b = (u_b − (u_b·ŝ_b) ŝ_b) / ‖s_b‖

The teacher gets none. **Tokens** (B, L, D) are compared position by position: T_p sums the samples that have a token
at position p, and a sample's loss is the mean over its own n_b positions; without any it is zero. **Layers** are
independent of each other.

Forward returns the loss and, where the student needs it, its gradient with the factors of the reduction, so that
backward has nothing to do where upstream is one; in fp16, where they would underflow, backward multiplies by them.
"""

import torch
from torch import Tensor

from fastkd.ops import backends, pairs, upstream, vector_layout

EPSILON = 1e-8  # a vector of this norm or less counts as zero

_library = torch.library.Library("fastkd", "FRAGMENT")

# One pair of schemas for every backend. Vectors are (M, N, L, D): layers, samples, positions, width; the last dimension
# dense, the others of any stride. What is pooled vectors or explicit negatives elsewhere is a view of this form.
#   mask (N, L) bool       where a vector counts; None everywhere. One that does not may hold anything, NaN included
# Sums of unit vectors, (M, 1 + num_classes, L, D) fp32 (fp64 for fp64): over all samples, then over those of each class
#   classes (N,) int32     the class of each sample, or −1; on CUDA there may be fewer classes than `num_classes`
# Losses (M, N, L) fp32 (fp64 for fp64), zero where the mask is false, and the gradient of each with respect to its own
# vector, in the student's dtype, times weights / divisor before it is rounded; empty unless `with_grad`.
#   sums, counts (1 + num_classes, L)   of the negatives, and how many vectors each sum holds, in the sums' dtype
#   excluded (N,) int32    the class that is not a negative of this sample, or −1
#   own                    whether a sample without such a class takes its own teacher vector off the sum
#   weights (N,)           in the sums' dtype, of any stride; None is one
_SCHEMAS = {
    "cos_nce_sums": "(Tensor vectors, Tensor? mask, Tensor? classes, SymInt num_classes) -> Tensor",
    "cos_nce": (
        "(Tensor student, Tensor teacher, Tensor sums, Tensor counts, Tensor? mask, Tensor? excluded, bool own,"
        " Tensor? weights, SymInt divisor, bool with_grad) -> (Tensor, Tensor)"
    ),
}
_KERNEL_BACKENDS = ("reference", "cpp", "triton", "cuda")


def eager_cos_nce(student: Tensor, teacher: Tensor, negatives: Tensor, pairs: Tensor) -> Tensor:
    """The definition in plain torch, pair by pair, differentiable.

    Every kernel is tested against this in fp64; in the tensors' own dtype it is the `pairwise` that benchmarks time.

    Args:
        student, teacher: (..., B, D); positions and layers are leading dimensions.
        negatives: (..., K, D), for every sample the same; or (..., B, K, D).
        pairs: (..., B, K) bool, whether k is a negative of sample b.

    Returns:
        (..., B) in the student's dtype.
    """
    x = _unit(student)
    shared = negatives.dim() == student.dim()
    cosines = x @ _unit(negatives).mT if shared else (_unit(negatives) @ x[..., None])[..., 0]
    mean = cosines.where(pairs, 0).sum(-1) / pairs.sum(-1).clamp(min=1)
    return 2 - 1.5 * (x * _unit(teacher)).sum(-1) + 0.5 * mean


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = norm <= EPSILON
    return (x / norm.masked_fill(zero, 1)).masked_fill(zero, 0)  # the gradient is zero too, not 1 / EPSILON


def _inverse_norm(x: Tensor) -> Tensor:
    squares = x.square().sum(-1, keepdim=True)
    # A square that is infinite must not end as the inverse 0.
    return (squares.rsqrt() + 0 * squares).masked_fill(squares <= EPSILON**2, 0)


def _reference_sums(vectors, mask, classes, num_classes):
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    units = vectors.to(dtype)
    if mask is not None:
        units = units.masked_fill(~mask[..., None], 0)
    units = units * _inverse_norm(units)
    sums = units.new_zeros(units.shape[0], 1 + num_classes, *units.shape[2:])
    if num_classes:
        sums.index_add_(1, classes.long() + 1, units)
    sums[:, 0] = units.sum(1)
    return sums


def _reference(student, teacher, sums, counts, mask, excluded, own, weights, divisor, with_grad):
    """The collapsed form, its gradient written out: there is no autograd."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t, sums, counts = (x.to(dtype) for x in (student, teacher, sums, counts))
    if mask is not None:
        s, t = (x.masked_fill(~mask[..., None], 0) for x in (s, t))
    inverse = _inverse_norm(s)
    s, t = s * inverse, t * _inverse_norm(t)
    others, count = sums[:, :1], counts[:1, :, None]
    if own and excluded is None:
        others, count = others - t, count - 1
    elif excluded is not None:
        row, has = excluded.clamp(min=0).long() + 1, (excluded >= 0)[:, None, None]
        alone = t if own else torch.zeros_like(t)
        others = others - sums[:, row].where(has, alone) if sums.shape[1] > 1 else others - alone
        count = count - counts[row, :, None].where(has, float(own)) if sums.shape[1] > 1 else count - float(own)
    u = -1.5 * t + others * (0.5 / count.clamp(min=1)).where(count > 0.5, 0)
    along = (u * s).sum(-1, keepdim=True)
    losses = 2 + along[..., 0]
    if mask is not None:
        losses = losses.masked_fill(~mask, 0)
    if not with_grad:
        return losses, student.new_empty(0)
    factor = inverse / divisor if weights is None else inverse * (weights.to(dtype) / divisor)[:, None, None]
    return losses, ((u - along * s) * factor).to(student.dtype).contiguous()


def _fake_sums(vectors, mask, classes, num_classes):
    layers, _, positions, width = vectors.shape
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return vectors.new_empty((layers, 1 + num_classes, positions, width), dtype=dtype)


def _fake(student, teacher, sums, counts, mask, excluded, own, weights, divisor, with_grad):
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[:3], dtype=dtype), student.new_empty(student.shape if with_grad else (0,))


def _without_autocast(function):
    def call(vectors, *rest):  # results must not depend on the caller's autocast
        with torch.autocast(vectors.device.type, enabled=False):
            return function(vectors, *rest)

    return call


def _triton(name: str):
    def launch(*arguments):
        from fastkd.kernels import cos_nce as kernels

        return getattr(kernels, name)(*arguments)

    return launch


_FAKES = {"cos_nce_sums": _fake_sums, "cos_nce": _fake}
_REFERENCES = {"cos_nce_sums": _reference_sums, "cos_nce": _reference}
for _name, _schema in _SCHEMAS.items():
    for _backend in _KERNEL_BACKENDS:
        _library.define(f"{_name}_{_backend}{_schema}")
        torch.library.register_fake(f"fastkd::{_name}_{_backend}", _FAKES[_name], lib=_library)
    _library.impl(f"{_name}_reference", _without_autocast(_REFERENCES[_name]), "CompositeExplicitAutograd")
    _library.impl(f"{_name}_triton", _triton(_name), "CUDA")
_SUMS, _LOSS = (
    {backend: getattr(torch.ops.fastkd, f"{name}_{backend}").default for backend in _KERNEL_BACKENDS}
    for name in _REFERENCES
)


backends.register_kernels("cos_nce")


class _CosNce(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # apply() binds names by inspection, on every call
        student, teacher, sums, counts, mask, excluded, own, weights, divisor, per_token, reduced, backend = inputs
        factors = (None, 1) if student.dtype == torch.float16 else (weights, divisor)
        losses, grad = _LOSS[backend](student, teacher, sums, counts, mask, excluded, own, *factors, True)
        return _reduce(losses, weights, divisor, per_token, reduced), grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, *_, weights, ctx.divisor, ctx.per_token, _, ctx.backend = inputs
        ctx.folded = student.dtype != torch.float16
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], None if ctx.folded else weights)

    @staticmethod
    def backward(ctx, factor, *_):
        upstream.refuse_second_derivative("cos_nce")
        if factor is None:
            return (None,) * 12
        grad, weights = ctx.saved_tensors
        if not ctx.folded:
            factor = factor / ctx.divisor
        if weights is not None:
            factor = factor * weights
        if factor.dim():  # (N,) or (M, N); without positions, the samples of explicit negatives lie in their dimension
            samples = grad.shape[1:2] if ctx.per_token else (grad.shape[1] * grad.shape[2],)
            factor = factor.expand(grad.shape[0], *samples)
            factor = factor.reshape(*grad.shape[:2], 1 if ctx.per_token else grad.shape[2], 1)
        return upstream.times(grad, factor, ctx.backend), *(None,) * 11


def _reduce(losses: Tensor, weights: Tensor | None, divisor: int, per_token: bool, reduced: bool) -> Tensor:
    """Losses (M, N, L) to their weighted sum, or to one value per layer and sample."""
    if weights is not None or not reduced:
        losses = losses.sum(2) if per_token else losses.flatten(1)
    if weights is not None:
        losses = losses * weights
    return (losses.sum() if reduced else losses) / divisor


def cos_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    tokens: bool | None = None,
    negatives: Tensor | None = None,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """LRC-BERT's angular contrastive loss between vectors of a student and a teacher; the formula stands above.

    Args:
        student: vectors (B, D), or tokens (B, L, D); several layers in one call are (M, B, D) or (M, B, L, D).
            fp32, bf16, fp16 (fp64 on the reference).
        teacher: of the same shape and, if it likes, another dtype. Gets no gradient.
        mask: (B, L) bool or integer, for tokens: true or nonzero where there is one. Any pattern.
        tokens: says what three dimensions are where no mask does: true for (B, L, D), false for (M, B, D).
        negatives: teacher's vectors that replace the other samples of the batch: (K, D) for all samples, or
            (B, K, D); with layers (M, K, D) or (M, B, K, D). Not for tokens.
        exclude: integer ids (B,), equal where two samples are no negatives of each other (a sentence that occurs
            twice). With explicit negatives a pair: ids (B,), and ids of the negatives, (K,) or (B, K) like these. Ids
            on the CPU serve every device, and those that occur twice are counted there; on CUDA room is made for as
            many as there could be.
        group: the other samples are those of all processes of this group. One all-reduce of D numbers per layer and
            position; every process must bring the same M, L and D, and may bring any B. `mean` is the sum over its own
            samples · processes / B of all, so that the average over the processes, which is what
            DistributedDataParallel takes of gradients, is the mean of one process over the concatenated batch; `sum`
            and `none` are of its own samples. With `exclude` the processes exchange their ids, and the host waits; M,
            L and D are compared in that exchange.
        reduction: `"mean"` over the batch (samples without a token included) and sum over layers; `"sum"` over both; or
            `"none"`, (B,) or (M, B).
        backend: `"auto"`, `"reference"`, `"cpp"`, `"triton"`, `"cuda"`.

    Returns:
        The loss, fp32 (fp64 for an fp64 student).

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit, or a group without this process, before any
            work; on the CPU also a NaN or an infinity.
        RuntimeError: an explicitly chosen backend cannot run, or a derivative is asked for that there is none of: a
            second one, forward mode, or one by a transform of torch.func (vmap included).
    """
    per_token = vector_layout.check_vectors("cos_nce", student, teacher, mask, tokens)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}; allowed are 'mean', 'sum' and 'none'")
    stacked = student.dim() == (4 if per_token else 3)
    if negatives is not None:
        vector_layout.check_negatives("cos_nce", negatives, student, per_token, group)
    samples = student.shape[stacked]
    each_its_own = negatives is not None and negatives.dim() > student.dim()
    if exclude is not None:
        of_negatives = None if negatives is None else (*(samples,) * each_its_own, negatives.shape[-2])
        exclude = pairs.checked_ids(exclude, samples, of_negatives)
    if group is not None:
        pairs.check_member(group)
    dtypes = (student.dtype, teacher.dtype, student.dtype if negatives is None else negatives.dtype)
    wide = torch.float64 in dtypes  # in any of them, double precision asks for the same backends
    chosen = backends.resolve(
        "cos_nce", backend, student.device, torch.float64 if wide else student.dtype, student.shape[-1]
    )
    s, t = vector_layout.canonical(student, per_token), vector_layout.canonical(teacher, per_token)
    pool, valid = t, None if mask is None else mask if mask.dtype == torch.bool else mask != 0
    if negatives is not None:
        pool = vector_layout.canonical(negatives, each_its_own)
    if each_its_own:  # the samples are positions, each with negatives of its own
        s, t, pool = s.transpose(1, 2), t.transpose(1, 2), pool.transpose(1, 2)
    if student.dtype == torch.float64:
        pool = pool.double()
    counted = (exclude[0][:, None] != exclude[1]).T.to(s.device) if each_its_own and exclude is not None else valid
    classes = pairs.Classes(None, None, 0)
    if exclude is not None and not each_its_own:
        classes = pairs.classes_of(*exclude, group, s)
    sums = _SUMS[chosen](pool, counted, classes.of_negatives, classes.count)
    counts = pairs.counts(pool, counted, classes, sums.dtype)
    weights, divisor = None, 1
    if valid is not None:
        weights = 1 / valid.sum(1).clamp(min=1).to(torch.float64 if student.dtype == torch.float64 else torch.float32)
    elif per_token:
        divisor = max(s.shape[2], 1)
    if group is not None:
        sums, counts, share = pairs.over_all_processes(sums, counts, samples, group)
        if reduction == "mean":
            weights = (share if weights is None else share * weights).expand(s.shape[1])
    elif reduction == "mean":
        divisor = divisor * max(samples, 1)
    call = (s, t, sums, counts, valid, classes.of_samples, negatives is None, weights, divisor)
    reduced = reduction != "none"
    if torch.is_grad_enabled() and student.requires_grad:
        loss, _ = _CosNce.apply(*call, per_token, reduced, chosen)
    else:
        loss = _reduce(_LOSS[chosen](*call, False)[0], weights, divisor, per_token, reduced)
    if student.device.type == "cpu" and not torch.compiler.is_compiling():
        vectors = {"student": student, "teacher": teacher, "negatives": negatives}
        vector_layout.check_finite(loss, vectors, valid, group)
    return loss if reduced or stacked else loss.squeeze(0)
