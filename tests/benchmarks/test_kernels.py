"""The benchmark times only right results, on a quiet machine, and writes what it measured."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from fastkd.benchmarks import machine
from fastkd.benchmarks.harness import Provider, measure, peak_extra_bytes
from fastkd.benchmarks.kernels import SUITE as kernels
from fastkd.benchmarks.kernels.relation_kl import DTYPES, SHAPES, case, ragged_lengths
from fastkd.benchmarks.plots import save_plots
from fastkd.benchmarks.report import COLUMNS, fastest_fastkd, losses_of, print_tables, ratios


def without_compiled(made):
    """The case without the providers that take longer to compile than all the rest to run."""
    made.providers[:] = [p for p in made.providers if p.name not in ("torch.compile", "arithmetic at peak")]
    return made


@pytest.fixture
def tiny():
    return without_compiled(case(*SHAPES["tiny"][0], ragged=True, dtype=torch.float32, device="cpu"))


def measured(tiny) -> dict[str, dict]:
    return {row["provider"]: row for row in measure(tiny, budget=0.05)}


def test_every_provider_is_timed_in_every_phase_and_its_error_is_known(tiny):
    rows = measured(tiny)
    assert {"eager", "sample loop", "fastkd reference", "bare matmuls"} <= set(rows)
    for row in rows.values():
        assert row["status"] == "ok" and row["rounds"] >= 7
        for phase in ("forward", "backward", "both", "no_grad"):
            assert 0 < row[f"{phase}_p20_ms"] <= row[f"{phase}_ms"] <= row[f"{phase}_p80_ms"]
        assert row["peak_extra_bytes"] > 0 and row["fraction_of_limit"] > 0
        assert row["role"] == "limit" or max(row["loss_error"], row["gradient_error"]) < 1e-5


@pytest.mark.parametrize(
    ("forward", "backward", "complaint"),
    [
        (lambda eager: eager.forward() * 1.001, lambda eager, loss: eager.backward(loss), "loss"),
        (lambda eager: eager.forward() * float("nan"), lambda eager, loss: eager.backward(loss), "loss"),
        (lambda eager: eager.forward(), lambda eager, loss: tuple(g * 1.001 for g in eager.backward(loss)), "gradient"),
        (lambda eager: eager.forward(), lambda eager, loss: tuple(g[:1] for g in eager.backward(loss)), "gradient"),
    ],
    ids=["loss a little off", "NaN", "gradient a little off", "gradient of another shape"],
)
def test_a_wrong_provider_is_refused_and_not_timed(tiny, forward, backward, complaint):
    eager = tiny.providers[0]
    tiny.providers.append(Provider("wrong", lambda: forward(eager), lambda loss: backward(eager, loss), "fastkd"))
    rows = measured(tiny)
    assert rows["wrong"]["status"].startswith("refused") and complaint in rows["wrong"]["status"]
    assert "both_ms" not in rows["wrong"] and "both_ms" in rows["eager"]
    assert fastest_fastkd(list(rows.values()))["provider"] != "wrong"


def test_a_provider_that_does_not_fit_in_memory_is_not_run(tiny):
    tiny.providers.append(Provider("huge", lambda: pytest.fail("was run"), None, needs_bytes=2**60))
    assert measured(tiny)["huge"]["status"].startswith("not run: needs about")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_all_providers_of_relation_kl_agree(ragged, dtype):
    made = without_compiled(case(*SHAPES["tiny"][0], ragged=ragged, dtype=dtype, device="cpu"))
    assert {row["status"] for row in measure(made, budget=0.0)} == {"ok"}


def test_ragged_lengths_are_fixed():
    assert ragged_lengths(8, 512).tolist() == ragged_lengths(8, 512).tolist()
    assert sorted(ragged_lengths(8, 512).tolist()) == [128, 183, 238, 293, 347, 402, 457, 512]
    assert ragged_lengths(8, 512).tolist() != sorted(ragged_lengths(8, 512).tolist())


def test_the_issues_shapes_are_the_default():
    assert SHAPES["small"] == [(32, 12, 128, 32, 64), (8, 12, 512, 32, 64), (8, 48, 512, 16, 16)]


def test_peak_memory_counts_what_was_held_at_once():
    def compute():
        for _ in range(3):
            torch.empty(1000).fill_(0)
        return torch.cat([torch.zeros(1000), torch.zeros(500)])

    assert peak_extra_bytes(compute, "cpu") == 4 * 3000


def test_a_busy_machine_is_refused_unless_told_otherwise(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.51, 0, 0))
    with pytest.raises(ValueError, match=r"load average is 0\.51.*--anyway"):
        kernels.main("relation_kl", shapes="tiny")
    assert machine.checked_load(anyway=True) == 0.51
    assert "warning: the load average is 0.51" in capsys.readouterr().err
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9, 9))
    assert machine.checked_load(anyway=False) == 0.5


def test_unknown_names_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"op='kl'; allowed are .*relation_kl"):
        kernels.main("kl")
    with pytest.raises(ValueError, match="shapes='huge'; allowed are tiny, small, full"):
        kernels.main("relation_kl", shapes="huge")


def row_of(provider, role, both, no_grad=1.0, allocator="page reuse"):
    return {
        "op": "relation_kl", "shape": {"length": 8}, "dtype": "float32", "provider": provider, "role": role,
        "status": "ok", "forward_ms": both, "backward_ms": 0.0, "both_ms": both, "no_grad_ms": no_grad,
        "peak_extra_bytes": 0, "allocator": allocator,
    }  # fmt: skip


def test_ratios_are_taken_against_the_fastest_backend_and_lost_cases_are_named(capsys):
    rows = [row_of("eager", "baseline", 6.0), row_of("torch.compile", "baseline", 1.5, 0.5),
            row_of("fastkd reference", "fastkd", 9.0), row_of("fastkd cpp", "fastkd", 2.0)]  # fmt: skip
    assert ratios(rows) == {"eager": 3.0, "torch.compile": 0.75, "fastkd reference": 4.5, "fastkd cpp": 1.0}
    assert losses_of(rows) == [
        "length 8, float32, both: torch.compile 1.5 ms, fastkd cpp 2 ms",
        "length 8, float32, no_grad: torch.compile 0.5 ms, fastkd cpp 1 ms",
    ]
    default = [row | {"allocator": "default", "both_ms": 2 * row["both_ms"] - 2} for row in rows]
    print_tables(rows + default, ["page reuse", "default"])
    shown = capsys.readouterr().out
    assert "3.00 (5.00)" in shown and "fastkd is slower here" in shown


def test_time_memory_and_the_fraction_of_the_limit_are_plotted_against_length(tmp_path):
    rows = [
        row_of(*made) | {"length": 8, "tokens": 8, "peak_extra_bytes": 8}
        for made in (("eager", "baseline", 6.0), ("cpp", "fastkd", 2.0))
    ]
    names = [file.name for file in save_plots(rows, tmp_path, "op-cpu")]
    assert names == ["op-cpu-time.png", "op-cpu-memory.png", "op-cpu-ratio.png"]
    limited = [row | {"fraction_of_limit": 1 / row["both_ms"]} for row in rows]
    assert [file.name for file in save_plots(limited, tmp_path, "op-cpu")] == [*names, "op-cpu-limit.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in (*names, "op-cpu-limit.png"))


@pytest.mark.slow
def test_the_command_measures_under_both_allocators_and_writes_files(tmp_path):
    command = [
        "-m",
        "fastkd.benchmarks.kernels",
        "--op",
        "relation_kl",
        "--shapes",
        "tiny",
        "--threads",
        "1",
        "--anyway",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path)],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},  # torch.compile then hands back the function as it is
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "relation_kl-cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert {row["allocator"] for row in rows} == set(machine.allocators("cpu"))
    assert {row["status"] for row in rows} == {"ok"} and all(float(row["both_ms"]) > 0 for row in rows)
    assert {json.loads(row["shape"])["fill"] for row in rows} == {"full", "ragged"}
    assert all(row["anyway"] == "True" and row["torch"] == torch.__version__ and row["cpu"] for row in rows)
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"relation_kl-cpu-{plot}.png" for plot in ("time", "memory", "ratio", "limit")
    }
    assert "fastkd reference" in done.stdout


def test_what_a_large_provider_took_is_given_back():
    """In a process of its own, whose allocator keeps all that is freed."""
    script = """
import psutil, torch
from fastkd.benchmarks import harness
harness._LARGE = 100_000_000
def compute():
    return torch.ones(150_000_000).sum()
large = harness.Provider("large", compute, lambda loss: (), needs_bytes=600_000_000)
case = harness.Case("op", {}, 8, 8, torch.float32, "cpu", lambda dtype: (torch.tensor(1.5e8, dtype=dtype),), [large])
before = psutil.Process().memory_info().rss
compute()
kept = psutil.Process().memory_info().rss
[row] = harness.measure(case, budget=0.0)
assert row["status"] == "ok", row["status"]
given_back = psutil.Process().memory_info().rss
assert kept - before > 590_000_000 and given_back - before < 400_000_000, (before, kept, given_back)
"""
    environment = os.environ | machine.allocators("cpu")["page reuse"]
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
