"""A measurement on CUDA as far as a CPU can show it: the CPU's tensors, with the device's clock and memory put on."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from fastkd.benchmarks import harness
from fastkd.benchmarks.fastest_backends import orders_by_replay
from fastkd.benchmarks.harness import Limit, Provider, measure
from fastkd.benchmarks.kernels import relation_kl
from fastkd.benchmarks.kernels._cuda_limit import peaks_of
from fastkd.benchmarks.replay import NotCaptured
from fastkd.benchmarks.report import COLUMNS, fastest_fastkd, print_tables, ratios, shares_of_the_limit

GIB = 2**30


class Captures:
    """In the place of graphs: runs the work once, as a capture does, and replays it in a microsecond."""

    def checked(self, work):
        work()
        return work

    def timer(self, work):
        return lambda: 1e-6


@pytest.fixture
def on_cuda(monkeypatch):
    """Calls of torch.cuda that a measurement makes; everything is computed on the CPU."""
    answers = {
        "synchronize": None, "empty_cache": None, "mem_get_info": (GIB, GIB), "memory_allocated": 0,
        "reset_peak_memory_stats": None, "max_memory_allocated": 7,
        "get_device_properties": SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(harness, "Captures", Captures)
    peaks = peaks_of(torch.cuda.get_device_properties(), copied=4.3e12)
    monkeypatch.setattr(relation_kl, "measured_peaks", lambda: peaks)


def made(ragged=False, dtype=torch.bfloat16):
    """The tiny case as CUDA gets it, with the CPU's tensors, and without what is compiled or runs on a GPU alone."""
    to = torch.Tensor.to
    with pytest.MonkeyPatch.context() as here:
        here.setattr(torch.Tensor, "to", lambda x, *how, **named: to(x, *(h for h in how if h != "cuda"), **named))
        here.setattr(torch, "arange", _on_the_cpu(torch.arange))
        case = relation_kl.case(3, 2, 20, 4, 8, ragged=ragged, dtype=dtype, device="cuda")
    absent = ("torch.compile", "fastkd triton", "fastkd cuda")
    case.providers[:] = [provider for provider in case.providers if provider.name not in absent]
    return case


def _on_the_cpu(make):
    return lambda *sizes, device=None, **named: make(*sizes, **named)


def test_a_kernel_is_timed_by_launch_and_by_replay(on_cuda):
    rows = {row["provider"]: row for row in measure(made(), budget=0.0)}
    assert list(rows) == ["eager", "eager, fp32 softmax", "sample loop", "fastkd reference", "bare matmuls"]
    for row in rows.values():
        assert (row["status"], row["replay_status"]) == ("ok", "ok")
        assert row["replay_ms"] == row["replay_no_grad_ms"] == pytest.approx(1e-3)
        assert row["both_ms"] > 1e-3 and row["no_grad_ms"] > 1e-3
        assert row["peak_extra_bytes"] == 7 and row["width"] == 8
        assert set(row) <= set(COLUMNS)


def test_the_fraction_of_the_limit_is_that_of_the_replay_and_says_what_binds(on_cuda):
    case = dataclasses.replace(made(), limit=Limit("exp", 0.25e-3))
    for row in measure(case, budget=0.0):
        assert row["fraction_of_limit"] == pytest.approx(0.25) and row["limit"] == "exp" and row["limit_goal"] == 0.55


def test_the_limit_is_counted_for_the_shape(on_cuda):
    case = made(ragged=True)
    # 20 tokens share their bytes among few scores
    assert case.limit.name == "bytes" and case.limit.ms == pytest.approx(
        1e3 * 2 * 2 * (2 * 4 + 8) * sum(relation_kl.ragged_lengths(3, 20).tolist()) / 4.3e12
    )


def test_a_provider_that_no_graph_holds_says_why_and_is_timed_by_launch(on_cuda, monkeypatch, capsys):
    class Refusing(Captures):
        checks = itertools.count()

        def checked(self, work):
            if next(self.checks) == 0:
                raise NotCaptured("called a synchronizing CUDA operation")
            return super().checked(work)

    monkeypatch.setattr(harness, "Captures", Refusing)
    rows = measure(made(), budget=0.0)
    eager, *others = rows
    assert eager["replay_status"] == "not captured: called a synchronizing CUDA operation"
    assert eager["both_ms"] > 0 and not {"replay_ms", "fraction_of_limit"} & set(eager)
    assert all("replay_ms" in row for row in others)
    print_tables([row | {"allocator": "default"} for row in rows], ["default"])
    assert "eager: not captured: called a synchronizing CUDA operation" in " ".join(capsys.readouterr().out.split())


def test_a_training_step_is_not_replayed(on_cuda):
    case = dataclasses.replace(made(), evaluated=False)
    assert not any("replay_status" in row or "no_grad_ms" in row for row in measure(case, budget=0.0))


def test_memory_that_runs_out_is_a_row_and_no_end(on_cuda):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = made()
    case.providers[:] = [case.providers[0], Provider("large", fail, None)]
    assert measure(case, budget=0.0)[1]["status"] == "not run: 1 GiB are free, and it needs more"


def test_fp32_has_no_second_eager_form(on_cuda):
    assert "eager, fp32 softmax" not in [provider.name for provider in made(dtype=torch.float32).providers]


def test_the_issues_shapes_are_the_default_on_cuda():
    assert relation_kl.SHAPES_ON_CUDA["small"] == [(32, 48, 512, 16, 16), (32, 12, 512, 32, 64)]


@pytest.mark.parametrize(
    ("free", "lengths"),
    [
        (139 * GIB, {48: [2048, 1024], 12: [4096, 2048]}),
        (78 * GIB, {48: [2048, 1024], 12: [4096, 2048]}),
        (70 * GIB, {48: [1024], 12: [2048]}),
        (GIB, {}),
    ],
)
def test_the_longest_shapes_are_those_at_which_eager_fits(free, lengths):
    found = {}
    for sequences, heads, length, width, teacher_width in relation_kl.longest_shapes(free):
        assert (sequences, heads, width, teacher_width) in {(32, 48, 16, 16), (32, 12, 32, 64)}
        assert relation_kl.eager_bytes(sequences, heads, length, 2) <= free
        found.setdefault(heads, []).append(length)
    assert found == lengths


def row_of(provider, role="fastkd", both=9.0, replay=None, length=300, width=16, **more):
    row = {
        "op": "relation_kl", "shape": {"length": length}, "length": length, "dtype": "bfloat16", "width": width,
        "provider": provider, "role": role, "status": "ok", "both_ms": both, "peak_extra_bytes": 0,
        "allocator": "default",
    }  # fmt: skip
    return row | ({} if replay is None else {"replay_ms": replay}) | more


def test_ratios_compare_replay_with_replay_and_launch_with_launch():
    rows = [row_of("eager", "baseline", 20.0, 10.0), row_of("sample loop", "baseline", 36.0),
            row_of("fastkd triton", both=9.0, replay=2.0), row_of("fastkd cuda", both=12.0, replay=1.0),
            row_of("fastkd reference", both=6.0)]  # fmt: skip
    assert fastest_fastkd(rows)["provider"] == "fastkd cuda"
    assert ratios(rows) == {
        "eager": 10.0, "sample loop": 3.0, "fastkd triton": 2.0, "fastkd cuda": 1.0, "fastkd reference": 0.5
    }  # fmt: skip


def test_the_order_of_backends_by_replay_is_printed_for_each_class(capsys):
    rows = [row_of("fastkd triton", replay=2.0), row_of("fastkd cuda", replay=1.0),
            row_of("fastkd triton", replay=8.0, length=512), row_of("fastkd cuda", replay=4.0, length=512),
            row_of("fastkd triton", replay=1.0, width=96), row_of("fastkd cuda", replay=3.0, width=96),
            row_of("fastkd triton", both=1.0, width=32)]  # fmt: skip
    assert orders_by_replay(rows) == [
        "relation_kl, bfloat16, width ≤ 16, length ≤ 512: cuda 2 ms, triton 4 ms (cases: 2)",
        "relation_kl, bfloat16, width ≤ 128, length ≤ 512: triton 1 ms, cuda 3 ms (cases: 1)",
    ]
    print_tables(rows, ["default"])
    assert "The fastest backend by replay:" in capsys.readouterr().out


def test_the_share_of_the_limit_stands_beside_what_the_limit_would_give():
    limit = {"limit": "exp", "limit_goal": 0.55}
    rows = [row_of("eager", "baseline", replay=12.0), row_of("fastkd cuda", replay=1.0, fraction_of_limit=0.6, **limit)]
    assert shares_of_the_limit(rows) == [
        "length 300, bfloat16: exp 20.00× over eager; fastkd cuda has 60% of that speed (goal: 55%)"
    ]
