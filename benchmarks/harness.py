"""Times several providers of one result against each other, and refuses those whose result is wrong."""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastkd.benchmarks.accuracy import judge, largest

MIN_ROUNDS, MAX_ROUNDS = 7, 100
PHASES = ("forward", "backward", "both", "no_grad")


@dataclass(frozen=True)
class Provider:
    """One way to compute a case's result.

    forward() returns what backward(...) turns into the gradients of the case, an empty tuple if it has none. `role` is
    "baseline", "fastkd" or "limit": a limit does only the part of the work that nobody can avoid, so its result is not
    checked.

    exact: what it is to give, as `Case.exact`, where the providers of a case compute different things. tolerance: error
    of the way itself, such as a difference in the place of a derivative, relative to the truth's largest magnitude.
    goal: the multiple of the time of `Case.compared_with` that it may take.
    """

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], tuple[Tensor, ...]]
    role: str = "baseline"
    needs_bytes: int = 0
    exact: Callable[[torch.dtype], tuple[Tensor, ...]] | None = None
    tolerance: float = 0.0
    goal: float | None = None


@dataclass(frozen=True)
class Case:
    """One shape and dtype of an op: the providers, and `exact(dtype)`, which gives the loss and its gradients eagerly.

    `exact` must work in little memory, so that it can judge where the eager provider does not fit. `evaluated`: whether
    the forward that wants no gradient is timed as well. compared_with: the provider of whose time the others' are given
    as multiples. least_rounds: fewer than usual where a round takes many seconds.
    """

    op: str
    shape: dict[str, int | str]
    length: int
    tokens: int
    dtype: torch.dtype
    device: str
    exact: Callable[[torch.dtype], tuple[Tensor, ...]]
    providers: list[Provider] = field(default_factory=list)
    evaluated: bool = True
    compared_with: str | None = None
    least_rounds: int = MIN_ROUNDS


def measure(case: Case, budget: float = 30.0) -> list[dict]:
    """One row per provider; times are milliseconds, memory bytes.

    Args:
        case: what to compute, and the providers to compare.
        budget: seconds to spend on timing. Providers take turns in every round, so that whatever else the machine
            does in the meantime hits them all; there are at least `case.least_rounds`, however long they take.
    """
    rows = _all_checked(case)
    accepted = [provider for provider in case.providers if rows[provider.name]["status"] == "ok"]
    for provider in accepted:
        rows[provider.name]["peak_extra_bytes"] = peak_extra_bytes(lambda p=provider: _once(p), case.device)
    times = _take_turns(accepted, case, budget)
    for provider in accepted:
        for phase in times[provider.name][0]:
            samples = [1e3 * taken[phase] for taken in times[provider.name]]
            low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
            rows[provider.name] |= {
                f"{phase}_ms": statistics.median(samples), f"{phase}_p20_ms": low, f"{phase}_p80_ms": high,
            }  # fmt: skip
        rows[provider.name]["rounds"] = len(times[provider.name])
    _add_fractions_of_the_limit(rows.values())
    _add_multiples(case, rows)
    return list(rows.values())


def _all_checked(case: Case) -> dict[str, dict]:
    """A row for each provider, which says whether its result is right."""
    common = functools.cache(lambda: (case.exact(case.dtype), case.exact(torch.float64)))
    rows = {}
    for provider in case.providers:
        own = provider.exact
        eager, exact = common() if own is None else (own(case.dtype), own(torch.float64))
        rows[provider.name] = _checked(case, provider, eager, exact)
    return rows


def _checked(case: Case, provider: Provider, eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict:
    row = {
        "op": case.op, "shape": case.shape, "length": case.length, "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."), "provider": provider.name, "role": provider.role,
        "status": "ok",
    }  # fmt: skip
    free = torch.cuda.mem_get_info()[0] if case.device == "cuda" else psutil.virtual_memory().available
    if provider.needs_bytes > free:
        gib = 2**30
        return row | {"status": f"not run: needs about {provider.needs_bytes / gib:.0f} GiB, {free / gib:.0f} are free"}
    result = provider.forward()
    gradients = provider.backward(result)
    if provider.role == "limit":
        return row
    verdicts = [
        judge(found, near, truth, noise=provider.tolerance * largest(truth))
        for found, near, truth in zip((result.detach(), *gradients), eager, exact, strict=True)
    ]
    row["loss_error"] = verdicts[0].error
    if gradients:
        row["gradient_error"] = max(verdict.error for verdict in verdicts[1:])
    wrong = [f"{what}: {v}" for what, v in zip(("loss", "gradient", "gradient"), verdicts, strict=False) if not v]
    return row | ({"status": f"refused: {'; '.join(wrong)}"} if wrong else {})


def _once(provider: Provider) -> None:
    provider.backward(provider.forward())


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(provider: Provider, case: Case) -> dict[str, float]:
    """Seconds of one forward and backward, and of one forward that knows no gradient is wanted."""
    device = case.device
    _synchronize(device)
    start = time.perf_counter()
    result = provider.forward()
    _synchronize(device)
    between = time.perf_counter()
    provider.backward(result)
    _synchronize(device)
    end = time.perf_counter()
    del result
    step = {"forward": between - start, "backward": end - between, "both": end - start}
    if not case.evaluated:
        return step
    with torch.no_grad():
        again = time.perf_counter()
        provider.forward()
        _synchronize(device)
        done = time.perf_counter()
    return step | {"no_grad": done - again}


def _take_turns(providers: list[Provider], case: Case, budget: float) -> dict[str, list[dict[str, float]]]:
    times = {provider.name: [] for provider in providers}
    gc.collect()
    gc.disable()
    try:
        for provider in providers if case.evaluated else ():  # compiles what wants no gradient; all else has run
            _timed(provider, case)
        round_seconds = sum(sum(_timed(provider, case).values()) for provider in providers)
        rounds = min(MAX_ROUNDS, max(case.least_rounds, int(budget / max(round_seconds, 1e-9))))
        for turn in range(rounds):
            first = turn % max(len(providers), 1)  # nobody always follows the same neighbour's cache
            for provider in providers[first:] + providers[:first]:
                times[provider.name].append(_timed(provider, case))
    finally:
        gc.enable()
    return times


def peak_extra_bytes(compute: Callable[[], Any], device: str) -> int:
    """The most that torch's allocator held during `compute` beyond what it held before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compute()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _add_multiples(case: Case, rows: dict[str, dict]) -> None:
    unit = rows.get(case.compared_with, {}).get("both_ms")
    for provider in case.providers:
        row = rows[provider.name]
        if unit is not None and "both_ms" in row:
            row |= {"compared_with": case.compared_with, "multiple": row["both_ms"] / unit, "goal": provider.goal}


def _add_fractions_of_the_limit(rows) -> None:
    limit = min((row["both_ms"] for row in rows if row["role"] == "limit" and "both_ms" in row), default=None)
    for row in rows:
        if limit is not None and "both_ms" in row:
            row["fraction_of_limit"] = limit / row["both_ms"]
