"""Which rows of a tensor belong to which sequence: by a mask, by offsets, or all of them."""

import torch
from torch import Tensor


def layout(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None):
    """Validate the description of a batch and turn it into tensors that a kernel reads.

    Args:
        x: (B, L, D) padded, or (T, D) with `cu_seqlens`.
        mask: (B, L) bool or integer, true or nonzero where a token is valid.
        cu_seqlens: (B + 1,) int32 or int64 offsets of packed sequences; `max_seqlen` is the longest of them.

    Returns:
        starts (B,) int64, lengths (B,) int32, order (B, L) int32 or None, and a bound of `lengths`, as the schema in
        `fastkd/ops/relation_kl.py` describes them. The host does not wait for a GPU.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit; on the CPU also offsets that do not.
    """
    for name, given in (("mask", mask), ("cu_seqlens", cu_seqlens)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(given).__name__}")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))):
        raise TypeError(f"max_seqlen must be an int, not {type(max_seqlen).__name__}")
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("mask and cu_seqlens were both given; a packed batch has no mask")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype};"
                " expected (B + 1,) int32 or int64"
            )
        offsets = cu_seqlens.to(x.device, torch.int64)
        lengths = offsets.diff()
        longest = x.shape[0] if max_seqlen is None else min(max_seqlen, x.shape[0])
        if not torch.compiler.is_compiling() and x.device.type == "cpu":
            _check_offsets(offsets, x.shape[0], max_seqlen)
            longest = int(lengths.max()) if lengths.numel() else 0
        return offsets[:-1].contiguous(), lengths.int(), None, longest
    if max_seqlen is not None:
        raise ValueError("max_seqlen belongs to cu_seqlens")
    batch, length = x.shape[:2]
    starts = torch.zeros(batch, dtype=torch.int64, device=x.device)
    if mask is None:
        return starts, torch.full((batch,), length, dtype=torch.int32, device=x.device), None, length
    if mask.shape != (batch, length):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; the student's {tuple(x.shape)} asks for {(batch, length)}"
        )
    if mask.is_floating_point():  # an additive mask (0 and -inf) means the opposite
        raise TypeError(f"mask is {mask.dtype}; allowed are bool and integers, true or nonzero where a token is valid")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, the student on {x.device}")
    valid = mask if mask.dtype == torch.bool else mask != 0
    order = torch.argsort(valid.logical_not(), dim=1, stable=True).int()
    return starts, valid.sum(1, dtype=torch.int32), order, length


def _check_offsets(offsets: Tensor, rows: int, max_seqlen: int | None) -> None:
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or (lengths < 0).any() or int(offsets[-1]) > rows:
        raise ValueError(
            f"cu_seqlens={offsets.tolist()} must start at 0, never fall, and end at or below the {rows} packed rows"
        )
    if max_seqlen is not None and lengths.numel() and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}, but cu_seqlens holds a sequence of {int(lengths.max())}")
