"""What binds relation_kl on a GPU, against the counts of docs/kernels/relation_kl.md and what physics allows."""

from types import SimpleNamespace

import pytest
import torch

from fastkd.benchmarks.kernels._cuda_limit import EXPS_PER_SCORE, binding_limit, peaks_of, seconds_by_unit


def gpu(major: int, minor: int, multiprocessors: int, mhz: int):
    return SimpleNamespace(major=major, minor=minor, multi_processor_count=multiprocessors, clock_rate=1000 * mhz)


H200 = peaks_of(gpu(9, 0, 132, 1980), copied=4.3e12)
A100 = peaks_of(gpu(8, 0, 108, 1410), copied=1.7e12)


def picoseconds(width: int, teacher_width: int, peaks=H200, length=512, dtype=torch.bfloat16) -> dict[str, float]:
    units = seconds_by_unit(peaks, width, teacher_width, length, dtype)
    return {unit: round(1e12 * seconds, 2) for unit, seconds in units.items()}


@pytest.mark.parametrize(
    ("widths", "tensor_core", "copied"), [((16, 16), 0.10, 0.04), ((32, 64), 0.26, 0.12), ((128, 128), 0.78, 0.35)]
)
def test_products_and_bytes_take_what_the_page_says(widths, tensor_core, copied):
    units = picoseconds(*widths)
    assert (units["tensor core"], units["bytes"]) == (tensor_core, copied)


def test_exponentials_and_instructions_take_what_the_page_says():
    assert round(1e12 * EXPS_PER_SCORE / H200.exps, 2) == 0.48
    assert round(1e12 * 15 / H200.fp32, 2) == 0.45


def test_tensor_cores_reach_the_data_sheets_rates():
    assert H200.flop == pytest.approx(989e12, rel=1e-3) and A100.flop == pytest.approx(312e12, rel=1e-3)


def test_the_fma_pipes_take_a_share_of_the_exponentials_until_both_are_full():
    """0.18 of them: special-function units and issue slots are then busy for 0.39 ps."""
    assert picoseconds(16, 16)["exp"] == 0.39
    share = 1 - 0.394e-12 * H200.exps / EXPS_PER_SCORE
    slots = (8 + EXPS_PER_SCORE + share * EXPS_PER_SCORE * 9) / H200.issued
    assert slots == pytest.approx(0.394e-12, rel=0.01)


def test_where_fp32_pipes_are_full_anyway_they_take_no_exponential():
    units = seconds_by_unit(A100, 16, 16, 512, torch.bfloat16)
    assert units["exp"] == pytest.approx(EXPS_PER_SCORE / A100.exps) == units["fp32 issue"]


@pytest.mark.parametrize(
    ("widths", "dtype", "length", "binds"),
    [
        ((16, 16), torch.bfloat16, 512, "exp"),
        ((32, 64), torch.bfloat16, 512, "exp"),
        ((128, 128), torch.bfloat16, 512, "tensor core"),
        ((32, 64), torch.float32, 512, "tensor core"),
        ((32, 64), torch.bfloat16, 64, "bytes"),
    ],
)
def test_the_unit_that_takes_longest_binds(widths, dtype, length, binds):
    assert binding_limit(H200, [length] * 4, 12, *widths, dtype).name == binds


def test_a_batch_takes_as_long_as_its_valid_scores():
    full = binding_limit(H200, [512] * 32, 48, 16, 16, torch.bfloat16)
    assert full.ms == pytest.approx(0.159, abs=0.001)
    assert binding_limit(H200, [512] * 16 + [0] * 16, 48, 16, 16, torch.bfloat16).ms == pytest.approx(full.ms / 2)


def test_there_is_no_limit_for_a_gpu_whose_rates_are_not_known():
    assert peaks_of(gpu(7, 5, 40, 1590), copied=3e11) is None
