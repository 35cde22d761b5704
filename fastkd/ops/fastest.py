"""Which backend was measured to be fastest on a GPU, per shape class: what `backend="auto"` follows.

A class is an op, a compute capability, a dtype, the width of the rows the kernel works on, and the longest sequence. A
class that stands here without an order is not measured yet, and `auto` takes the op's own order of preference. Entries
come from `make gpu` (benchmarks/results/), where every backend is timed by graph replay, forward and backward together.
"""

import torch

# Upper bounds of the classes. Beyond the last one the last class counts.
WIDTHS = (16, 32, 64, 128)
LENGTHS = (128, 512, 2048, 8192)

_NOT_MEASURED = (None, None, None, None)  # by length
_ORDERS: dict[tuple, dict[int, tuple]] = {
    ("relation_kl", (9, 0), torch.bfloat16): dict.fromkeys(WIDTHS, _NOT_MEASURED),
    ("relation_kl", (9, 0), torch.float16): dict.fromkeys(WIDTHS, _NOT_MEASURED),
    ("relation_kl", (9, 0), torch.float32): dict.fromkeys(WIDTHS, _NOT_MEASURED),
}


_MEASURED = {
    (op, dtype)
    for (op, _, dtype), by_width in _ORDERS.items()
    if any(order for by_length in by_width.values() for order in by_length)
}


def measured_order(
    op: str, device: torch.device, dtype: torch.dtype, width: int, length: int
) -> tuple[str, ...] | None:
    """The backends of `op` on this GPU for this class, the fastest first, or None where nobody has measured."""
    if (op, dtype) not in _MEASURED:  # and no look at the length, on which torch.compile would set a guard
        return None
    by_width = _ORDERS.get((op, torch.cuda.get_device_capability(device), dtype))
    if by_width is None:
        return None
    by_length = by_width[next((bound for bound in WIDTHS if width <= bound), WIDTHS[-1])]
    return by_length[next((i for i, bound in enumerate(LENGTHS) if length <= bound), len(LENGTHS) - 1)]
