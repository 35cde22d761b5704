"""What a fused op reads: dense memory of this process, in which no transform of torch has wrapped the numbers."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch


def check_plain(op: str, name: str, x: Tensor, *, eager: str | None = None, vmap: bool = False) -> None:
    """Raise unless `op` can read its argument `name`, and gives all the derivatives that are being taken.

    Args:
        op: its name, in `fastkd.ops` and in the messages.
        eager: the differentiable form in plain torch that a message points to; None is the op's own.
        vmap: whether the op may be called under `torch.vmap`.

    Raises:
        TypeError: a DTensor, a nested tensor, or a sparse layout.
        RuntimeError: forward-mode differentiation, whose derivative would silently be lost, or a transform of
            `torch.func`. Backward and `torch.autograd.grad` are what the ops have.
    """
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor; call {op} on the local tensor ({name}.to_local())")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {x.layout}; {op} reads dense tensors: {name}.to_dense()")
    if x.is_nested:  # in strides; a jagged one has a layout of its own
        raise TypeError(f"{name} is a nested tensor; {op} reads dense tensors: {name}.to_padded_tensor(0.0)")
    if torch.compiler.is_compiling():
        return
    if _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        _check_transforms(op, name, x, eager or f"fastkd.ops.{op}.eager_{op}", vmap)


def _check_transforms(op: str, name: str, x: Tensor, eager: str, vmap: bool) -> None:
    wrapped = []  # by the transforms of torch.func that x takes part in, from the innermost on
    while _functorch.is_functorch_wrapped_tensor(x):
        wrapped.append(x)
        x = _functorch.get_unwrapped(x)
    # A batch has no tangent of its own: what it wraps may have one.
    if any(forward_ad.unpack_dual(y).tangent is not None for y in (*wrapped, x) if not _functorch.is_batchedtensor(y)):
        raise RuntimeError(
            f"{name} has a tangent, but {op} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); "
            f"{eager} (plain torch) has one"
        )
    if any(y.requires_grad for y in wrapped if _functorch.is_gradtrackingtensor(y)):
        raise RuntimeError(
            f"{name} is differentiated by torch.func (grad, vjp, jacrev), which {op} does not support; use "
            f"loss.backward() or torch.autograd.grad, or {eager} (plain torch)"
        )
    if not vmap and any(map(_functorch.is_batchedtensor, wrapped)):
        raise RuntimeError(
            f"{name} is batched by torch.vmap, which {op} does not support: it takes a batch as it is; "
            f"{eager} (plain torch) works under vmap"
        )
