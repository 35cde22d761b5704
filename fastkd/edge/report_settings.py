"""What a report measures, checked before any work."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastkd.edge.machine import usable_cpus
from fastkd.edge.runtimes import MODES


@dataclass
class ReportSettings:
    """Settings of a report. Lists may be given as text, "16,32,128".

    Args:
        artifacts: model folders and exported files; the first is the teacher, which all others are compared with.
        task, data: a task of `fastkd.data.load_task` and where it lies; its validation split is scored. Without a task
            only speed and bytes are measured.
        max_length: tokens of an example of the task.
        lengths, batches, threads: every combination is a cell. Lengths are tokens, special ones included.
        modes: how model folders are run: "eager", "compile" (torch.compile), "int8" (torch's dynamic quantisation). The
            teacher's first row is always eager.
        rounds: turns of every artifact at every cell.

    Raises ValueError on an unknown mode, a number below 1, and more threads than the machine has CPUs.
    """

    artifacts: Sequence[str]
    task: str | None = None
    data: str | None = None
    max_length: int = 128
    lengths: str | Sequence[int] = (16, 32, 128)
    batches: str | Sequence[int] = (1, 8)
    threads: str | Sequence[int] = (1,)
    modes: str | Sequence[str] = ("eager",)
    rounds: int = 10

    def __post_init__(self):
        self.artifacts = [str(path) for path in self.artifacts]
        if not self.artifacts:
            raise ValueError("artifacts: none given; name a teacher, and what is compared with it")
        for name in ("lengths", "batches", "threads"):
            setattr(self, name, numbers(name, getattr(self, name)))
        if self.threads[-1] > usable_cpus():
            raise ValueError(f"threads={self.threads[-1]}; this machine gives {usable_cpus()} CPUs to a process")
        self.modes = [mode.strip() for mode in self.modes.split(",")] if isinstance(self.modes, str) else self.modes
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            raise ValueError(f"modes={','.join(unknown)}; allowed are {', '.join(MODES)}")
        self.modes = list(dict.fromkeys(self.modes))
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}; 1 or more are needed")
        if self.data is not None and self.task is None:
            raise ValueError(f"data={self.data}: of which task? Name it (--task)")


def numbers(name: str, given: str | Sequence[int]) -> list[int]:
    """`"16,32"` or [16, 32] in rising order, each once. Raises ValueError unless all are whole numbers above 0."""
    words = given.split(",") if isinstance(given, str) else [str(each) for each in given]
    if not words or not all(re.fullmatch(r"0*[1-9]\d*", word.strip()) for word in words):
        raise ValueError(f"{name}={given!r}; whole numbers of 1 or more are needed, such as 1,8")
    return sorted({int(word) for word in words})
