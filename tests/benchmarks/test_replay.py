"""Work is captured only where it can be, and timed by as many replays as the clock needs; the device is played."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastkd.benchmarks.replay import Captures, NotCaptured


@pytest.fixture
def device(monkeypatch):
    """A device on which one replay takes `step` milliseconds; `modes` are the debug modes that were set."""
    played = SimpleNamespace(step=0.1, now=0.0, replays=0, modes=["default"], captured_in=[])

    def replay():
        played.now += played.step
        played.replays += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = played.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def capture(graph, *, pool, stream):
        played.captured_in.append((pool, stream))
        return nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    answers = {
        "graph_pool_handle": lambda: "pool", "Stream": lambda: stream, "current_stream": lambda: None,
        "stream": lambda stream: nullcontext(), "Event": Event, "graph": capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=replay), "get_sync_debug_mode": lambda: "default",
        "set_sync_debug_mode": played.modes.append,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return played


@pytest.mark.parametrize(("step", "repeats"), [(0.001, 50), (0.1, 20), (1.5, 2), (300.0, 1)])
def test_a_timing_fills_two_milliseconds_by_at_most_fifty_replays(device, step, repeats):
    device.step = step
    seconds = Captures().timer(lambda: None)
    before = device.replays
    assert seconds() == pytest.approx(step / 1e3) and device.replays == before + repeats


def test_work_that_waits_for_the_device_is_never_captured(device):
    def work():
        if device.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nException raised from somewhere")

    with pytest.raises(NotCaptured, match=r"^called a synchronizing CUDA operation$"):
        Captures().checked(work)
    assert not device.captured_in and device.modes[-1] == "default"


def test_work_that_does_not_wait_is_run_once_and_given_back(device):
    runs = []

    def work():
        runs.append(device.modes[-1])

    assert Captures().checked(work) is work and runs == ["error"] and device.modes[-1] == "default"


def test_a_capture_that_fails_says_why(device):
    def work():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(NotCaptured, match="not permitted when stream is capturing"):
        Captures().timer(work)


def test_all_graphs_of_a_case_share_their_memory_and_their_stream(device):
    captures = Captures()
    captures.timer(lambda: None)
    captures.timer(lambda: None)
    assert device.captured_in[0] == device.captured_in[1] and device.captured_in[0][0] == "pool"
