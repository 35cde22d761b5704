"""What the dimensions of vectors mean: samples, positions and layers; and the one form that kernels read."""

import math

import torch
from torch import Tensor

from fastkd.ops import plain_tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FORMS = {True: "tokens (B, L, D) or (M, B, L, D)", False: "vectors (B, D) or (M, B, D)"}


def check_vectors(op: str, student: Tensor, teacher: Tensor, mask: Tensor | None, tokens: bool | None) -> bool:
    """Whether the vectors are tokens.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or three dimensions that may be both.
        RuntimeError: what `check_plain` raises.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        _check_tensor(op, name, x, student)
        if x.shape != student.shape:
            hint = "; project the student first" if x.shape[:-1] == student.shape[:-1] else ""
            raise ValueError(f"teacher has shape {tuple(x.shape)}, the student {tuple(student.shape)}{hint}")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"teacher requires a gradient; {op} gives none to the teacher: detach it")
    if tokens is not None and not isinstance(tokens, bool):
        raise TypeError(f"tokens must be a bool, not {type(tokens).__name__}")
    if mask is None and tokens is None and student.dim() == 3:
        raise ValueError(
            f"student has shape {tuple(student.shape)}: say tokens=True for (B, L, D) or tokens=False for (M, B, D)"
        )
    if mask is not None and tokens is False:
        raise ValueError("mask was given with tokens=False; pooled vectors have no positions to mask")
    per_token = tokens if tokens is not None else mask is not None or student.dim() == 4
    if student.dim() not in ((3, 4) if per_token else (2, 3)):
        raise ValueError(f"student has shape {tuple(student.shape)}; expected {_FORMS[per_token]}")
    if mask is not None:
        _check_mask(mask, student)
    return per_token


def _check_tensor(op: str, name: str, x: Tensor, student: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    plain_tensors.check_plain(op, name, x)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}; allowed are float32, bfloat16, float16 and float64")
    if x.device != student.device:
        raise ValueError(f"{name} is on {x.device}, the student on {student.device}")
    if x.dim() and x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: its width is zero")


def _check_mask(mask: Tensor, student: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, not {type(mask).__name__}")
    if mask.shape != student.shape[-3:-1]:
        expected = tuple(student.shape[-3:-1])
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; the student's {tuple(student.shape)} asks for {expected}"
        )
    if mask.is_floating_point():  # an additive mask (0 and -inf) means the opposite
        raise TypeError(f"mask is {mask.dtype}; allowed are bool and integers, true or nonzero where a token is valid")
    if mask.device != student.device:
        raise ValueError(f"mask is on {mask.device}, the student on {student.device}")


def check_negatives(op: str, negatives: Tensor, student: Tensor, per_token: bool, group) -> None:
    """Raise unless explicit negatives fit a student of vectors (B, D) or (M, B, D)."""
    if per_token:
        raise ValueError("negatives were given for tokens; explicit negatives are for vectors, such as student[mask]")
    if group is not None:
        raise ValueError("negatives and group were both given; explicit negatives replace those of other processes")
    _check_tensor(op, "negatives", negatives, student)
    *layers, samples, width = student.shape
    shared = negatives.dim() == student.dim() and [*negatives.shape[:-2]] == layers
    own = negatives.dim() == student.dim() + 1 and [*negatives.shape[:-2]] == [*layers, samples]
    if not (shared or own) or negatives.shape[-1] != width:
        allowed = " or ".join(
            "(" + ", ".join(map(str, (*leading, "K", width))) + ")" for leading in (layers, (*layers, samples))
        )
        raise ValueError(
            f"negatives has shape {tuple(negatives.shape)}; the student's {tuple(student.shape)} allows {allowed}"
        )
    if negatives.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"negatives require a gradient; {op} gives them none: detach them")


def canonical(x: Tensor, per_token: bool) -> Tensor:
    """A view (M, N, L, D) whose last dimension is dense: layers, samples, positions, width."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if not per_token:
        x = x.unsqueeze(-2)
    return x if x.dim() == 4 else x.unsqueeze(0)


def check_finite(loss: Tensor, vectors: dict[str, Tensor | None], mask: Tensor | None, group=None) -> None:
    """Name the tensor behind a loss that is not finite. Reads the vectors only once something is already wrong."""
    if math.isfinite(loss.detach().sum().item()):
        return
    for name, x in vectors.items():
        if x is not None and not torch.isfinite(x if mask is None else x[..., mask, :]).all():
            raise ValueError(f"{name} holds NaN or infinity; the loss is not finite")
    overflow = "the square of a vector's norm overflows fp32"
    if group is not None:
        raise ValueError(
            f"the loss is not finite, though this process brought finite vectors: another process of the group brought "
            f"NaN or infinity, or {overflow}"
        )
    raise ValueError(f"the loss is not finite: {overflow}")
