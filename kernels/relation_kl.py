"""Triton kernels of relation_kl; formula, schema and reference stand in fastkd/ops/relation_kl.py.

Short sequences (`max_length` within one tile) take one kernel: `_one_tile` holds both relations of a sequence and head
on chip and writes divergence and gradient. Longer ones take two sweeps over column tiles that recompute the scores:

    _row_sweep        online softmax of both models: statistics of each row, divergence summed per block of rows
    _gradient_sweep   each program owns a block of rows of X and adds up all that flows into them, as rows and as
                      columns of the relation: no atomics, and every run adds in the same order

A probability is exp2((a − m) · c − z), with a the unscaled score, m the row's maximum, c = log2(e) / √d and z the log2
of the row's sum. m and z are kept apart: at large scores the fp32 sum m · c + z forgets z. For the same reason the
divergence of a row is added up from scores relative to their maxima, u and v = (a − m) · c of teacher and student:

    KL / ln 2 = Σ_j exp2(u_j) (u_j − v_j) / Σ_j exp2(u_j) − z_teacher + z_student

In names, `_s` belongs to the student and `_t` to the teacher. The owner is the operand whose rows a program is
responsible for, the other is the one it walks over: left and right, and for dRight right and left.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Far below any score, and the difference of two of them is still a number.
_MASKED = tl.constexpr(-1e30)
_LN_2 = tl.constexpr(math.log(2))
# G shrinks with the length of the sequence and would fall among fp16's subnormals. |G + Gᵀ| ≤ 2 stays in range.
_G_SCALE = tl.constexpr(2.0**14)

# Whatever may change from batch to batch: none of it may become part of what a kernel is compiled for.
_UNSPECIALIZED = (
    "s_own_s", "s_own_seq_s", "s_other_s", "s_other_seq_s", "s_own_t", "s_own_seq_t", "s_other_t", "s_other_seq_t",
    "s_order", "s_stats", "s_stats_seq", "s_partial", "s_partial_seq", "s_grad", "s_grad_seq",
    "HEADS", "MAX_LENGTH", "BLOCKS",
)  # fmt: skip


@triton.jit
def _tokens(p_starts, p_lengths, i_seq, MAX_LENGTH):
    """First packed row (zero in a padded batch) and number of tokens of a sequence."""
    return tl.load(p_starts + i_seq), tl.minimum(tl.load(p_lengths + i_seq), MAX_LENGTH)


@triton.jit
def _positions(p_order, s_order, i_seq, o_tokens, LIMIT):
    """Where the tokens of a sequence stand, in rows from its beginning."""
    if p_order is None:
        positions = o_tokens
    else:
        positions = tl.load(p_order + i_seq * s_order + o_tokens, mask=o_tokens < LIMIT, other=0)
    return positions.to(tl.int64)[:, None]


@triton.jit
def _head(p_tensor, s_seq, s_row, i_seq, start, i_head, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    # Strides come divided by UNIT, so that the compiler knows how far the addresses are aligned.
    return p_tensor + (i_seq * s_seq + start * s_row) * UNIT + i_head * WIDTH


@triton.jit
def _load_rows(p_head, s_row, positions, b_valid, WIDTH: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr):
    """(tokens, PADDED): zero behind the width and where there is no token, whatever the memory holds there."""
    o_width = tl.arange(0, PADDED)[None, :]
    b_mask = b_valid[:, None]
    if WIDTH != PADDED:
        b_mask = b_mask & (o_width < WIDTH)
    return tl.load(p_head + positions * (s_row * UNIT) + o_width, mask=b_mask, other=0.0)


@triton.jit
def _store_rows(p_head, s_row, positions, b_rows, b_valid, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                UNIT: tl.constexpr):  # fmt: skip
    o_width = tl.arange(0, PADDED)[None, :]
    b_mask = b_valid[:, None]
    if WIDTH != PADDED:
        b_mask = b_mask & (o_width < WIDTH)
    tl.store(p_head + positions * (s_row * UNIT) + o_width, b_rows.to(p_head.dtype.element_ty), mask=b_mask)


@triton.jit
def _dot(b_left, b_right, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter would multiply the bit patterns of bf16
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), input_precision="ieee")
    return tl.dot(b_left.to(b_right.dtype), b_right, input_precision="ieee")


@triton.jit
def _difference(b_s, b_max_s, b_log_s, C_S, b_t, b_max_t, b_log_t, C_T):
    """G = S − P, times the constant that keeps it in fp16's range."""
    return (tl.exp2((b_s - b_max_s) * C_S - b_log_s) - tl.exp2((b_t - b_max_t) * C_T - b_log_t)) * _G_SCALE


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _short(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_partial, s_partial, s_partial_seq,
    p_grad, p_grad_right, s_grad, s_grad_seq, C_S, C_T, MAX_LENGTH,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, TILE: tl.constexpr, CROSS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    WITH_GRAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A sequence and head: all columns on chip, one block of rows after the other."""
    i_seq, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, LENGTH = _tokens(p_starts, p_lengths, i_seq, MAX_LENGTH)
    o_other = tl.arange(0, TILE)
    b_other = o_other < LENGTH
    positions = _positions(p_order, s_order, i_seq, o_other, MAX_LENGTH)
    p_head_s = _head(p_other_s, s_other_seq_s, s_other_s, i_seq, start, i_head, WIDTH_S, UNIT_S)
    p_head_t = _head(p_other_t, s_other_seq_t, s_other_t, i_seq, start, i_head, WIDTH_T, UNIT_T)
    b_other_s = _load_rows(p_head_s, s_other_s, positions, b_other, WIDTH_S, PADDED_S, UNIT_S)
    b_other_t = _load_rows(p_head_t, s_other_t, positions, b_other, WIDTH_T, PADDED_T, UNIT_T)
    p_head_s = _head(p_own_s, s_own_seq_s, s_own_s, i_seq, start, i_head, WIDTH_S, UNIT_S)
    p_head_t = _head(p_own_t, s_own_seq_t, s_own_t, i_seq, start, i_head, WIDTH_T, UNIT_T)
    p_grad_left = _head(p_grad, s_grad_seq, s_grad, i_seq, start, i_head, WIDTH_S, UNIT_S)
    factor = C_S * (_LN_2 / _G_SCALE)  # 1 / √d

    kl = 0.0
    b_grad = tl.zeros((TILE, PADDED_S), tl.float32)
    for first in range(0, LENGTH, OWN):
        o_own = first + tl.arange(0, OWN)
        b_own = o_own < LENGTH
        positions_own = _positions(p_order, s_order, i_seq, o_own, LENGTH)
        b_own_s = _load_rows(p_head_s, s_own_s, positions_own, b_own, WIDTH_S, PADDED_S, UNIT_S)
        b_own_t = _load_rows(p_head_t, s_own_t, positions_own, b_own, WIDTH_T, PADDED_T, UNIT_T)
        # Rows need no mask: those behind the end are zero, and so is what they add to the gradient.
        b_pairs = b_other[None, :]
        if CAUSAL:
            b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
        b_t = tl.where(b_pairs, _dot(b_own_t, tl.trans(b_other_t), UPCAST), _MASKED)
        b_t = (b_t - tl.max(b_t, 1)[:, None]) * C_T
        b_s = tl.where(b_pairs, _dot(b_own_s, tl.trans(b_other_s), UPCAST), _MASKED)
        b_s = (b_s - tl.max(b_s, 1)[:, None]) * C_S
        b_p = tl.exp2(b_t)
        b_cross = tl.sum(b_p * (b_t - b_s), 1)
        b_q = tl.exp2(b_s)
        b_sum_t, b_sum_s = tl.sum(b_p, 1), tl.sum(b_q, 1)
        b_kl = b_cross / b_sum_t - tl.log2(b_sum_t) + tl.log2(b_sum_s)
        kl += tl.sum(tl.where(b_own, b_kl, 0.0), 0)
        if WITH_GRAD:
            b_g = b_q * (1.0 / b_sum_s * _G_SCALE)[:, None] - b_p * (1.0 / b_sum_t * _G_SCALE)[:, None]
            if not UPCAST:
                b_g = b_g.to(b_own_s.dtype)
            b_grad += _dot(tl.trans(b_g), b_own_s, UPCAST)
            b_left = _dot(b_g, b_other_s, UPCAST)
            if CROSS:
                _store_rows(p_grad_left, s_grad, positions_own, b_left * factor, b_own, WIDTH_S, PADDED_S, UNIT_S)
            else:  # the row part belongs to tokens of this block alone
                b_block = tl.arange(0, TILE // OWN)[:, None, None] == first // OWN
                b_grad += tl.reshape(tl.where(b_block, b_left[None, :, :], 0.0), (TILE, PADDED_S))

    p_partial += i_head * s_partial + i_seq * s_partial_seq + start // TILE
    tl.store(p_partial, kl * _LN_2)
    if WITH_GRAD:
        if CROSS:
            if not PACKED:
                b_zero = tl.zeros((TILE, PADDED_S), tl.float32)
                b_padding = (o_other >= LENGTH) & (o_other < MAX_LENGTH)
                _store_rows(p_grad_left, s_grad, positions, b_zero, b_padding, WIDTH_S, PADDED_S, UNIT_S)
            p_grad_left = _head(p_grad_right, s_grad_seq, s_grad, i_seq, start, i_head, WIDTH_S, UNIT_S)
        b_write = o_other < (LENGTH if PACKED else MAX_LENGTH)
        _store_rows(p_grad_left, s_grad, positions, b_grad * factor, b_write, WIDTH_S, PADDED_S, UNIT_S)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _row_sweep(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_partial, s_partial, s_partial_seq,
    p_stats, s_stats, s_stats_seq, C_S, C_T, MAX_LENGTH, HEADS, BLOCKS,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, WITH_GRAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_seq, i_head = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * OWN
    start, LENGTH = _tokens(p_starts, p_lengths, i_seq, MAX_LENGTH)
    if first >= LENGTH:
        return
    o_own = first + tl.arange(0, OWN)
    b_valid = o_own < LENGTH
    positions = _positions(p_order, s_order, i_seq, o_own, LENGTH)
    p_head_s = _head(p_own_s, s_own_seq_s, s_own_s, i_seq, start, i_head, WIDTH_S, UNIT_S)
    p_head_t = _head(p_own_t, s_own_seq_t, s_own_t, i_seq, start, i_head, WIDTH_T, UNIT_T)
    b_own_s = _load_rows(p_head_s, s_own_s, positions, b_valid, WIDTH_S, PADDED_S, UNIT_S)
    b_own_t = _load_rows(p_head_t, s_own_t, positions, b_valid, WIDTH_T, PADDED_T, UNIT_T)
    p_head_s = _head(p_other_s, s_other_seq_s, s_other_s, i_seq, start, i_head, WIDTH_S, UNIT_S)
    p_head_t = _head(p_other_t, s_other_seq_t, s_other_t, i_seq, start, i_head, WIDTH_T, UNIT_T)

    b_max_s = tl.full((OWN,), _MASKED, tl.float32)
    b_max_t = tl.full((OWN,), _MASKED, tl.float32)
    b_sum_s = tl.zeros((OWN,), tl.float32)
    b_sum_t = tl.zeros((OWN,), tl.float32)
    b_cross = tl.zeros((OWN,), tl.float32)  # Σ exp2(u) (u − v)
    for i_other in range(0, tl.minimum(first + OWN, LENGTH) if CAUSAL else LENGTH, OTHER):
        o_other = i_other + tl.arange(0, OTHER)
        positions = _positions(p_order, s_order, i_seq, o_other, LENGTH)
        b_other_s = _load_rows(p_head_s, s_other_s, positions, o_other < LENGTH, WIDTH_S, PADDED_S, UNIT_S)
        b_other_t = _load_rows(p_head_t, s_other_t, positions, o_other < LENGTH, WIDTH_T, PADDED_T, UNIT_T)
        b_pairs = (o_other < LENGTH)[None, :]
        if CAUSAL:
            b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
        b_t = tl.where(b_pairs, _dot(b_own_t, tl.trans(b_other_t), UPCAST), _MASKED)
        b_s = tl.where(b_pairs, _dot(b_own_s, tl.trans(b_other_s), UPCAST), _MASKED)
        b_new_t = tl.maximum(b_max_t, tl.max(b_t, 1))
        b_new_s = tl.maximum(b_max_s, tl.max(b_s, 1))
        b_t = (b_t - b_new_t[:, None]) * C_T
        b_s = (b_s - b_new_s[:, None]) * C_S
        b_p = tl.exp2(b_t)
        # What has been added so far was relative to smaller maxima; before the first tile it is zero.
        b_shift_t = (b_max_t - b_new_t) * C_T
        b_shift_s = (b_max_s - b_new_s) * C_S
        b_cross = (b_cross + b_sum_t * (b_shift_t - b_shift_s)) * tl.exp2(b_shift_t) + tl.sum(b_p * (b_t - b_s), 1)
        b_sum_t = b_sum_t * tl.exp2(b_shift_t) + tl.sum(b_p, 1)
        b_sum_s = b_sum_s * tl.exp2(b_shift_s) + tl.sum(tl.exp2(b_s), 1)
        b_max_t, b_max_s = b_new_t, b_new_s

    b_log_t, b_log_s = tl.log2(b_sum_t), tl.log2(b_sum_s)
    b_kl = b_cross / b_sum_t - b_log_t + b_log_s
    p_partial += i_head * s_partial + i_seq * s_partial_seq + start // OWN + first // OWN
    tl.store(p_partial, tl.sum(tl.where(b_valid, b_kl, 0.0), 0) * _LN_2)
    if WITH_GRAD:
        p_own = p_stats + i_head * s_stats + i_seq * s_stats_seq + start + o_own
        tl.store(p_own, b_max_s, mask=b_valid)
        tl.store(p_own + HEADS * s_stats, b_log_s, mask=b_valid)
        tl.store(p_own + 2 * HEADS * s_stats, b_max_t, mask=b_valid)
        tl.store(p_own + 3 * HEADS * s_stats, b_log_t, mask=b_valid)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _gradient_sweep(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_grad, s_grad, s_grad_seq,
    p_stats, s_stats, s_stats_seq, C_S, C_T, MAX_LENGTH, HEADS, BLOCKS,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The owner's tokens are rows of the relation (dLeft), columns of it (dRight), or both (self relation)."""
    i_seq, i_head = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * OWN
    start, LENGTH = _tokens(p_starts, p_lengths, i_seq, MAX_LENGTH)
    LIMIT = LENGTH if PACKED else MAX_LENGTH
    if first >= LIMIT:
        return
    o_own = first + tl.arange(0, OWN)
    b_valid = o_own < LENGTH
    positions_own = _positions(p_order, s_order, i_seq, o_own, LIMIT)
    p_head_s = _head(p_own_s, s_own_seq_s, s_own_s, i_seq, start, i_head, WIDTH_S, UNIT_S)
    p_head_t = _head(p_own_t, s_own_seq_t, s_own_t, i_seq, start, i_head, WIDTH_T, UNIT_T)
    b_own_s = _load_rows(p_head_s, s_own_s, positions_own, b_valid, WIDTH_S, PADDED_S, UNIT_S)
    b_own_t = _load_rows(p_head_t, s_own_t, positions_own, b_valid, WIDTH_T, PADDED_T, UNIT_T)
    p_head_s = _head(p_other_s, s_other_seq_s, s_other_s, i_seq, start, i_head, WIDTH_S, UNIT_S)
    p_head_t = _head(p_other_t, s_other_seq_t, s_other_t, i_seq, start, i_head, WIDTH_T, UNIT_T)
    p_max_s = p_stats + i_head * s_stats + i_seq * s_stats_seq + start
    p_log_s = p_max_s + HEADS * s_stats
    p_max_t = p_log_s + HEADS * s_stats
    p_log_t = p_max_t + HEADS * s_stats
    b_max_s = tl.load(p_max_s + o_own, mask=b_valid, other=0.0)[:, None]
    b_log_s = tl.load(p_log_s + o_own, mask=b_valid, other=0.0)[:, None]
    b_max_t = tl.load(p_max_t + o_own, mask=b_valid, other=0.0)[:, None]
    b_log_t = tl.load(p_log_t + o_own, mask=b_valid, other=0.0)[:, None]

    b_grad = tl.zeros((OWN, PADDED_S), tl.float32)
    begin = first if CAUSAL and not ROWS else 0
    end = LENGTH
    if CAUSAL and not COLUMNS:
        end = tl.minimum(first + OWN, LENGTH)
    if first >= LENGTH:  # a block of padding walks over nothing and writes zeros
        end = begin
    for i_other in range(begin, end, OTHER):
        o_other = i_other + tl.arange(0, OTHER)
        b_other = o_other < LENGTH
        positions = _positions(p_order, s_order, i_seq, o_other, LENGTH)
        b_other_s = _load_rows(p_head_s, s_other_s, positions, b_other, WIDTH_S, PADDED_S, UNIT_S)
        b_other_t = _load_rows(p_head_t, s_other_t, positions, b_other, WIDTH_T, PADDED_T, UNIT_T)
        b_s = _dot(b_own_s, tl.trans(b_other_s), UPCAST)
        b_t = _dot(b_own_t, tl.trans(b_other_t), UPCAST)
        if COLUMNS:
            b_max_other_s = tl.load(p_max_s + o_other, mask=b_other, other=0.0)[None, :]
            b_log_other_s = tl.load(p_log_s + o_other, mask=b_other, other=0.0)[None, :]
            b_max_other_t = tl.load(p_max_t + o_other, mask=b_other, other=0.0)[None, :]
            b_log_other_t = tl.load(p_log_t + o_other, mask=b_other, other=0.0)[None, :]
        b_pairs = b_other[None, :]
        if ROWS and COLUMNS and CAUSAL:  # of two tokens the later one is the row, and the diagonal is both
            b_earlier = o_other[None, :] <= o_own[:, None]
            b_g = _difference(
                b_s, tl.where(b_earlier, b_max_s, b_max_other_s), tl.where(b_earlier, b_log_s, b_log_other_s), C_S,
                b_t, tl.where(b_earlier, b_max_t, b_max_other_t), tl.where(b_earlier, b_log_t, b_log_other_t), C_T,
            )  # fmt: skip
            b_g = tl.where(o_other[None, :] == o_own[:, None], 2 * b_g, b_g)
        elif ROWS:
            b_g = _difference(b_s, b_max_s, b_log_s, C_S, b_t, b_max_t, b_log_t, C_T)
            if COLUMNS:
                b_g += _difference(b_s, b_max_other_s, b_log_other_s, C_S, b_t, b_max_other_t, b_log_other_t, C_T)
            if CAUSAL:
                b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
        else:
            b_g = _difference(b_s, b_max_other_s, b_log_other_s, C_S, b_t, b_max_other_t, b_log_other_t, C_T)
            if CAUSAL:
                b_pairs = b_pairs & (o_other[None, :] >= o_own[:, None])
        b_g = tl.where(b_pairs, b_g, 0.0)
        b_grad += _dot(b_g, b_other_s, UPCAST)

    p_head_s = _head(p_grad, s_grad_seq, s_grad, i_seq, start, i_head, WIDTH_S, UNIT_S)
    b_grad = tl.where(b_valid[:, None], b_grad * (C_S * (_LN_2 / _G_SCALE)), 0.0)
    _store_rows(p_head_s, s_grad, positions_own, b_grad, o_own < LIMIT, WIDTH_S, PADDED_S, UNIT_S)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _sequence_losses(
    p_losses, p_starts, p_lengths, p_partial, s_partial, s_partial_seq, MAX_LENGTH, HEADS,
    OWN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_seq = tl.program_id(0).to(tl.int64)
    start, LENGTH = _tokens(p_starts, p_lengths, i_seq, MAX_LENGTH)
    BLOCKS = tl.cdiv(LENGTH, OWN)
    p_partial += i_seq * s_partial_seq + start // OWN
    b_sum = tl.zeros((CHUNK,), tl.float32)
    for i_chunk in range(0, HEADS * BLOCKS, CHUNK):
        o_partial = i_chunk + tl.arange(0, CHUNK)
        o_head = (o_partial // BLOCKS).to(tl.int64)
        b_sum += tl.load(p_partial + o_head * s_partial + o_partial % BLOCKS, mask=o_head < HEADS, other=0.0)
    tl.store(p_losses + i_seq, tl.sum(b_sum, 0) / (HEADS * tl.maximum(tl.load(p_lengths + i_seq), 1)))


# One tile holds sequences up to this length, by bytes per element of the wider dtype: (widest padded head, tile).
_ONE_TILE = {2: ((64, 128), (128, 64)), 4: ((32, 64), (128, 32))}
# Sweeps by bytes per element: (widest padded head, owner's rows, other's rows, warps, stages).
_SWEEPS = {
    2: ((32, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 8, 2)),
    4: ((32, 32, 32, 4, 2), (64, 32, 32, 4, 2), (128, 32, 32, 4, 2)),
}


def relation_kl(
    student: Tensor,
    student_right: Tensor | None,
    teacher: Tensor,
    teacher_right: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    order: Tensor | None,
    max_length: int,
    num_heads: int,
    causal: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each sequence and the student's gradient, by the schema of fastkd/ops/relation_kl.py.

    fp32, bf16 and fp16 on CUDA, relation heads up to 128 wide; on CPU tensors under TRITON_INTERPRET=1.

    Raises:
        ValueError: a relation head is wider than 128.
    """
    packed, cross = student.dim() == 2, student_right is not None
    length = student.shape[-2]
    max_length = min(max_length, length)
    heads = {"student": student.shape[-1] // num_heads, "teacher": teacher.shape[-1] // num_heads}
    padded = {name: max(16, triton.next_power_of_2(width)) for name, width in heads.items()}
    widest = max(padded.values())
    if widest > 128:
        raise ValueError(
            f"num_heads={num_heads} gives relation heads of width {heads['student']} (student) and {heads['teacher']}"
            " (teacher); the Triton kernel takes widths up to 128"
        )
    size = max(student.element_size(), teacher.element_size())
    tile = next(tile for width, tile in _ONE_TILE[size] if widest <= width)
    own, other, warps, stages = next(sweep for width, *sweep in _SWEEPS[size] if widest <= width)

    def strides(x: Tensor) -> tuple[int, int]:
        return x.stride(-2), 0 if packed else x.stride(0)

    def operands(own_s: Tensor, other_s: Tensor, own_t: Tensor, other_t: Tensor) -> list[Tensor | int]:
        pairs = ((own_s, unit_s), (other_s, unit_s), (own_t, unit_t), (other_t, unit_t))
        return [value for x, unit in pairs for value in (x, *(stride // unit for stride in strides(x)))]

    right_s, right_t = (student_right, teacher_right) if cross else (student, teacher)
    unit_s = math.gcd(16, heads["student"], *strides(student), *strides(right_s))
    unit_t = math.gcd(16, heads["teacher"], *strides(teacher), *strides(right_t))
    batch, rows = starts.shape[0], student.numel() // max(student.shape[-1], 1)
    # Blocks of padding write the zeros of a padded gradient; no program stands behind the last packed sequence.
    allocate = torch.zeros if packed or max_length < length else torch.empty
    nothing = torch.empty(0, dtype=student.dtype, device=student.device)
    grad, grad_right = (
        allocate(student.shape, dtype=student.dtype, device=student.device) if wanted else nothing
        for wanted in (with_grad, with_grad and cross)
    )
    s_grad = (student.shape[-1] // unit_s, 0 if packed else length * student.shape[-1] // unit_s)

    one_tile = max_length <= tile
    own = max(16, triton.next_power_of_2(max_length)) if one_tile else own
    blocks = triton.cdiv(max_length, own)
    slots = rows // own + batch if packed else batch * blocks  # of partial sums; packed: s // own + i is free for i
    partial = torch.empty((num_heads, slots), dtype=torch.float32, device=student.device)
    s_partial = (slots, 1 if packed else blocks)
    tokens = (starts, lengths, order, 0 if order is None else order.stride(0))
    scales = [math.log2(math.e) / math.sqrt(width) for width in heads.values()]
    widths = {
        "WIDTH_S": heads["student"], "PADDED_S": padded["student"], "UNIT_S": unit_s,
        "WIDTH_T": heads["teacher"], "PADDED_T": padded["teacher"], "UNIT_T": unit_t,
        "CAUSAL": causal, "UPCAST": not isinstance(_short, triton.JITFunction),
    }  # fmt: skip
    left = operands(student, right_s, teacher, right_t)
    losses = torch.empty(batch, dtype=torch.float32, device=student.device)
    if batch == 0:
        return losses, grad, grad_right
    with torch.cuda.device_of(student):
        if one_tile and max_length:
            _short[batch, num_heads](
                *left, *tokens, partial, *s_partial, grad, grad_right, *s_grad, *scales, max_length, **widths,
                OWN=min(own, 64), TILE=own, CROSS=cross, PACKED=packed, WITH_GRAD=with_grad,
                num_warps=own // 16, num_stages=1,
            )  # fmt: skip
        elif max_length:
            # Per model, head and row the maximum of the scores and the log2 of the sum: 16 bytes.
            stats = torch.empty((4, num_heads, rows if with_grad else 0), dtype=torch.float32, device=student.device)
            shared = (stats, rows, 0 if packed else length, *scales, max_length, num_heads, blocks)
            tiles = {"OWN": own, "OTHER": other, "num_warps": warps, "num_stages": stages}
            _row_sweep[batch * blocks, num_heads](
                *left, *tokens, partial, *s_partial, *shared, **widths, **tiles, WITH_GRAD=with_grad
            )
            if with_grad:
                _gradient_sweep[batch * blocks, num_heads](
                    *left, *tokens, grad, *s_grad, *shared, **widths, **tiles, ROWS=True, COLUMNS=not cross,
                    PACKED=packed,
                )  # fmt: skip
            if with_grad and cross:
                right = operands(right_s, student, right_t, teacher)
                _gradient_sweep[batch * blocks, num_heads](
                    *right, *tokens, grad_right, *s_grad, *shared, **widths, **tiles, ROWS=False, COLUMNS=True,
                    PACKED=packed,
                )  # fmt: skip
        _sequence_losses[(batch,)](
            losses, starts, lengths, partial, *s_partial, max_length, num_heads, OWN=own, CHUNK=256, num_warps=4
        )
    return losses, grad, grad_right
