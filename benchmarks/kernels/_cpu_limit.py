"""The least time relation_kl can take on this CPU: the smallest amount of arithmetic, at the machine's own peaks.

A self relation needs, for a head of n tokens, the upper triangle of both score matrices, one whole product for the
gradient, and one exponential for each pair in the triangles. Products run in the library and shape in which this
machine was just seen to multiply fastest, exponentials as a polynomial in registers; first the ones, then the others,
since both want the same units. No operand comes from memory, an exponential goes into one sum, nothing is laid out, so
no kernel that does both in turn is faster.
"""

import functools
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from fastkd.benchmarks.harness import Provider

# rows, columns, depth: squares, and panels with a side that stays in a cache
_SHAPES = [
    *((side, side, side) for side in (256, 384, 512, 1024)),
    *((1024, side, side) for side in (64, 128, 256)),
    (4096, 256, 256),
]  # fmt: skip
_COLUMNS = 2048  # of the scores that exponentials are taken of; they lie in a first-level cache
_REPEATS = 10


def least_operations(sizes: list[int], num_heads: int, width: int, teacher_width: int) -> tuple[int, int]:
    """Floating-point operations of the products and number of exponentials, for sequences of `sizes` tokens."""
    triangles = num_heads * sum(n * (n + 1) // 2 for n in sizes)
    squares = num_heads * sum(n * n for n in sizes)
    return 2 * triangles * (width + teacher_width) + 2 * squares * width, 2 * triangles


def exp2(x: Tensor) -> Tensor:
    """2^x for x from -126 to 0, relative error below 3e-7: torch.exp is several times slower.

    The nearest integer goes to the exponent's bits, the rest through the polynomial of csrc/cpu/tiles.h.
    """
    shifted = x + 12582912.0  # 1.5 · 2^23: leaves the nearest integer in the low bits
    fraction = x - (shifted - 12582912.0)
    power = 1.3274633e-3 * fraction + 9.6719619e-3
    for coefficient in (5.5506784e-2, 2.4022235e-1, 6.9314706e-1, 1.0):
        power = power * fraction + coefficient
    return (power.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


def _sums_of_exponentials(rows: Tensor, columns: Tensor) -> Tensor:
    """One exponential for each pair of a row and a column: every one is of another number, and none is thrown away."""
    return exp2(rows[:, None] + columns).sum(1)


# Multiplies the first `count` rows of a left matrix by a right one.
Multiply = Callable[[int], Tensor]


def _by_blas(left: Tensor, right: Tensor) -> Multiply:
    out = left.new_empty(len(left), right.shape[1])
    return lambda count: torch.mm(left[:count], right, out=out[:count])


def _by_onednn(left: Tensor, right: Tensor) -> Multiply:
    """torch.mm takes fp32 to MKL, which reaches half of this rate on an AMD CPU with AVX-512."""
    packed = torch.ops.mkldnn._reorder_linear_weight(right.T.contiguous(), len(left))
    return lambda count: torch.ops.mkldnn._linear_pointwise(left[:count], packed, None, "none", [], "")


@functools.cache
def fastest_product(dtype: torch.dtype, threads: int) -> tuple[Multiply, tuple[int, int, int]]:
    """The product that `threads` do at the highest rate, by measurement, and its rows, columns and depth."""
    libraries = [_by_blas, _by_onednn] if torch.backends.mkldnn.is_available() else [_by_blas]

    def candidate(prepare, shape: tuple[int, int, int]) -> tuple[float, Multiply]:
        rows, columns, depth = shape
        multiply = prepare(torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype))
        return _least_seconds(lambda: multiply(rows)) / (rows * columns * depth), multiply

    measured = [(*candidate(*pair), pair[1]) for pair in product(libraries, _SHAPES)]
    _, multiply, shape = min(measured, key=lambda each: each[0])
    return multiply, shape


def _least_seconds(compute: Callable[[], object]) -> float:
    compute()
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        compute()
        taken.append(time.perf_counter() - start)
    return min(taken)


def arithmetic_at_peak(
    sizes: list[int], num_heads: int, width: int, teacher_width: int, dtype: torch.dtype
) -> Provider:
    """As much arithmetic as the loss and the student gradient of a self relation need, at this machine's peaks.

    Args:
        sizes: tokens of each sequence.
        num_heads, width, teacher_width: relation heads, and the width of one of the student and of the teacher.
        dtype: of the products' operands; exponentials are fp32.
    """
    operations, exponentials = least_operations(sizes, num_heads, width, teacher_width)
    # At least two rows: torch.compile makes code of its own for one.
    score_rows = max(2, exponentials // _COLUMNS)
    left, right = -torch.rand(score_rows), -torch.rand(exponentials // score_rows)
    contracted = {"cpp.enable_floating_point_contract_flag": "fast"}  # a product and a sum in one instruction
    exponentiate = torch.compile(_sums_of_exponentials, dynamic=True, options=contracted)

    def forward() -> Tensor:
        multiply, (rows, columns, depth) = fastest_product(dtype, torch.get_num_threads())
        whole, rest = divmod(operations // (2 * columns * depth), rows)
        for _ in range(whole):
            multiply(rows)
        if rest:
            multiply(rest)
        return exponentiate(left, right)

    return Provider("arithmetic at peak", forward, lambda sums: (), "limit")
