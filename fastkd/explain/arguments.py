"""What is given to the functions of this room, checked before any work. Each check stands here once."""

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor


def check_whole(name: str, value, least: int = 1) -> None:
    """Raise a ValueError unless `value` is a whole number, `least` at least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}; a whole number is needed, {least} at least")


def check_positive(name: str, value) -> None:
    """Raise a ValueError unless `value` is a positive, finite number."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}; a positive, finite number is needed")


def check_share(name: str, value) -> None:
    """Raise a ValueError unless `value` is a share of tokens that leaves some."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r}; the share of tokens must lie in (0, 1]")


def is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_type(name: str, value, kind: type, hint: str = "") -> None:
    """Raise a TypeError unless `value` is of this kind; `hint` says how to make one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is of type {type(value).__name__}; a {kind.__name__} is needed{hint}")


def check_mask(name: str, mask: Tensor, shape: torch.Size | None = None) -> None:
    """Raise a TypeError unless `mask` is a tensor, a ValueError unless it is (B, L), or of this shape."""
    check_type(name, mask, Tensor)
    if mask.dim() != 2 or (shape is not None and mask.shape != shape):
        raise ValueError(f"{name} is {tuple(mask.shape)}; {'(B, L)' if shape is None else tuple(shape)} is needed")


def as_mask(name: str, mask: Tensor, shape: torch.Size | None = None) -> Tensor:
    """(B, L) bool, true where `mask` is not zero: an attention_mask holds integers, of which `~` makes other integers.
    Raises as `check_mask`."""
    check_mask(name, mask, shape)
    return mask if mask.dtype == torch.bool else mask != 0


def as_ids(special_ids: Iterable[int]) -> tuple[int, ...]:
    """Raises TypeError where they are no ids."""
    try:
        return tuple(int(special) for special in special_ids)
    except (TypeError, ValueError) as error:
        raise TypeError(f"special_ids={special_ids!r}; a list of ids is needed, such as [0, 101, 102]") from error


def check_batches(batches: Iterable, passes: int = 1) -> None:
    """Raise a TypeError unless these are several batches, a ValueError unless they can be gone through so often."""
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is of type {type(batches).__name__}; a list or a loader of batches is needed")
    if passes > 1 and isinstance(batches, Iterator):
        raise ValueError(f"batches can be gone through once, and {passes} times are needed; a list or a loader can")
