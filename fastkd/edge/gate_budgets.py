"""What a gate allows: durations and sizes as people write them, the cell they hold for."""

import re
from dataclasses import dataclass

from fastkd.edge.report_settings import numbers
from fastkd.recipes.sparse_embeddings import parse_bytes

PERCENTILES = ("p50", "p90", "p95", "p99")
_MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass
class Budgets:
    """Most that an artifact may take; what is None is not asked about.

    Args:
        p50, p90, p95, p99: time of a call at `cell`, such as "8ms" or "1.2s".
        size: bytes on disk, such as "14MB".
        memory: peak of the process that ran the cells of `cell`'s threads, Python and its libraries included.
        max_drop: points (hundredths) that the task's first metric may lie below the teacher's.
        max_ratio: how many times the baseline's p50 and bytes the artifact's may be, each in relation to the teacher of
            its own report.
        cell: "batch,length,threads"; None for batch 1, the longest length in the report and 1 thread.

    Raises ValueError on what is none of that, and where nothing is asked about.
    """

    p50: str | None = None
    p90: str | None = None
    p95: str | None = None
    p99: str | None = None
    size: str | int | None = None
    memory: str | int | None = None
    max_drop: float | None = None
    max_ratio: float | None = None
    cell: str | tuple[int, int, int] | None = None

    def __post_init__(self):
        for name in PERCENTILES:
            if getattr(self, name) is not None:
                setattr(self, name, parse_milliseconds(name, getattr(self, name)))
        for name in ("size", "memory"):
            if getattr(self, name) is not None:
                setattr(self, name, _bytes(name, getattr(self, name)))
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError(f"max_drop={self.max_drop}; points that may be lost are needed, 0 or more")
        if self.max_ratio is not None and not self.max_ratio > 0:
            raise ValueError(f"max_ratio={self.max_ratio}; a number above 0 is needed, such as 1.1")
        if self.cell is not None:
            self.cell = _cell(self.cell)
        if all(getattr(self, name) is None for name in self.__dataclass_fields__ if name != "cell"):
            raise ValueError("no budget: give at least one of p50, p90, p95, p99, size, memory, max_drop and max_ratio")


def parse_milliseconds(name: str, duration: str) -> float:
    """8ms is 8, 1.2s is 1200, 800us 0.8. Raises ValueError, which calls it `name`, on what is no duration above 0."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([a-zµμ]+)", str(duration).strip())
    unit = _MILLISECONDS.get(found[2]) if found else None
    if unit is None or not float(found[1]) > 0:
        raise ValueError(f"{name}={duration!r}: a duration is needed, such as 8ms, 800us or 1.2s")
    return float(found[1]) * unit


def _bytes(name: str, size: str | int) -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise ValueError(f"{name}={size!r}: bytes are needed, such as 14MB, 800kB or 12582912") from error


def _cell(given: str | tuple[int, int, int]) -> tuple[int, int, int]:
    words = given.split(",") if isinstance(given, str) else list(given)
    if len(words) != 3:
        raise ValueError(f"cell={given!r}: batch, length and threads are needed, such as 1,128,1")
    return tuple(numbers("cell", str(word))[0] for word in words)
