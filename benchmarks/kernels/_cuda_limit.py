"""What binds relation_kl on a GPU: the least time of one loss and gradient, by the units that the work must pass.

Counted is the least that an algorithm with two exponentials per score takes: one per model, either in one sweep over
all pairs of tokens, or in two over half of them. Not counted is what a kernel does beyond that.
"""

import functools
import statistics
from dataclasses import dataclass

import torch

from fastkd.benchmarks.harness import Limit

# Per score: the operations of the exponents, their sums, the divergence, and G take two each.
FP32_PER_SCORE = 8
EXPS_PER_SCORE = 2
# Instructions of one exponential on the FMA pipes: a polynomial of degree five, with the split of its argument.
POLYNOMIAL = 10


@dataclass(frozen=True)
class Peaks:
    """What a GPU does in one second.

    flop: of dense bf16 products. exps: of the special-function units. fp32: instructions of single lanes. issued:
    instructions of single lanes of any kind. copied: bytes read and written by a copy.
    """

    flop: float
    exps: float
    fp32: float
    issued: float
    copied: float


# By compute capability: dense bf16 flop per multiprocessor and cycle, the clock that tensor cores boost to, and fp32
# lanes per multiprocessor (NVIDIA's white papers of A100 and H100, and the CUDA programming guide's throughputs).
_PER_MULTIPROCESSOR = {(8, 0): (2048, 1.41e9, 64), (9, 0): (4096, 1.83e9, 128)}
_EXPS, _ISSUED = 16, 128  # per multiprocessor and cycle, on both


def peaks_of(properties, copied: float) -> Peaks | None:
    """From torch's device properties and a measured rate of copies; None for a GPU whose rates do not stand here."""
    rates = _PER_MULTIPROCESSOR.get((properties.major, properties.minor))
    if rates is None:
        return None
    flop, tensor_clock, lanes = rates
    clock = 1e3 * properties.clock_rate
    cycles = properties.multi_processor_count * clock
    tensor_cycles = properties.multi_processor_count * min(clock, tensor_clock)
    return Peaks(flop * tensor_cycles, _EXPS * cycles, lanes * cycles, _ISSUED * cycles, copied)


@functools.cache
def measured_peaks() -> Peaks | None:
    """Those of the current device."""
    return peaks_of(torch.cuda.get_device_properties(), _copied_per_second())


def _copied_per_second(size: int = 2**30) -> float:
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    taken = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return 2 * size / statistics.median(taken[1:])


def seconds_by_unit(
    peaks: Peaks, width: int, teacher_width: int, length: float, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds per score of each unit; the largest binds.

    Args:
        peaks: the device's.
        width, teacher_width: of one relation head.
        length: scores per token and head, by which a token's bytes are shared.
        dtype: fp32 products are as exact as fp32 in no less than the time of six in bf16 (or of three in tf32).
    """
    products = 6 if dtype == torch.float32 else 1
    return {
        "tensor core": products * (2 * (width + teacher_width) + 2 * width) / peaks.flop,
        "exp": (1 - _share_on_fma_pipes(peaks)) * EXPS_PER_SCORE / peaks.exps,
        "fp32 issue": max(FP32_PER_SCORE / peaks.fp32, (FP32_PER_SCORE + EXPS_PER_SCORE) / peaks.issued),
        "bytes": dtype.itemsize * (2 * width + teacher_width) / length / peaks.copied,
    }


def _share_on_fma_pipes(peaks: Peaks) -> float:
    """Of the exponentials: the one at which the special-function units are busy for as long as the fuller of the FMA
    pipes and the issue slots, which a polynomial takes beside everything else; none where those are busy longer anyway.
    """
    alone = EXPS_PER_SCORE / peaks.exps
    pipes = FP32_PER_SCORE / peaks.fp32
    slots = (FP32_PER_SCORE + EXPS_PER_SCORE) / peaks.issued
    on_pipes = (alone - pipes) / (alone + POLYNOMIAL * EXPS_PER_SCORE / peaks.fp32)
    in_slots = (alone - slots) / (alone + (POLYNOMIAL - 1) * EXPS_PER_SCORE / peaks.issued)
    return max(0.0, min(on_pipes, in_slots))


def binding_limit(peaks: Peaks, sizes: list[int], num_heads: int, width: int, teacher_width: int, dtype) -> Limit:
    """Of a batch of sequences of these lengths, in milliseconds, and the unit that binds."""
    scores = num_heads * sum(n * n for n in sizes)
    units = seconds_by_unit(peaks, width, teacher_width, scores / (num_heads * sum(sizes)), dtype)
    unit = max(units, key=units.get)
    return Limit(unit, 1e3 * scores * units[unit])
