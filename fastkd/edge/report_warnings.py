"""Where a report's figures mislead, as sentences that go with them."""

from collections.abc import Iterator

from fastkd.edge.report_schema import Report

NOISY = 0.15
_QUIET_LOAD = 0.5  # above it another program takes part in every timing
_CALLS_FOR_P99 = 100
# Any of them multiplies int8, or computes in bf16 or fp16, at full speed.
_FAST = {
    "int8": {"avx_vnni", "avx512_vnni", "amx_int8", "dotprod", "i8mm"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "fp16"},
}
_SLOW = {
    "int8": "no VNNI or dot-product instructions: int8 is slower here than on a CPU that has them",
    "bf16": "no bf16 instructions: bf16 is emulated here",
    "fp16": "no fp16 instructions: fp16 is emulated here",
}


def warnings_of(report: Report) -> list[str]:
    """One sentence for each reason to doubt the figures."""
    return [*_of_the_machine(report), *_of_precisions(report), *_of_cells(report), *_of_failures(report)]


def _of_the_machine(report: Report) -> Iterator[str]:
    machine = report.machine
    if machine.load_average is not None and machine.load_average > _QUIET_LOAD:
        yield f"load average {machine.load_average:.2f} before the first measurement: other programs took part"
    if not machine.threads_environment.get("OMP_NUM_THREADS"):
        yield (
            "OMP_NUM_THREADS is not set here. The threads of these figures were; a service that is started like this "
            f"takes up to {machine.cpus}"
        )
    most = max(report.settings["threads"])
    if most > machine.cores:
        yield f"{most} threads on {machine.cores} physical cores share their units"


def _of_precisions(report: Report) -> Iterator[str]:
    if not report.machine.features:
        yield "the system does not say what its CPU can do: whether int8 runs at full speed is not known"
        return
    for precision, fast in _FAST.items():
        named = [row.name for row in report.artifacts if row.precision == precision]
        if named and not fast & set(report.machine.features):
            yield f"{_SLOW[precision]} ({', '.join(named)})"


def _of_cells(report: Report) -> Iterator[str]:
    measured = [(row, cell) for row in report.artifacts for cell in row.cells if cell.p50_ms is not None]
    noisy = [(cell.spread, row, cell) for row, cell in measured if cell.spread > NOISY]
    if noisy:
        spread, row, cell = max(noisy, key=lambda each: each[0])
        yield (
            f"noisy machine: in {len(noisy)} of {len(measured)} cells (p90 - p10) / p50 is above {NOISY:.0%}, at most "
            f"{spread:.0%} ({row.name}, batch {cell.batch}, length {cell.length}, threads {cell.threads})"
        )
    few = [cell.calls for _, cell in measured if cell.calls < _CALLS_FOR_P99]
    if few:
        yield (
            f"p99 of fewer than {_CALLS_FOR_P99} calls is little more than the slowest of them: "
            f"{len(few)} of {len(measured)} cells, down to {min(few)} calls"
        )


def _of_failures(report: Report) -> Iterator[str]:
    for row in report.artifacts:
        reasons = [part.failed for part in (*row.processes, *row.cells, *filter(None, [row.accuracy])) if part.failed]
        for reason in dict.fromkeys(reasons):
            yield f"{row.name}: {reason}"
