"""Work timed as a CUDA graph: what the device takes for it, without the host that launches it kernel by kernel.

The graphs of a case share one pool of memory: no two run at once, and nobody reads what they leave there.
"""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

# Seconds that one timing fills at least, with one replay after the other: neither launch nor clock then shows.
_FILLED = 2e-3


class NotCaptured(Exception):
    """Why no CUDA graph holds this work."""


class Captures:
    """Graphs of one case. They hold their memory for as long as this lives."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def checked(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` itself, if it does not wait for the device: within a capture that would leave the allocator unusable.

        Raises:
            NotCaptured: it waits, as torch tells.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                work()
        except RuntimeError as error:
            raise NotCaptured(_first_line(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return work

    def timer(self, work: Callable[[], Any]) -> Callable[[], float]:
        """Captures `checked` work, and returns what gives the seconds of one replay.

        Raises:
            NotCaptured: the capture fails.
        """
        gc.collect()  # what holds a graph of autograd holds on to the stream it was made on, too
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        except RuntimeError as error:
            raise NotCaptured(_first_line(error)) from error
        _between_events(graph.replay, 1)  # the first one uploads the graph
        repeats = min(50, math.ceil(_FILLED / _between_events(graph.replay, 1)))
        return lambda: _between_events(graph.replay, repeats) / repeats


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]


def _between_events(work: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
