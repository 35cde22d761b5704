"""What backward does with a gradient that forward has computed: multiply it by the upstream gradient.

The saved gradient has the factors of the op's reduction in it, so that nothing is left to do where upstream is exactly
one, as in `loss.backward()`; in fp16, where they would underflow, backward multiplies by them too. The product is taken
where the gradient lies if the graph ends with this backward: a new tensor costs twice the time.
"""

import torch
from torch import Tensor

_library = torch.library.Library("fastkd", "FRAGMENT")

# grad, contiguous, in fp32, bf16 or fp16, is multiplied where it lies by factor, one number in fp32 on the same device:
# in fp32 and rounded once, and without touching memory where the factor is one. The host does not wait to know.
_SCHEMA = "(Tensor(a!) grad, Tensor factor) -> ()"


def _triton(grad: Tensor, factor: Tensor) -> None:
    from fastkd.kernels.cos_nce import scale_gradient as launch

    launch(grad, factor)


for _backend in ("triton", "cuda"):
    _library.define(f"scale_gradient_{_backend}{_SCHEMA}")
    torch.library.register_fake(f"fastkd::scale_gradient_{_backend}", lambda grad, factor: None, lib=_library)
_library.impl("scale_gradient_triton", _triton, "CUDA")
_SCALE = {name: getattr(torch.ops.fastkd, f"scale_gradient_{name}").default for name in ("triton", "cuda")}


def refuse_second_derivative(op: str) -> None:
    """To be called in backward: under create_graph=True the saved gradient would silently count as a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative; fastkd.ops.{op}.eager_{op} (plain torch) has one")


def times(grad: Tensor, factor: Tensor, backend: str) -> Tensor:
    """grad · factor, in fp32 (fp64) and rounded once to the gradient's dtype.

    Args:
        grad: the saved gradient, contiguous. Its memory becomes the result's unless somebody may ask for it again.
        factor: fp32 (fp64 for fp64); one number, or of any shape that expands to the gradient's.
        backend: which made the gradient. Those of CUDA have a kernel for a factor of one number.
    """
    kept = (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_legacy_batchedtensor(factor)  # is_grads_batched=True: many upstream gradients
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )
    if factor.dim() == 0 and not kept:
        if grad.is_cpu:
            number = factor.item()
            return grad if number == 1 else grad.mul_(number)
        if backend in _SCALE:
            _SCALE[backend](grad, factor)
            return grad
    if factor.dim() == 0:
        # Of a number without dimensions torch makes one of the gradient's dtype first.
        factor = factor.reshape((1,) * grad.dim())
    if kept:
        return torch.mul(grad, factor).to(grad.dtype)
    if grad.is_cpu and grad.dim() > 2 and grad.itemsize < factor.itemsize and factor.numel() == grad.shape[0]:
        # A broadcast product of two dtypes converts through temporaries on the CPU: half as slow again, and twenty
        # times where they are fresh pages. One with a number is computed in fp32 and rounded once.
        for sequence, number in zip(grad, factor.flatten().tolist(), strict=True):
            sequence.mul_(number)
        return grad
    return grad.mul_(factor)
