r"""The distance between a student's gradient attributions and its teacher's (after AD-KD, Wu et al., ACL 2023, with a
mean over each sequence's own tokens), and its gradient, sequence by sequence.

With G = ∂f/∂e the gradient of a class, x what it is multiplied with (embeddings, less the baseline) and âT the
teacher's normalised scores, for a sequence of the tokens i = 1 .. n

    a_i = ‖G_i ⊙ x_i‖₂  ("norm"),  or  Σ_d G_id x_id  ("sum");  without x, saliency:  ‖G_i‖₂
    â   = a / N,  N = ‖a‖₂ ("l2"), ‖a‖₁ ("l1") or 1 (None)
    D   = Σ_i φ(â_i - âT_i),  φ(z) = z² ("l2"), |z| ("l1"), or 0.5 z² below |z| = 1 and |z| - 0.5 above ("smooth_l1")

and the distance of a batch is 1/B Σ_b 1/n_b Σ_c D_bc over sequences b and explained classes c.

**Gradient.** With s_i = φ'(â_i - âT_i) and v = ∂N/∂a (â for "l2", sign a for "l1", 0 for None)

    w_i = ∂D/∂a_i = (s_i - v_i Σ_j s_j â_j) / N
    "norm":  ∂D/∂G_i = w_i / a_i · (G_i ⊙ x_i) ⊙ x_i,  ∂D/∂x_i = w_i / a_i · (G_i ⊙ x_i) ⊙ G_i;  0 where a_i = 0
    "sum":   ∂D/∂G_i = w_i x_i,                        ∂D/∂x_i = w_i G_i

summed over classes for x. w needs all scores of the sequence, so G and x are read twice; a sequence of 64 tokens by 384
floats is 2 · 98 KB, which the second reading finds in a cache.

A vector of zeros has no derivative and gets 0. Sequences without a token, and those that the teacher explains by
nothing (âT = 0 everywhere), add 0 and get 0. Where a D is not finite (NaN or an infinity in what the mask leaves, or
norms that overflow) it is NaN and its gradient 0, so that a step can leave it out.

Forward returns the distance and the gradients, with the factors 1/(B n_b) in them, so that backward has nothing to do
where upstream is one; in fp16, where they would underflow, backward multiplies by them.
"""

import torch
from torch import Tensor

from fastkd.ops import backends, plain_tensors, upstream
from fastkd.ops.attribution_scores import DISTANCES, NORMS, REDUCTIONS, distance, length, normalise

_library = torch.library.Library("fastkd", "FRAGMENT")

# One schema for every backend.
#   gradient (B, K, L, D)       G of K classes; the last dimension dense, the others of any stride
#   inputs (B, L, D)            x, in the dtype of G, of any stride but the last; None for saliency
#   teacher (B, K, L)           âT, contiguous, fp32 (fp64 for fp64)
#   mask (B, L) bool            where a token is; None everywhere. Elsewhere G, x and âT may hold anything, NaN included
# Returns D_bk / (B n_b), (B, K) in fp32 (fp64); and the gradients with respect to G and x of their sum, or, unless
# `weighted`, of the sum of D, in the dtype of G, contiguous; empty where they are not wanted.
_SCHEMA = (
    "(Tensor gradient, Tensor? inputs, Tensor teacher, Tensor? mask, bool weighted, str reduce, str norm, str kind,"
    " bool gradient_wanted, bool inputs_wanted) -> (Tensor, Tensor, Tensor)"
)
_KERNEL_BACKENDS = ("reference", "cpp", "triton", "cuda")
_DTYPES = (*backends.KERNEL_DTYPES, torch.float64)


def eager_attribution_distance(
    gradient: Tensor,
    inputs: Tensor | None,
    teacher: Tensor,
    mask: Tensor,
    reduce: str = "norm",
    norm: str | None = "l2",
    kind: str = "l2",
) -> Tensor:
    """The definition in plain torch, differentiable twice; what benchmarks time as eager, and compile.

    Every kernel is tested against this in fp64. Shapes as `attribution_distance` takes them; mask (B, L) bool.
    """
    if gradient.dim() == 4:
        inputs, keep = None if inputs is None else inputs[:, None], mask[:, None]
    else:
        keep = mask
    product = (gradient if inputs is None else gradient * inputs).masked_fill(~keep[..., None], 0)
    scores = product.sum(-1) if reduce == "sum" else length(product)
    return distance(normalise(scores, norm), teacher, mask, kind)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(gradient, inputs, teacher, mask, weighted, reduce, norm, kind, gradient_wanted, inputs_wanted):
    """The gradient written out: there is no autograd."""
    g = gradient.to(_wide(gradient.dtype))
    x = None if inputs is None else inputs.to(g.dtype)[:, None]
    counted = (teacher != 0).any(-1, keepdim=True)
    weight = _weights(gradient, mask)[:, None]
    if mask is not None:
        keep = mask[:, None]
        g = g.masked_fill(~keep[..., None], 0)
        x = None if x is None else x.masked_fill(~keep[..., None], 0)
        counted = (teacher.masked_fill(~keep, 0) != 0).any(-1, keepdim=True) & keep
    product = g if x is None else g * x
    scores = product.sum(-1) if reduce == "sum" else product.square().sum(-1).sqrt()
    size = torch.ones_like(scores[..., :1])
    if norm != "none":
        size = torch.linalg.vector_norm(scores, ord=1 if norm == "l1" else 2, dim=-1, keepdim=True)
    inverse = (1 / size + 0 * size).masked_fill(size == 0, 0)  # an infinite size must not end as the inverse 0
    normalised = scores * inverse
    apart = normalised - teacher
    if kind == "l2":
        each, slope = apart.square(), 2 * apart
    elif kind == "l1":
        each, slope = apart.abs(), apart.sign()
    else:
        slope = apart.clamp(-1, 1)
        each = torch.where(apart.abs() < 1, 0.5 * apart.square(), apart.abs() - 0.5)
    slope = slope.where(counted, 0)
    sums = each.where(counted, 0).sum(-1)
    finite = sums.isfinite()
    sums = (sums * weight).masked_fill(~finite, torch.nan)
    if not (gradient_wanted or inputs_wanted):
        return sums, gradient.new_empty(0), gradient.new_empty(0)
    along = (slope * normalised).sum(-1, keepdim=True)
    turn = {"l2": normalised, "l1": scores.sign(), "none": torch.zeros_like(scores)}[norm]
    pull = (slope - turn * along) * inverse
    if weighted:
        pull = pull * weight[..., None]
    pull = pull.where(counted & finite[..., None], 0)
    if reduce == "norm":
        direction = product * torch.where(scores == 0, 0, 1 / scores)[..., None]
        of_gradient, of_inputs = (direction if x is None else direction * x), direction * g
    else:
        of_gradient, of_inputs = x.expand_as(g), g
    pull = pull[..., None]
    made = [(pull * part).where(pull != 0, 0) for part in (of_gradient, of_inputs)]
    none = gradient.new_empty(0)
    return (
        sums,
        made[0].to(gradient.dtype).contiguous() if gradient_wanted else none,
        made[1].sum(1).to(gradient.dtype).contiguous() if inputs_wanted else none.clone(),
    )


def _weights(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """1 / (B n_b), (B,)."""
    batch, length_ = max(gradient.shape[0], 1), max(gradient.shape[-2], 1)
    if mask is None:
        return gradient.new_full((gradient.shape[0],), 1 / (batch * length_), dtype=_wide(gradient.dtype))
    return 1 / (mask.sum(1).clamp(min=1).to(_wide(gradient.dtype)) * batch)


def _fake(gradient, inputs, teacher, mask, weighted, reduce, norm, kind, gradient_wanted, inputs_wanted):
    return (
        gradient.new_empty(gradient.shape[:2], dtype=_wide(gradient.dtype)),
        gradient.new_empty(gradient.shape if gradient_wanted else (0,)),
        gradient.new_empty(inputs.shape if inputs_wanted else (0,)),
    )


def _without_autocast(*arguments):
    with torch.autocast(arguments[0].device.type, enabled=False):  # results must not depend on the caller's autocast
        return _reference(*arguments)


def _triton(*arguments):
    from fastkd.kernels import attribution_distance as kernels

    return kernels.attribution_distance(*arguments)


for _backend in _KERNEL_BACKENDS:
    _library.define(f"attribution_distance_{_backend}{_SCHEMA}")
    torch.library.register_fake(f"fastkd::attribution_distance_{_backend}", _fake, lib=_library)
_library.impl("attribution_distance_reference", _without_autocast, "CompositeExplicitAutograd")
_library.impl("attribution_distance_triton", _triton, "CUDA")
_OPS = {name: getattr(torch.ops.fastkd, f"attribution_distance_{name}").default for name in _KERNEL_BACKENDS}


backends.register_kernels("attribution_distance")


class _AttributionDistance(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        *call, backend = arguments
        sums, *gradients = _OPS[backend](*call)
        return sums.sum(), *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        gradient, _, _, mask, weighted, *_, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], None if weighted else _weights(gradient, mask))

    @staticmethod
    def backward(ctx, factor, *_):
        upstream.refuse_second_derivative("attribution_distance")
        if factor is None:
            return (None,) * 11
        *gradients, weights = ctx.saved_tensors

        def times(grad: Tensor) -> Tensor:
            by = factor if weights is None else (factor * weights).reshape(-1, *(1,) * (grad.dim() - 1))
            return upstream.times(grad, by, ctx.backend)

        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return *[times(grad) if needed else None for grad, needed in wanted], *(None,) * 9


def attribution_distance(
    gradient: Tensor,
    inputs: Tensor | None,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduce: str = "norm",
    norm: str | None = "l2",
    kind: str = "l2",
    backend: str = "auto",
) -> Tensor:
    """How far the student's gradient attributions are from its teacher's scores; the formula stands above.

    Args:
        gradient: G, (B, L, D), or (B, C, L, D) of several classes. fp32, bf16, fp16 (fp64 on the reference).
        inputs: x (B, L, D), what G is multiplied with, in G's dtype: embeddings, less the baseline. None for saliency.
        teacher: normalised scores (B, L) or (B, C, L), of any of these dtypes. Gets no gradient.
        mask: (B, L) bool or integer, true or nonzero at tokens; any pattern. Without one every place holds a token.
        reduce: "norm" or "sum" over dimensions; saliency has the norm.
        norm: "l2", "l1", or None: over what a sequence's scores are normalised.
        kind: "l2", "l1" or "smooth_l1", the distance of two scores.
        backend: "auto", "reference", "cpp", "triton", "cuda".

    Returns:
        The distance, a scalar, fp32 (fp64 for fp64). NaN where a sequence's is not finite; such a sequence gets no
        gradient, so that training can skip the step.

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit, before any work.
        RuntimeError: an explicitly chosen backend cannot run, or a derivative is asked for that there is none of: a
            second one, forward mode, or one by a transform of torch.func (vmap included).
    """
    _check(gradient, inputs, teacher, mask, reduce, norm, kind)
    length_, width = gradient.shape[-2:]
    chosen = backends.resolve("attribution_distance", backend, gradient.device, gradient.dtype, width, length_)
    valid = None if mask is None else mask if mask.dtype == torch.bool else mask != 0
    g, t = (gradient, teacher) if gradient.dim() == 4 else (gradient.unsqueeze(1), teacher.unsqueeze(1))
    g, x = _dense(g), None if inputs is None else _dense(inputs)
    wanted = [torch.is_grad_enabled() and y is not None and y.requires_grad for y in (gradient, inputs)]
    weighted = gradient.dtype != torch.float16
    t = t.detach().to(_wide(gradient.dtype)).contiguous()
    call = (g, x, t, valid, weighted, reduce, norm or "none", kind, *wanted)
    return _AttributionDistance.apply(*call, chosen)[0] if any(wanted) else _OPS[chosen](*call)[0].sum()


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check(gradient, inputs, teacher, mask, reduce, norm, kind) -> None:
    for name, given, allowed in (("reduce", reduce, REDUCTIONS), ("norm", norm, NORMS), ("kind", kind, DISTANCES)):
        if given not in allowed:
            raise ValueError(f"{name}={given!r}; allowed are {', '.join(map(repr, allowed))}")
    if inputs is None and reduce != "norm":
        raise ValueError(f"inputs=None (saliency) has no reduce={reduce!r}; it is the norm of the gradient")
    tensors = {"gradient": gradient, "inputs": inputs, "teacher": teacher, "mask": mask}
    for name, x in tensors.items():
        if x is None and name in ("inputs", "mask"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        plain_tensors.check_plain("attribution_distance", name, x)
        if name == "mask":
            if x.is_floating_point():  # an additive mask (0 and -inf) means the opposite
                raise TypeError(f"mask is {x.dtype}; allowed are bool and integers, true or nonzero at tokens")
        elif x.dtype not in _DTYPES:
            raise TypeError(f"{name} is {x.dtype}; allowed are float32, bfloat16, float16 and float64")
        if x.device != gradient.device:
            raise ValueError(f"{name} is on {x.device}, the gradient on {gradient.device}")
    shape = tuple(gradient.shape)
    if gradient.dim() not in (3, 4):
        raise ValueError(f"gradient has shape {shape}; expected (B, L, D) or (B, C, L, D)")
    if shape[-1] == 0:
        raise ValueError(f"gradient has shape {shape}: its width is zero")
    places = (shape[0], shape[-2])
    expected = {"inputs": (*places, shape[-1]), "teacher": shape[:-1], "mask": places}
    for name, wanted in expected.items():
        if tensors[name] is not None and tensors[name].shape != wanted:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; the gradient's {shape} asks for {wanted}")
    if inputs is not None and inputs.dtype != gradient.dtype:
        raise TypeError(f"inputs are {inputs.dtype}, the gradient {gradient.dtype}; both must be of one dtype")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires a gradient; attribution_distance gives none to the teacher: detach it")
