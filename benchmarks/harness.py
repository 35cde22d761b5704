"""Times several providers of one result against each other, and refuses those whose result is wrong."""

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastkd.benchmarks.accuracy import judge, largest
from fastkd.benchmarks.replay import Captures, NotCaptured

MIN_ROUNDS, MAX_ROUNDS = 7, 100
_LARGE = 4 << 30  # bytes of a provider whose pages are given back after every turn
# As the host launches them, between two waits for the device; the last two, on CUDA only, by replay of a graph, forward
# and backward together and the forward alone.
PHASES = ("forward", "backward", "both", "no_grad", "replay", "replay_no_grad")


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
class Limit:
    """The least milliseconds that forward and backward can take here, and the name of what binds."""

    name: str
    ms: float


@dataclass(frozen=True)
class Case:
    """One shape and dtype of an op: the providers, and `exact(dtype)`, which gives the loss and its gradients eagerly.

    `exact` must work in little memory, so that it can judge where the eager provider does not fit. `evaluated`: whether
    the forward that wants no gradient is timed as well, and on CUDA the replay of graphs; a whole training step has
    neither. compared_with: the provider of whose time the others' are given as multiples. least_rounds: fewer than
    usual where a round takes many seconds. limit: without it, the fastest provider of that role is the limit.
    limit_goal: the fraction of the limit that fastkd is to reach. width: of the rows that the kernel works on, as
    `backends.resolve` takes it, where the choice of the backend depends on it.
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
    limit: Limit | None = None
    limit_goal: float | None = None
    width: int | None = None

    @property
    def replayed(self) -> bool:
        return self.device == "cuda" and self.evaluated


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
        _give_back(provider, case.device)
    if case.evaluated:  # compiles what wants no gradient; all else has run
        for provider in accepted:
            _timed(provider, case)
    budget = budget / 2 if case.replayed else budget
    launches = {provider.name: partial(_timed, provider, case) for provider in accepted}
    for name, rounds in _take_turns(launches, case.least_rounds, budget).items():
        rows[name] |= _medians(rounds) | {"rounds": len(rounds)}
    if case.replayed:
        # After all launches: graphs keep the memory they were captured in.
        replays = _captured(accepted, rows)
        for name, rounds in _take_turns(replays, case.least_rounds, budget).items():
            rows[name] |= _medians(rounds)
    _add_fractions_of_the_limit(case, rows.values())
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
        _give_back(provider, case.device)
    return rows


def _checked(case: Case, provider: Provider, eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict:
    row = {
        "op": case.op, "shape": case.shape, "length": case.length, "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."), "width": case.width, "provider": provider.name,
        "role": provider.role, "status": "ok",
    }  # fmt: skip
    free, needed = free_bytes(case.device), provider.needs_bytes
    if _is_large(provider, case.device):
        needed *= 2  # where no block is mapped on its own, glibc takes as much again for what lies between blocks
    if needed > free:
        gib = 2**30
        return row | {"status": f"not run: needs about {needed / gib:.0f} GiB, {free / gib:.0f} are free"}
    try:
        result = provider.forward()
        gradients = provider.backward(result)
    except torch.OutOfMemoryError:
        return row | {"status": f"not run: {free / 2**30:.0f} GiB are free, and it needs more"}
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


def free_bytes(device: str) -> int:
    """What a tensor can still be made of, the memory that torch's allocator keeps for later included."""
    if device == "cpu":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _is_large(provider: Provider, device: str) -> bool:
    return device == "cpu" and provider.needs_bytes > _LARGE


def _give_back(provider: Provider, device: str) -> None:
    """Large providers start every turn from fresh pages: kept, they would lie side by side until none were left."""
    if _is_large(provider, device):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _once(provider: Provider) -> None:
    provider.backward(provider.forward())


def _evaluate(provider: Provider) -> None:
    with torch.no_grad():
        provider.forward()


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
    taken = {"forward": between - start, "backward": end - between, "both": end - start}
    if case.evaluated:
        again = time.perf_counter()
        _evaluate(provider)
        _synchronize(device)
        taken["no_grad"] = time.perf_counter() - again
    _give_back(provider, device)
    return taken


def _captured(providers: list[Provider], rows: dict[str, dict]) -> dict[str, Callable[[], dict[str, float]]]:
    """For each provider that CUDA graphs can hold what times them; the rows of the others say why they cannot."""
    torch.cuda.empty_cache()
    captures = Captures()
    found = {p.name: {"replay": partial(_once, p), "replay_no_grad": partial(_evaluate, p)} for p in providers}
    for stage in (captures.checked, captures.timer):  # all are checked before a graph takes memory for good
        for name, works in list(found.items()):
            try:
                found[name] = {phase: stage(work) for phase, work in works.items()}
            except NotCaptured as reason:
                rows[name]["replay_status"] = f"not captured: {reason}"
                del found[name]
    for name in found:
        rows[name]["replay_status"] = "ok"
    return {name: partial(_all_of, timers) for name, timers in found.items()}


def _all_of(timers: dict[str, Callable[[], float]]) -> dict[str, float]:
    return {phase: seconds() for phase, seconds in timers.items()}


def _take_turns(
    timers: dict[str, Callable[[], dict[str, float]]], least_rounds: int, budget: float
) -> dict[str, list[dict[str, float]]]:
    """What the timers gave, by name; each turn begins with another, so that nobody always follows the same neighbour's
    cache."""
    times = {name: [] for name in timers}
    gc.collect()
    gc.disable()
    try:
        round_seconds = sum(sum(timer().values()) for timer in timers.values())
        rounds = min(MAX_ROUNDS, max(least_rounds, int(budget / max(round_seconds, 1e-9))))
        names = list(timers)
        for turn in range(rounds if timers else 0):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(timers[name]())
    finally:
        gc.enable()
    return times


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds of every phase: the median, and the 20th and 80th percentiles."""
    row = {}
    for phase in rounds[0]:
        samples = [1e3 * taken[phase] for taken in rounds]
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        row |= {f"{phase}_ms": statistics.median(samples), f"{phase}_p20_ms": low, f"{phase}_p80_ms": high}
    return row


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


def _add_fractions_of_the_limit(case: Case, rows) -> None:
    timed = "replay_ms" if case.replayed else "both_ms"
    limits = [Limit(row["provider"], row[timed]) for row in rows if row["role"] == "limit" and timed in row]
    limit = case.limit or min(limits, key=lambda limit: limit.ms, default=None)
    for row in rows:
        if limit is not None and timed in row:
            row |= {
                "fraction_of_limit": limit.ms / row[timed], "limit": limit.name, "limit_goal": case.limit_goal,
            }  # fmt: skip
