"""The device side of attribution_distance in Triton; formula, schema and reference stand in
fastkd/ops/attribution_distance.py.

    scores      a of each token and class
    compare     per sequence and class: norm, distance, and w, both times 1 / (B n) unless w is not to be weighted
    gradients   of G and x, from w and a; padding is not read

Rows are WIDTH wide, padded to BLOCK; of wider ones `scores` reads block by block, and `gradients` has a program for
each block. There are no atomics.
"""

import triton
import triton.language as tl

# What may change from batch to batch: none of it may become part of what a kernel is compiled for.
_RUNTIME = (
    "s_batch", "s_class", "s_token", "s_batch_x", "s_token_x", "s_mask_batch", "s_mask_token", "CLASSES", "LENGTH",
    "TILES",
)  # fmt: skip


@triton.jit
def _load(p_rows, o_columns, b_read, WIDTH: tl.constexpr, POLICY: tl.constexpr):
    """(ROWS, BLOCK) in fp32; zero behind the width and where a row is not to be read."""
    b_mask = b_read[:, None] & (o_columns < WIDTH)[None, :]
    b_rows = tl.load(p_rows[:, None] + o_columns[None, :], mask=b_mask, other=0.0, eviction_policy=POLICY)
    return b_rows.to(tl.float32)


@triton.jit
def _tokens(p_mask, s_mask_batch, s_mask_token, i_batch, o_tokens, LENGTH):
    """Which of the places hold a token."""
    b_there = o_tokens < LENGTH
    if p_mask is not None:
        p_places = p_mask + i_batch * s_mask_batch + o_tokens * s_mask_token
        b_there = b_there & tl.load(p_places, mask=b_there, other=0).to(tl.int1)
    return b_there


@triton.jit(do_not_specialize=_RUNTIME)
def scores(
    p_scores, p_gradient, s_batch, s_class, s_token, p_inputs, s_batch_x, s_token_x, p_mask, s_mask_batch, s_mask_token,
    CLASSES, LENGTH, TILES,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, UNIT_X: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    i_tile = (tl.program_id(0) % TILES) * ROWS
    i_sequence = (tl.program_id(0) // TILES).to(tl.int64)
    i_batch, i_class = i_sequence // CLASSES, i_sequence % CLASSES
    o_tokens = (i_tile + tl.arange(0, ROWS)).to(tl.int64)  # times a stride it may not fit into 32 bits
    b_token = _tokens(p_mask, s_mask_batch, s_mask_token, i_batch, o_tokens, LENGTH)
    p_rows = p_gradient + (i_batch * s_batch + i_class * s_class + o_tokens * s_token) * UNIT
    b_sum = tl.zeros((ROWS,), tl.float32)
    for i_block in range((WIDTH + BLOCK - 1) // BLOCK):
        o_columns = i_block * BLOCK + tl.arange(0, BLOCK)
        b_product = _load(p_rows, o_columns, b_token, WIDTH, "")
        if p_inputs is not None:
            p_rows_x = p_inputs + (i_batch * s_batch_x + o_tokens * s_token_x) * UNIT_X
            b_product *= _load(p_rows_x, o_columns, b_token, WIDTH, "")
        b_sum += tl.sum(b_product if SUM else b_product * b_product, 1)
    b_scores = b_sum if SUM else tl.sqrt(b_sum)
    tl.store(p_scores + i_sequence * LENGTH + o_tokens, b_scores, mask=o_tokens < LENGTH)


@triton.jit
def _apart(b_normalised, b_teacher, KIND: tl.constexpr):
    """φ and its derivative."""
    b_z = b_normalised - b_teacher
    b_size = tl.abs(b_z)
    b_sign = tl.where(b_z > 0, 1.0, 0.0) - tl.where(b_z < 0, 1.0, 0.0)
    if KIND == "l2":
        b_each, b_slope = b_z * b_z, 2 * b_z
    elif KIND == "l1":
        b_each, b_slope = b_size, b_sign
    else:
        b_each = tl.where(b_size < 1, 0.5 * b_z * b_z, b_size - 0.5)
        b_slope = tl.where(b_size < 1, b_z, b_sign)
    return b_each, b_slope


@triton.jit(do_not_specialize=_RUNTIME)
def compare(
    p_sums, p_pull, p_scores, p_teacher, p_mask, s_mask_batch, s_mask_token, BATCH_SHARE, CLASSES, LENGTH,
    SPAN: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    i_sequence = tl.program_id(0).to(tl.int64)
    i_batch = i_sequence // CLASSES
    p_scores += i_sequence * LENGTH
    p_teacher += i_sequence * LENGTH
    b_size = tl.zeros((SPAN,), tl.float32)
    b_says = tl.zeros((SPAN,), tl.int32)
    b_count = tl.zeros((SPAN,), tl.int32)
    for i_token in range(0, LENGTH, SPAN):
        o_tokens = i_token + tl.arange(0, SPAN)
        b_token = _tokens(p_mask, s_mask_batch, s_mask_token, i_batch, o_tokens, LENGTH)
        b_count += b_token.to(tl.int32)
        b_scores = tl.load(p_scores + o_tokens, mask=b_token, other=0.0)
        b_says += (tl.load(p_teacher + o_tokens, mask=b_token, other=0.0) != 0).to(tl.int32)
        b_size += b_scores * b_scores if NORM == "l2" else tl.abs(b_scores)
    says = tl.sum(b_says) > 0
    size = tl.sum(b_size)
    if NORM == "l2":
        size = tl.sqrt(size)
    # An infinite size must not end as the inverse 0.
    inverse = tl.where(size == 0, 0.0, 1.0 / size + 0.0 * size)
    if NORM == "none":
        inverse = size * 0.0 + 1.0
    b_sum = tl.zeros((SPAN,), tl.float32)
    b_along = tl.zeros((SPAN,), tl.float32)
    for i_token in range(0, LENGTH, SPAN):
        o_tokens = i_token + tl.arange(0, SPAN)
        b_token = _tokens(p_mask, s_mask_batch, s_mask_token, i_batch, o_tokens, LENGTH)
        b_normalised = tl.load(p_scores + o_tokens, mask=b_token, other=0.0) * inverse
        b_teacher = tl.load(p_teacher + o_tokens, mask=b_token, other=0.0)
        b_each, b_slope = _apart(b_normalised, b_teacher, KIND)
        b_sum += tl.where(b_token, b_each, 0.0)
        b_along += tl.where(b_token, b_slope * b_normalised, 0.0)
    total, along = tl.sum(b_sum), tl.sum(b_along)
    weight = BATCH_SHARE / tl.maximum(tl.sum(b_count), 1)
    finite = tl.abs(total) < float("inf")
    tl.store(p_sums + i_sequence, tl.where(says, tl.where(finite, total * weight, float("nan")), 0.0))
    if p_pull is not None:
        if not WEIGHTED:
            weight = 1.0
        p_pull += i_sequence * LENGTH
        for i_token in range(0, LENGTH, SPAN):
            o_tokens = i_token + tl.arange(0, SPAN)
            b_token = _tokens(p_mask, s_mask_batch, s_mask_token, i_batch, o_tokens, LENGTH)
            b_scores = tl.load(p_scores + o_tokens, mask=b_token, other=0.0)
            b_normalised = b_scores * inverse
            b_teacher = tl.load(p_teacher + o_tokens, mask=b_token, other=0.0)
            _, b_slope = _apart(b_normalised, b_teacher, KIND)
            if NORM == "l2":
                b_slope -= b_normalised * along
            elif NORM == "l1":
                b_slope -= (tl.where(b_scores > 0, 1.0, 0.0) - tl.where(b_scores < 0, 1.0, 0.0)) * along
            b_pull = tl.where(says, tl.where(finite, b_slope * inverse * weight, 0.0), 0.0)
            b_pull = tl.where(b_token, b_pull, 0.0)
            tl.store(p_pull + o_tokens, b_pull, mask=o_tokens < LENGTH)


@triton.jit(do_not_specialize=_RUNTIME)
def gradients(
    p_of_gradient, p_of_inputs, p_scores, p_pull, p_gradient, s_batch, s_class, s_token, p_inputs, s_batch_x, s_token_x,
    CLASSES, LENGTH, TILES,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, UNIT_X: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    o_columns = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    i_tile = (tl.program_id(0) // BLOCKS % TILES) * ROWS
    i_batch = (tl.program_id(0) // BLOCKS // TILES).to(tl.int64)
    o_tokens = (i_tile + tl.arange(0, ROWS)).to(tl.int64)  # times a stride it may not fit into 32 bits
    b_inside = o_tokens < LENGTH
    b_write = b_inside[:, None] & (o_columns < WIDTH)[None, :]
    b_of_inputs = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_class in range(CLASSES):
        o_places = (i_batch * CLASSES + i_class) * LENGTH + o_tokens
        b_pull = tl.load(p_pull + o_places, mask=b_inside, other=0.0)
        b_scores = tl.load(p_scores + o_places, mask=b_inside, other=0.0)
        b_pulled = b_pull != 0 if SUM else (b_pull != 0) & (b_scores != 0)
        b_w = b_pull[:, None]
        p_rows = p_gradient + (i_batch * s_batch + (i_batch * 0 + i_class) * s_class + o_tokens * s_token) * UNIT
        b_g = _load(p_rows, o_columns, b_pulled, WIDTH, "evict_first")
        b_x = b_g
        if p_inputs is not None:
            p_rows_x = p_inputs + (i_batch * s_batch_x + o_tokens * s_token_x) * UNIT_X
            b_x = _load(p_rows_x, o_columns, b_pulled, WIDTH, "")
        if SUM:
            b_of_gradient, b_of_x = b_w * b_x, b_w * b_g
        else:
            b_inverse = tl.where(b_pulled, 1.0 / b_scores, 0.0)[:, None]
            if p_inputs is None:
                b_of_gradient, b_of_x = b_g * b_inverse * b_w, b_g
            else:
                b_direction = b_g * b_x * b_inverse
                b_of_gradient, b_of_x = b_direction * (b_x * b_w), b_direction * (b_g * b_w)
        if p_of_gradient is not None:
            p_target = p_of_gradient + o_places[:, None] * WIDTH + o_columns[None, :]
            b_value = b_of_gradient.to(p_of_gradient.dtype.element_ty)
            tl.store(p_target, b_value, mask=b_write, cache_modifier=".cs")
        b_of_inputs += b_of_x
    if p_of_inputs is not None:
        p_target = p_of_inputs + (i_batch * LENGTH + o_tokens)[:, None] * WIDTH + o_columns[None, :]
        tl.store(p_target, b_of_inputs.to(p_of_inputs.dtype.element_ty), mask=b_write, cache_modifier=".cs")
