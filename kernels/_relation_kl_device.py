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
_G_SCALE = tl.constexpr(2.0**14)
# Largest spread of a head's row maxima (log2) for which the factors of `_symmetric` neither overflow nor underflow.
_SPREAD = tl.constexpr(120.0)

# What may change from batch to batch: none of it may become part of what a kernel is compiled for.
_RUNTIME = (
    "s_own_s", "s_own_seq_s", "s_other_s", "s_other_seq_s", "s_own_t", "s_own_seq_t", "s_other_t", "s_other_seq_t",
    "s_order", "s_stats", "s_stats_seq", "s_partial", "s_partial_seq", "s_grad", "s_grad_seq",
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
def _dot(b_left, b_right, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter would multiply the bit patterns of bf16
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), input_precision="ieee")
    return tl.dot(b_left.to(b_right.dtype), b_right, input_precision="ieee")


@triton.jit(do_not_specialize=_RUNTIME)
def short(
    p_own_s, s_own_s, s_own_seq_s, p_other_s, s_other_s, s_other_seq_s,
    p_own_t, s_own_t, s_own_seq_t, p_other_t, s_other_t, s_other_seq_t,
    p_starts, p_lengths, p_order, s_order, p_partial, s_partial, s_partial_seq,
    p_grad, p_grad_right, s_grad, s_grad_seq, C_S, C_T, MAX_LENGTH,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, TILE: tl.constexpr, CROSS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    WITH_GRAD: tl.constexpr, UPCAST: tl.constexpr,
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

    factor = C_S * (_LN_2 / _G_SCALE)  # 1 / √d
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
    p_stats, s_stats, s_stats_seq, C_S, C_T, MAX_LENGTH, HEADS, BLOCKS,
    WIDTH_S: tl.constexpr, PADDED_S: tl.constexpr, UNIT_S: tl.constexpr,
    WIDTH_T: tl.constexpr, PADDED_T: tl.constexpr, UNIT_T: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, WITH_GRAD: tl.constexpr, UPCAST: tl.constexpr,
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
    b_kl = tl.where(b_own, b_cross / b_sum_t - b_log_t + b_log_s, 0.0)
    p_partial += i_head * s_partial + i_seq * s_partial_seq + start // OWN + first // OWN
    tl.store(p_partial, tl.sum(b_kl, 0) * _LN_2)
    if WITH_GRAD:
        p_rows = p_stats + i_head * s_stats + i_seq * s_stats_seq + start + o_own
        tl.store(p_rows, b_max_s, mask=b_own)
        tl.store(p_rows + HEADS * s_stats, b_log_s, mask=b_own)
        tl.store(p_rows + 2 * HEADS * s_stats, b_max_t, mask=b_own)
        tl.store(p_rows + 3 * HEADS * s_stats, b_log_t, mask=b_own)


@triton.jit
def _load_stats(p_rows, s_plane, o_tokens, LENGTH):
    """m and z of the student, m and z of the teacher."""
    p_tokens, b_valid = p_rows + o_tokens, o_tokens < LENGTH
    b_max_s = tl.load(p_tokens, mask=b_valid, other=0.0)
    b_log_s = tl.load(p_tokens + s_plane, mask=b_valid, other=0.0)
    b_max_t = tl.load(p_tokens + 2 * s_plane, mask=b_valid, other=0.0)
    b_log_t = tl.load(p_tokens + 3 * s_plane, mask=b_valid, other=0.0)
    return b_max_s, b_log_s, b_max_t, b_log_t


@triton.jit
def _middle(p_max, LENGTH, C, CHUNK: tl.constexpr):
    """The middle of a head's row maxima, and whether they lie close enough together for `_symmetric`."""
    b_low = tl.full((CHUNK,), -_MASKED, tl.float32)
    b_high = tl.full((CHUNK,), _MASKED, tl.float32)
    for i_chunk in range(0, LENGTH, CHUNK):
        o_tokens = i_chunk + tl.arange(0, CHUNK)
        b_low = tl.minimum(b_low, tl.load(p_max + o_tokens, mask=o_tokens < LENGTH, other=-_MASKED))
        b_high = tl.maximum(b_high, tl.load(p_max + o_tokens, mask=o_tokens < LENGTH, other=_MASKED))
    low, high = tl.min(b_low, 0), tl.max(b_high, 0)
    return low + (high - low) * 0.5, (high - low) * C < _SPREAD


@triton.jit
def _probabilities(b_scores, b_max, b_log, C):
    return tl.exp2((b_scores - b_max) * C - b_log)


@triton.jit
def _symmetric(b_scores, middle, C, b_max_own, b_log_own, b_max_other, b_log_other):
    """P_ij + P_ji by one exponential: with h half a row's log-sum-exp they are exp2(a − h_i − h_j) · exp2(±(h_i − h_j))."""
    b_own = ((b_max_own - middle) * C + b_log_own) * 0.5
    b_other = ((b_max_other - middle) * C + b_log_other) * 0.5
    b_ratio = tl.exp2(b_own) * tl.exp2(-b_other) + tl.exp2(-b_own) * tl.exp2(b_other)
    return tl.exp2((b_scores - middle) * C - b_own - b_other) * b_ratio


@triton.jit(do_not_specialize=_RUNTIME)
def gradient_sweep(
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
    p_rows = p_stats + i_head * s_stats + i_seq * s_stats_seq + start
    s_plane = HEADS * s_stats
    b_max_s, b_log_s, b_max_t, b_log_t = _load_stats(p_rows, s_plane, o_own[:, None], LENGTH)

    begin = first if CAUSAL and not ROWS else 0
    end = LENGTH
    if CAUSAL and not COLUMNS:
        end = tl.minimum(first + OWN, LENGTH)
    if first >= LENGTH:  # a block of padding walks over nothing and writes zeros
        end = begin
    if ROWS and COLUMNS and not CAUSAL:
        middle_s, narrow_s = _middle(p_rows, end, C_S, 1024)
        middle_t, narrow_t = _middle(p_rows + 2 * s_plane, end, C_T, 1024)
        narrow = narrow_s & narrow_t
    b_grad = tl.zeros((OWN, PADDED_S), tl.float32)
    for i_other in range(begin, end, OTHER):
        o_other = i_other + tl.arange(0, OTHER)
        b_other = o_other < LENGTH
        o_rows = _positions(p_order, s_order, i_seq, o_other, LENGTH)
        b_other_s = _load_rows(p_other_s, s_other_s, s_other_seq_s, place, o_rows, b_other, WIDTH_S, PADDED_S, UNIT_S)
        b_other_t = _load_rows(p_other_t, s_other_t, s_other_seq_t, place, o_rows, b_other, WIDTH_T, PADDED_T, UNIT_T)
        b_s = _dot(b_own_s, tl.trans(b_other_s), UPCAST)
        b_t = _dot(b_own_t, tl.trans(b_other_t), UPCAST)
        if COLUMNS:
            c_max_s, c_log_s, c_max_t, c_log_t = _load_stats(p_rows, s_plane, o_other[None, :], LENGTH)
        b_pairs = b_other[None, :]
        if ROWS and COLUMNS and CAUSAL:  # of two tokens the later one is the row; on the diagonal one is both
            b_row = o_other[None, :] <= o_own[:, None]
            b_g = _probabilities(b_s, tl.where(b_row, b_max_s, c_max_s), tl.where(b_row, b_log_s, c_log_s), C_S)
            b_g -= _probabilities(b_t, tl.where(b_row, b_max_t, c_max_t), tl.where(b_row, b_log_t, c_log_t), C_T)
            b_g = tl.where(o_other[None, :] == o_own[:, None], 2 * b_g, b_g)
        elif ROWS and COLUMNS:
            if narrow:
                b_g = _symmetric(b_s, middle_s, C_S, b_max_s, b_log_s, c_max_s, c_log_s)
                b_g -= _symmetric(b_t, middle_t, C_T, b_max_t, b_log_t, c_max_t, c_log_t)
            else:
                b_g = _probabilities(b_s, b_max_s, b_log_s, C_S) - _probabilities(b_t, b_max_t, b_log_t, C_T)
                b_g += _probabilities(b_s, c_max_s, c_log_s, C_S) - _probabilities(b_t, c_max_t, c_log_t, C_T)
        elif ROWS:
            b_g = _probabilities(b_s, b_max_s, b_log_s, C_S) - _probabilities(b_t, b_max_t, b_log_t, C_T)
            if CAUSAL:
                b_pairs = b_pairs & (o_other[None, :] <= o_own[:, None])
        else:
            b_g = _probabilities(b_s, c_max_s, c_log_s, C_S) - _probabilities(b_t, c_max_t, c_log_t, C_T)
            if CAUSAL:
                b_pairs = b_pairs & (o_other[None, :] >= o_own[:, None])
        b_grad += _dot(tl.where(b_pairs, b_g * _G_SCALE, 0.0), b_other_s, UPCAST)

    b_grad = tl.where(b_own[:, None], b_grad * (C_S * (_LN_2 / _G_SCALE)), 0.0)
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
