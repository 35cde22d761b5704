"""The arrays that a sparse-coded embedding table is stored in; the formula stands in `sparse_embedding.py`."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Arrays(NamedTuple):
    """M kept rows and R coded ones stand for a table of V = M + R rows of width D. In the order of the op's schema:

    slot          (V,)            uint16 or int32   position of each token: a kept row, or M + a coded row
    kept          (M, D)          fp32, fp16, bf16, int8 (fp64 on the reference)
    kept_scale    (M,)            fp32, for int8 rows only
    atom_ids      (R, k)          uint16 or int32   rows of `kept`
    atom_weights  (R, k)          fp32, fp16, int8 (fp64 on the reference)
    weight_scale  (R,)            fp16 or fp32, for int8 weights only
    residual      (R, m)          uint8
    codebook      (m, 256, D / m) fp32 or fp16, with `residual`
    """

    slot: Tensor
    kept: Tensor
    kept_scale: Tensor | None
    atom_ids: Tensor
    atom_weights: Tensor
    weight_scale: Tensor | None
    residual: Tensor | None
    codebook: Tensor | None


class HasArrays(Protocol):
    """What can be looked up in: `fastkd.SparseCode`, or anything else that has these arrays."""

    arrays: Arrays


_INDICES, _REALS = (torch.uint16, torch.int32), (torch.float32, torch.float16)
_FORMATS = Arrays(  # dimensions and dtypes
    slot=(1, _INDICES),
    kept=(2, (*_REALS, torch.bfloat16, torch.int8, torch.float64)),
    kept_scale=(1, (torch.float32,)),
    atom_ids=(2, _INDICES),
    atom_weights=(2, (*_REALS, torch.int8, torch.float64)),
    weight_scale=(1, _REALS),
    residual=(2, (torch.uint8,)),
    codebook=(3, _REALS),
)
_OPTIONAL = ("kept_scale", "weight_scale", "residual", "codebook")


def check_layout(arrays: Arrays) -> None:
    """Raise a ValueError or TypeError that names the first array whose dtype or shape does not fit the others.

    Reads no values: whether indices are in range is checked where a code is loaded, and by the kernels as they read.
    """
    for name, (dims, dtypes), array in zip(Arrays._fields, _FORMATS, arrays, strict=True):
        if array is None and name in _OPTIONAL:
            continue
        if not isinstance(array, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(array).__name__}")
        if type(array).__name__ == "DTensor":
            raise TypeError(f"{name} is a DTensor; look up in local tensors ({name}.to_local())")
        if array.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(array.shape)}; expected {dims} dimension{'s' * (dims > 1)}")
        if array.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} is {array.dtype}; allowed are {allowed}")
        if array.device != arrays.kept.device:
            raise ValueError(f"{name} is on {array.device}, the kept rows on {arrays.kept.device}")
    slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook = arrays
    (rows, width), (coded, atoms) = kept.shape, atom_ids.shape
    if rows + coded != slot.shape[0]:
        raise ValueError(f"{rows} kept and {coded} coded rows are not the {slot.shape[0]} tokens of slot")
    if atom_weights.shape != atom_ids.shape:
        raise ValueError(f"atom_weights has shape {tuple(atom_weights.shape)}, atom_ids {(coded, atoms)}")
    if atom_weights.dtype == torch.float64 != kept.dtype:
        raise TypeError(f"atom_weights is float64, the kept rows are {kept.dtype}")
    for name, scale, of, count in (
        ("kept_scale", kept_scale, kept, rows),
        ("weight_scale", weight_scale, atom_weights, coded),
    ):
        if (of.dtype == torch.int8) != (scale is not None):
            raise ValueError(f"{name} belongs to int8 values and to no others; here are {of.dtype}")
        if scale is not None and scale.shape[0] != count:
            raise ValueError(f"{name} has {scale.shape[0]} values for {count} rows")
    if (residual is None) != (codebook is None):
        raise ValueError("residual and codebook belong together; only one of them is given")
    if residual is not None:
        parts = residual.shape[1]
        if residual.shape[0] != coded:
            raise ValueError(f"residual has {residual.shape[0]} rows for {coded} coded ones")
        if parts < 1 or width % parts or tuple(codebook.shape) != (parts, 256, width // parts):
            raise ValueError(
                f"codebook has shape {tuple(codebook.shape)} for {parts} residual bytes a row of width {width};"
                " expected (bytes, 256, width / bytes)"
            )
