"""The device side of relation_kl in Triton; formula, schema and reference stand in fastkd/ops/relation_kl.py.

Short sequences take one kernel: `short` holds a block of rows of both relations on chip, over all columns, and writes
divergence and gradient. Longer ones take two sweeps over column tiles, each of which computes the scores anew:

    row_sweep        online softmax of both models: statistics of each row, divergence summed per block of rows
    gradient_sweep   a program owns a block of rows of X and adds up all that flows into them, as rows and as columns
                      of the relation: no atomics, and every run adds in the same order

A probability is exp2((a − m) · c − z), with a the unscaled score, m the row's maximum, c = log2(e) / √d and z the log2
of the row's sum. m and z are kept apart: at large scores the fp32 sum m · c + z forgets z. For the same reason the
divergence of a row is added up from scores relative to their maxima, u and v = (a − m) · c of teacher and student:

    KL / ln 2 = Σ_j exp2(u_j) (u_j − v_j) / Σ_j exp2(u_j) − z_teacher + z_student

A self relation without `causal` is symmetric, and the gradient asks for P_ij + P_ji: one exponential serves both,

    P_ij + P_ji = exp2(t_ij) (e_i + e_j),    t_ij = (a_ij − a_00) · c,    e_i = exp2(−t at the maximum of row i − z_i),

unless some e_i leaves fp32's range. The first sweep stores (e_i · 2^14, −1) for a row in range, (m, z) for another; a
head with a row out of range takes two exponentials per pair.

In names, `_s` belongs to the student and `_t` to the teacher. The owner is the operand whose rows a program is
responsible for, the other is the one it walks over: left and right, and for dRight right and left.
"""

import math

import triton
import triton.language as tl

# Far below any score, and the difference of two of them is still a number.
_MASKED = tl.constexpr(-1e30)
_LN_2 = tl.constexpr(math.log(2))
# G shrinks with the length of the sequence and would fall among fp16's subnormals. |G + Gᵀ| ≤ 2 stays in range.
_G_SCALE, _G_LOG = tl.constexpr(2.0**14), tl.constexpr(14.0)
# How far (log2) a row's log-sum-exp may lie from that of the first token for the factors below to stay in fp32's range.
_NARROW = tl.constexpr(80.0)

# What may change from batch to batch: none of it may become part of what a kernel is compiled for.
_RUNTIME = (
    "s_own_s", "s_own_seq_s", "s_other_s", "s_other_seq_s", "s_own_t", "s_own_seq_t", "s_other_t", "s_other_seq_t",
    "s_order", "s_plane", "s_stats", "s_stats_seq", "s_partial", "s_partial_seq", "s_grad", "s_grad_seq",
    "HEADS", "MAX_LENGTH", "BLOCKS",
)  # fmt: skip


@triton.jit
def _positions(p_order, s_order, i_seq, o_tokens, LIMIT):
    """Where the tokens of a sequence stand, in rows from its beginning."""
    if p_order is None:
        o_rows = o_tokens
    else:
        o_rows = tl.load(p_order + i_seq * s_order + o_tokens, mask=o_tokens < LIMIT, other=0)
    return o_rows.to(tl.int64)[:, None]


@triton.jit
def _addresses(p_tensor, s_row, s_seq, place, o_rows, b_valid, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               UNIT: tl.constexpr):  # fmt: skip
    """Pointers to one head of some tokens, (tokens, PADDED), and which of them may be followed."""
    i_seq, start, i_head = place
    o_width = tl.arange(0, PADDED)[None, :]
    b_mask = b_valid[:, None]
    if WIDTH != PADDED:
        b_mask = b_mask & (o_width < WIDTH)
    # Strides come divided by UNIT: so the compiler knows how far the addresses are aligned.
    p_head = p_tensor + (i_seq * s_seq + start * s_row) * UNIT + i_head * WIDTH
    return p_head + o_rows * (s_row * UNIT) + o_width, b_mask


@triton.jit
def _load_rows(p_tensor, s_row, s_seq, place, o_rows, b_valid, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               UNIT: tl.constexpr):  # fmt: skip
    """Zero behind the width and where there is no token, whatever the memory holds there."""
    p_rows, b_mask = _addresses(p_tensor, s_row, s_seq, place, o_rows, b_valid, WIDTH, PADDED, UNIT)
    return tl.load(p_rows, mask=b_mask, other=0.0)


@triton.jit
def _store_rows(p_tensor, s_row, s_seq, place, o_rows, b_rows, b_valid, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                UNIT: tl.constexpr):  # fmt: skip
    p_rows, b_mask = _addresses(p_tensor, s_row, s_seq, place, o_rows, b_valid, WIDTH, PADDED, UNIT)
    tl.store(p_rows, b_rows.to(p_tensor.dtype.element_ty), mask=b_mask)


@triton.jit
def _dot(b_left, b_right, INTERPRETED: tl.constexpr):
    if INTERPRETED and b_right.dtype == tl.bfloat16:  # the interpreter would multiply the bit patterns
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), input_precision="ieee")
    return tl.dot(b_left.to(b_right.dtype), b_right, input_precision="ieee")


@triton.jit
def _gradient_factor(p_grad, WEIGHT, C_S, LENGTH):
    """From a sum of (S − P) · 2^14 to the gradient; WEIGHT: 1 / (num_heads · divisor), in fp16 left to backward."""
    factor = C_S * (_LN_2 / _G_SCALE)  # 1 / √d
    if p_grad.dtype.element_ty != tl.float16:
        factor = factor * (WEIGHT / tl.maximum(LENGTH, 1))
    return factor


@triton.jit(do_not_specialize=_RUNTIME)
def short(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_partial, s_partial, s_partial_seq,
    p_grad, p_grad_right, s_grad, s_grad_seq, WEIGHT, C_S, C_T, MAX_LENGTH,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, TILE: tl.constexpr, CROSS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    WITH_GRAD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program per sequence and head: all columns on chip, one block of rows after the other."""
    i_seq, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, LENGTH = tl.load(p_starts + i_seq), tl.minimum(tl.load(p_lengths + i_seq), MAX_LENGTH)
    place = (i_seq, start, i_head)
    o_other = tl.arange(0, TILE)
    b_other = o_other < LENGTH
    o_rows = _positions(p_order, s_order, i_seq, o_other, MAX_LENGTH)
    b_other_s = _load_rows(p_other_s, s_other_s, s_other_seq_s, place, o_rows, b_other, WIDTH_S, PADDED_S, UNIT_S)
    b_other_t = _load_rows(p_other_t, s_other_t, s_other_seq_t, place, o_rows, b_other, WIDTH_T, PADDED_T, UNIT_T)

    factor = _gradient_factor(p_grad, WEIGHT, C_S, LENGTH)
    b_grad = tl.zeros((TILE, PADDED_S), tl.float32)
    kl = 0.0
    for first in range(0, LENGTH, OWN):
        o_own = first + tl.arange(0, OWN)
        b_own = o_own < LENGTH
        o_rows_own = _positions(p_order, s_order, i_seq, o_own, LENGTH)
        b_own_s = _load_rows(p_own_s, s_own_s, s_own_seq_s, place, o_rows_own, b_own, WIDTH_S, PADDED_S, UNIT_S)
        b_own_t = _load_rows(p_own_t, s_own_t, s_own_seq_t, place, o_rows_own, b_own, WIDTH_T, PADDED_T, UNIT_T)
        # Rows need no mask: those behind the end are zero, and so is what they add to the gradient.
        b_pairs = b_other[None, :]
        if CAUSAL:
            b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
        b_t = tl.where(b_pairs, _dot(b_own_t, tl.trans(b_other_t), INTERPRETED), _MASKED)
        b_t = (b_t - tl.max(b_t, 1)[:, None]) * C_T
        b_s = tl.where(b_pairs, _dot(b_own_s, tl.trans(b_other_s), INTERPRETED), _MASKED)
        b_s = (b_s - tl.max(b_s, 1)[:, None]) * C_S
        b_p = tl.exp2(b_t)
        b_cross = tl.sum(b_p * (b_t - b_s), 1)
        b_q = tl.exp2(b_s)
        b_sum_t, b_sum_s = tl.sum(b_p, 1), tl.sum(b_q, 1)
        b_kl = b_cross / b_sum_t - tl.log2(b_sum_t) + tl.log2(b_sum_s)
        kl += tl.sum(tl.where(b_own, b_kl, 0.0), 0)
        if WITH_GRAD:
            b_g = b_q * (1.0 / b_sum_s * _G_SCALE)[:, None] - b_p * (1.0 / b_sum_t * _G_SCALE)[:, None]
            b_grad += _dot(tl.trans(b_g), b_own_s, INTERPRETED)
            b_left = _dot(b_g, b_other_s, INTERPRETED)
            if CROSS:
                _store_rows(
                    p_grad, s_grad, s_grad_seq, place, o_rows_own, b_left * factor, b_own, WIDTH_S, PADDED_S, UNIT_S
                )
            else:  # what the tokens get as rows: they are those of this block alone
                b_block = tl.arange(0, TILE // OWN)[:, None, None] == first // OWN
                b_grad += tl.reshape(tl.where(b_block, b_left[None, :, :], 0.0), (TILE, PADDED_S))

    tl.store(p_partial + i_head * s_partial + i_seq * s_partial_seq + start // TILE, kl * _LN_2)
    if WITH_GRAD:
        b_write = o_other < (LENGTH if PACKED else MAX_LENGTH)
        if CROSS:
            b_zero = tl.zeros((TILE, PADDED_S), tl.float32)
            b_padding = b_write & (o_other >= LENGTH)
            _store_rows(p_grad, s_grad, s_grad_seq, place, o_rows, b_zero, b_padding, WIDTH_S, PADDED_S, UNIT_S)
        p_target = p_grad_right if CROSS else p_grad
        _store_rows(p_target, s_grad, s_grad_seq, place, o_rows, b_grad * factor, b_write, WIDTH_S, PADDED_S, UNIT_S)


@triton.jit(do_not_specialize=_RUNTIME)
def row_sweep(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_partial, s_partial, s_partial_seq,
    p_origin, p_stats, s_plane, s_stats, s_stats_seq, C_S, C_T, MAX_LENGTH, HEADS, BLOCKS,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr,
    WITH_GRAD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    i_seq, i_head = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * OWN
    start, LENGTH = tl.load(p_starts + i_seq), tl.minimum(tl.load(p_lengths + i_seq), MAX_LENGTH)
    if first >= LENGTH:
        return
    place = (i_seq, start, i_head)
    o_own = first + tl.arange(0, OWN)
    b_own = o_own < LENGTH
    o_rows_own = _positions(p_order, s_order, i_seq, o_own, LENGTH)
    b_own_s = _load_rows(p_own_s, s_own_s, s_own_seq_s, place, o_rows_own, b_own, WIDTH_S, PADDED_S, UNIT_S)
    b_own_t = _load_rows(p_own_t, s_own_t, s_own_seq_t, place, o_rows_own, b_own, WIDTH_T, PADDED_T, UNIT_T)

    b_max_s = tl.full((OWN,), _MASKED, tl.float32)
    b_max_t = tl.full((OWN,), _MASKED, tl.float32)
    b_sum_s = tl.zeros((OWN,), tl.float32)
    b_sum_t = tl.zeros((OWN,), tl.float32)
    b_cross = tl.zeros((OWN,), tl.float32)  # Σ exp2(u) (u − v)
    for i_other in range(0, tl.minimum(first + OWN, LENGTH) if CAUSAL else LENGTH, OTHER):
        o_other = i_other + tl.arange(0, OTHER)
        b_other = o_other < LENGTH
        o_rows = _positions(p_order, s_order, i_seq, o_other, LENGTH)
        b_other_s = _load_rows(p_other_s, s_other_s, s_other_seq_s, place, o_rows, b_other, WIDTH_S, PADDED_S, UNIT_S)
        b_other_t = _load_rows(p_other_t, s_other_t, s_other_seq_t, place, o_rows, b_other, WIDTH_T, PADDED_T, UNIT_T)
        b_pairs = b_other[None, :]
        if CAUSAL:
            b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
        b_t = tl.where(b_pairs, _dot(b_own_t, tl.trans(b_other_t), INTERPRETED), _MASKED)
        b_s = tl.where(b_pairs, _dot(b_own_s, tl.trans(b_other_s), INTERPRETED), _MASKED)
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
    b_kl = tl.where(b_own, b_cross / b_sum_t - b_log_t + b_log_s, 0.0)
    p_partial += i_head * s_partial + i_seq * s_partial_seq + start // OWN + first // OWN
    tl.store(p_partial, tl.sum(b_kl, 0) * _LN_2)
    if WITH_GRAD:
        if SYMMETRIC:
            o_first = tl.arange(0, 1)
            o_rows = _positions(p_order, s_order, i_seq, o_first, LENGTH)
            b_s = _load_rows(p_own_s, s_own_s, s_own_seq_s, place, o_rows, o_first == 0, WIDTH_S, PADDED_S, UNIT_S)
            b_t = _load_rows(p_own_t, s_own_t, s_own_seq_t, place, o_rows, o_first == 0, WIDTH_T, PADDED_T, UNIT_T)
            origin_s, origin_t = _squared_norm(b_s), _squared_norm(b_t)
            b_max_s, b_log_s = _factors(b_max_s, b_log_s, origin_s, C_S)
            b_max_t, b_log_t = _factors(b_max_t, b_log_t, origin_t, C_T)
            # Every block of rows finds the same values.
            tl.store(p_origin + (i_seq * HEADS + i_head) * 2, origin_s)
            tl.store(p_origin + (i_seq * HEADS + i_head) * 2 + 1, origin_t)
        p_rows = p_stats + i_head * s_stats + i_seq * s_stats_seq + start + o_own
        tl.store(p_rows, b_max_s, mask=b_own)
        tl.store(p_rows + s_plane, b_log_s, mask=b_own)
        tl.store(p_rows + 2 * s_plane, b_max_t, mask=b_own)
        tl.store(p_rows + 3 * s_plane, b_log_t, mask=b_own)


@triton.jit
def _squared_norm(b_first):
    b_first = b_first.to(tl.float32)
    return tl.sum(tl.sum(b_first * b_first, 1), 0)


@triton.jit
def _factors(b_max, b_log, origin, C):
    """(e · 2^14, −1) for the rows where e is in range, (m, z) for the others."""
    b_t = (b_max - origin) * C
    b_narrow = tl.abs(b_t) + b_log < _NARROW
    return tl.where(b_narrow, tl.exp2(-b_t) * tl.exp2(-b_log) * _G_SCALE, b_max), tl.where(b_narrow, -1.0, b_log)


@triton.jit
def _maxima(b_first, b_second, origin):
    """m and z from what `_factors` gives; of a row in range the origin stands for m."""
    b_narrow = b_second < 0.0
    b_log_e = tl.log2(tl.where(b_narrow, b_first, 1.0))
    return tl.where(b_narrow, origin, b_first), tl.where(b_narrow, _G_LOG - b_log_e, b_second)


@triton.jit
def _all_narrow(p_second, LENGTH, CHUNK: tl.constexpr):
    b_largest = tl.full((CHUNK,), -1.0, tl.float32)
    for i_chunk in range(0, LENGTH, CHUNK):
        o_tokens = i_chunk + tl.arange(0, CHUNK)
        b_largest = tl.maximum(b_largest, tl.load(p_second + o_tokens, mask=o_tokens < LENGTH, other=-1.0))
    return tl.max(b_largest, 0) < 0.0


@triton.jit
def _load_stats(p_rows, o_tokens, LENGTH):
    return tl.load(p_rows + o_tokens, mask=o_tokens < LENGTH, other=0.0)


@triton.jit
def _difference(b_s, b_m_s, b_z_s, C_S, b_t, b_m_t, b_z_t, C_T):
    """(S − P) · 2^14"""
    return (tl.exp2((b_s - b_m_s) * C_S - b_z_s) - tl.exp2((b_t - b_m_t) * C_T - b_z_t)) * _G_SCALE


@triton.jit(do_not_specialize=_RUNTIME)
def gradient_sweep(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_grad, s_grad, s_grad_seq, WEIGHT,
    p_origin, p_stats, s_plane, s_stats, s_stats_seq, C_S, C_T, MAX_LENGTH, HEADS, BLOCKS,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The owner's tokens are rows of the relation (dLeft), columns of it (dRight), or both (self relation)."""
    i_seq, i_head = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * OWN
    start, LENGTH = tl.load(p_starts + i_seq), tl.minimum(tl.load(p_lengths + i_seq), MAX_LENGTH)
    LIMIT = LENGTH if PACKED else MAX_LENGTH
    if first >= LIMIT:
        return
    place = (i_seq, start, i_head)
    o_own = first + tl.arange(0, OWN)
    b_own = o_own < LENGTH
    o_rows_own = _positions(p_order, s_order, i_seq, o_own, LIMIT)
    b_own_s = _load_rows(p_own_s, s_own_s, s_own_seq_s, place, o_rows_own, b_own, WIDTH_S, PADDED_S, UNIT_S)
    b_own_t = _load_rows(p_own_t, s_own_t, s_own_seq_t, place, o_rows_own, b_own, WIDTH_T, PADDED_T, UNIT_T)
    p_m_s = p_stats + i_head * s_stats + i_seq * s_stats_seq + start
    p_z_s, p_m_t, p_z_t = p_m_s + s_plane, p_m_s + 2 * s_plane, p_m_s + 3 * s_plane
    b_m_own_s = _load_stats(p_m_s, o_own[:, None], LENGTH)
    b_z_own_s = _load_stats(p_z_s, o_own[:, None], LENGTH)
    b_m_own_t = _load_stats(p_m_t, o_own[:, None], LENGTH)
    b_z_own_t = _load_stats(p_z_t, o_own[:, None], LENGTH)

    begin = first if CAUSAL and not ROWS else 0
    end = LENGTH
    if CAUSAL and not COLUMNS:
        end = tl.minimum(first + OWN, LENGTH)
    if first >= LENGTH:  # a block of padding walks over nothing and writes zeros
        end = begin
    SYMMETRIC: tl.constexpr = ROWS and COLUMNS and not CAUSAL
    if SYMMETRIC:
        narrow = _all_narrow(p_z_s, end, 1024) & _all_narrow(p_z_t, end, 1024)
        origin_s = tl.load(p_origin + (i_seq * HEADS + i_head) * 2)
        origin_t = tl.load(p_origin + (i_seq * HEADS + i_head) * 2 + 1)
    b_grad = tl.zeros((OWN, PADDED_S), tl.float32)
    # A symmetric head is walked over in one of two ways, see above; the other loop is empty.
    for PASS in tl.static_range(2 if SYMMETRIC else 1):
        stop = end
        if SYMMETRIC:
            stop = end if narrow == (PASS == 0) else begin
        for i_other in range(begin, stop, OTHER):
            o_other = i_other + tl.arange(0, OTHER)
            b_other = o_other < LENGTH
            o_rows = _positions(p_order, s_order, i_seq, o_other, LENGTH)
            b_other_s = _load_rows(
                p_other_s, s_other_s, s_other_seq_s, place, o_rows, b_other, WIDTH_S, PADDED_S, UNIT_S
            )
            b_other_t = _load_rows(
                p_other_t, s_other_t, s_other_seq_t, place, o_rows, b_other, WIDTH_T, PADDED_T, UNIT_T
            )
            b_s = _dot(b_own_s, tl.trans(b_other_s), INTERPRETED)
            b_t = _dot(b_own_t, tl.trans(b_other_t), INTERPRETED)
            if COLUMNS:
                b_m_other_s = _load_stats(p_m_s, o_other[None, :], LENGTH)
                b_z_other_s = _load_stats(p_z_s, o_other[None, :], LENGTH)
                b_m_other_t = _load_stats(p_m_t, o_other[None, :], LENGTH)
                b_z_other_t = _load_stats(p_z_t, o_other[None, :], LENGTH)
            b_pairs = b_other[None, :]
            if SYMMETRIC and PASS == 0:  # for m read e
                b_g = tl.exp2((b_s - origin_s) * C_S) * (b_m_own_s + b_m_other_s)
                b_g -= tl.exp2((b_t - origin_t) * C_T) * (b_m_own_t + b_m_other_t)
            elif SYMMETRIC:
                b_m_s, b_z_s = _maxima(b_m_own_s, b_z_own_s, origin_s)
                b_m_t, b_z_t = _maxima(b_m_own_t, b_z_own_t, origin_t)
                b_g = _difference(b_s, b_m_s, b_z_s, C_S, b_t, b_m_t, b_z_t, C_T)
                b_m_s, b_z_s = _maxima(b_m_other_s, b_z_other_s, origin_s)
                b_m_t, b_z_t = _maxima(b_m_other_t, b_z_other_t, origin_t)
                b_g += _difference(b_s, b_m_s, b_z_s, C_S, b_t, b_m_t, b_z_t, C_T)
            elif ROWS and COLUMNS:  # causal: of two tokens the later one is the row, and on the diagonal one is both
                b_row = o_other[None, :] <= o_own[:, None]
                b_g = _difference(
                    b_s, tl.where(b_row, b_m_own_s, b_m_other_s), tl.where(b_row, b_z_own_s, b_z_other_s), C_S,
                    b_t, tl.where(b_row, b_m_own_t, b_m_other_t), tl.where(b_row, b_z_own_t, b_z_other_t), C_T,
                )  # fmt: skip
                b_g = tl.where(o_other[None, :] == o_own[:, None], 2 * b_g, b_g)
            elif ROWS:
                b_g = _difference(b_s, b_m_own_s, b_z_own_s, C_S, b_t, b_m_own_t, b_z_own_t, C_T)
                if CAUSAL:
                    b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
            else:
                b_g = _difference(b_s, b_m_other_s, b_z_other_s, C_S, b_t, b_m_other_t, b_z_other_t, C_T)
                if CAUSAL:
                    b_pairs = b_pairs & (o_other[None, :] >= o_own[:, None])
            b_grad += _dot(tl.where(b_pairs, b_g, 0.0), b_other_s, INTERPRETED)

    b_grad = tl.where(b_own[:, None], b_grad * _gradient_factor(p_grad, WEIGHT, C_S, LENGTH), 0.0)
    _store_rows(p_grad, s_grad, s_grad_seq, place, o_rows_own, b_grad, o_own < LIMIT, WIDTH_S, PADDED_S, UNIT_S)


@triton.jit(do_not_specialize=_RUNTIME)
def sequence_losses(
    p_losses, p_starts, p_lengths, p_partial, s_partial, s_partial_seq, MAX_LENGTH, HEADS,
    OWN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_seq = tl.program_id(0).to(tl.int64)
    length = tl.load(p_lengths + i_seq)
    BLOCKS = tl.cdiv(tl.minimum(length, MAX_LENGTH), OWN)
    p_partial += i_seq * s_partial_seq + tl.load(p_starts + i_seq) // OWN
    b_sum = tl.zeros((CHUNK,), tl.float32)
    for i_chunk in range(0, HEADS * BLOCKS, CHUNK):
        o_partial = i_chunk + tl.arange(0, CHUNK)
        o_head = (o_partial // BLOCKS).to(tl.int64)
        b_sum += tl.load(p_partial + o_head * s_partial + o_partial % BLOCKS, mask=o_head < HEADS, other=0.0)
    tl.store(p_losses + i_seq, tl.sum(b_sum, 0) / (HEADS * tl.maximum(length, 1)))
