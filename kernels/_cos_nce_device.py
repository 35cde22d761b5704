"""The device side of cos_nce in Triton; formula, schemas and reference stand in fastkd/ops/cos_nce.py.

    run_sums    adds up unit vectors: a program reads one chunk of the samples, of one layer and position, and adds run
                by run, where a run is all samples, or in the list sorted by classes those of one class
    totals      adds what runs that reach over several chunks left behind, in the order of the chunks
    rows        losses, and the gradient while student and teacher are still in registers
    scale       multiplies a gradient where it lies, unless by one

A program holds ROWS rows of WIDTH columns, padded to BLOCK. Rows wider than BLOCK are read block by block: once for
their products, and once more, then out of the cache, for what becomes of them. Chunks follow from sizes alone, and
there are no atomics: every run on every device adds in the same order.
"""

import triton
import triton.language as tl

_SMALLEST = tl.constexpr(1e-16)  # the square of the norm at which a vector still counts as zero

# What may change from batch to batch: none of it may become part of what a kernel is compiled for.
_RUNTIME = (
    "s_layer", "s_sample", "s_position", "s_layer_s", "s_sample_s", "s_position_s", "s_layer_t", "s_sample_t",
    "s_position_t", "s_mask_sample", "s_mask_position", "s_weight", "SAMPLES", "POSITIONS", "SUMS", "CHUNKS", "SPAN",
    "ELEMENTS",
)  # fmt: skip


@triton.jit
def _load(p_rows, o_columns, b_there, WIDTH: tl.constexpr, POLICY: tl.constexpr):
    """(ROWS, BLOCK) in fp32; zero behind the width and where there is no row, whatever the memory holds there."""
    b_mask = b_there[:, None] & (o_columns < WIDTH)[None, :]
    b_rows = tl.load(p_rows[:, None] + o_columns[None, :], mask=b_mask, other=0.0, eviction_policy=POLICY)
    return b_rows.to(tl.float32)


@triton.jit
def _inverse_norm(b_squares):
    # A square that is infinite must not end as the inverse 0.
    return tl.where(b_squares <= _SMALLEST, 0.0, tl.rsqrt(b_squares) + 0.0 * b_squares)


@triton.jit
def _counted(p_mask, s_mask_sample, s_mask_position, o_samples, i_position, b_there):
    """Which of the samples have a vector at this position."""
    if p_mask is not None:
        p_rows = p_mask + o_samples * s_mask_sample + i_position * s_mask_position
        b_there = tl.load(p_rows, mask=b_there, other=0).to(tl.int1)
    return b_there


@triton.jit(do_not_specialize=_RUNTIME)
def run_sums(
    p_sums, p_edges, p_vectors, s_layer, s_sample, s_position, p_mask, s_mask_sample, s_mask_position,
    p_order, p_sorted, p_begins, SAMPLES, POSITIONS, SUMS, CHUNKS, SPAN,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """p_sorted: classes in ascending order; p_order: their samples; p_begins: where each begins, and the last one ends.

    The sum of a run that lies within the chunk is whole. Another, which can only be the chunk's first or its last, goes
    to p_edges: (layer, position, chunk, WIDTH), and with classes (layer, position, chunk, first or last, WIDTH).
    """
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    i_block = tl.program_id(0) % BLOCKS
    i_column = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_position, i_chunk, i_layer = i_column % POSITIONS, i_column // POSITIONS % CHUNKS, i_column // POSITIONS // CHUNKS
    p_vectors += (i_layer * s_layer + i_position * s_position) * UNIT
    o_columns = i_block * BLOCK + tl.arange(0, BLOCK)
    first = i_chunk * SPAN
    last = tl.minimum(first + SPAN, SAMPLES)
    place = first
    if p_order is not None:
        place = tl.maximum(first, tl.load(p_begins))  # those before have no class
    while place < last:
        begin, end, i_sum, i_edge = i_chunk * 0, i_chunk * 0 + SAMPLES, i_chunk * 0, i_chunk
        if p_order is not None:
            i_class = tl.load(p_sorted + place)
            begin, end = tl.load(p_begins + i_class), tl.load(p_begins + i_class + 1)
            i_sum, i_edge = (1 + i_class).to(tl.int64), 2 * i_chunk + (begin > first)
        stop = tl.minimum(end, last)
        b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        for i_row in range(place, stop, ROWS):
            o_samples = i_row + tl.arange(0, ROWS)
            b_there = o_samples < stop
            if p_order is not None:
                o_samples = tl.load(p_order + o_samples, mask=b_there, other=0)
            b_there = _counted(p_mask, s_mask_sample, s_mask_position, o_samples, i_position, b_there)
            p_rows = p_vectors + o_samples * (s_sample * UNIT)
            b_rows = _load(p_rows, o_columns, b_there, WIDTH, "")
            if BLOCKS == 1:
                b_squares = tl.sum(b_rows * b_rows, 1)
            else:
                b_squares = tl.zeros((ROWS,), tl.float32)
                for i_other in range(BLOCKS):
                    b_other = _load(p_rows, i_other * BLOCK + tl.arange(0, BLOCK), b_there, WIDTH, "")
                    b_squares += tl.sum(b_other * b_other, 1)
            b_sum += b_rows * _inverse_norm(b_squares)[:, None]
        if (begin >= first) & (end <= last):
            p_target = p_sums + ((i_layer * SUMS + i_sum) * POSITIONS + i_position) * WIDTH
        else:
            EDGES: tl.constexpr = 1 if p_order is None else 2
            p_target = p_edges + ((i_layer * POSITIONS + i_position) * CHUNKS * EDGES + i_edge) * WIDTH
        tl.store(p_target + o_columns, tl.sum(b_sum, 0), mask=o_columns < WIDTH)
        place = stop


@triton.jit(do_not_specialize=_RUNTIME)
def totals(
    p_sums, p_edges, p_begins, SAMPLES, POSITIONS, SUMS, CHUNKS, SPAN,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the sum over all samples, or, where there is p_begins, of those over the classes: zero for an empty one."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    o_columns = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    i_column = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_position, i_sum = i_column % POSITIONS, i_column // POSITIONS
    begin, end, i_layer = i_sum * 0, i_sum * 0 + SAMPLES, i_sum
    EDGES: tl.constexpr = 1 if p_begins is None else 2
    if p_begins is None:
        i_sum = i_layer * SUMS
    else:
        i_class = i_sum % (SUMS - 1)
        i_layer = i_sum // (SUMS - 1)
        i_sum = i_layer * SUMS + 1 + i_class
        begin, end = tl.load(p_begins + i_class), tl.load(p_begins + i_class + 1)
    first, last = begin // SPAN, (end + SPAN - 1) // SPAN
    if (begin == end) | (last > first + 1):  # another lies within one chunk, and its sum is there
        b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        if begin < end:
            p_edges += (i_layer * POSITIONS + i_position) * CHUNKS * EDGES * WIDTH
            for i_chunk in range(first, last, ROWS):
                o_chunks = i_chunk + tl.arange(0, ROWS)
                o_edges = o_chunks * EDGES
                if p_begins is not None:
                    o_edges += begin > o_chunks * SPAN
                b_sum += _load(p_edges + o_edges * WIDTH, o_columns, o_chunks < last, WIDTH, "")
        p_target = p_sums + (i_sum * POSITIONS + i_position) * WIDTH
        tl.store(p_target + o_columns, tl.sum(b_sum, 0), mask=o_columns < WIDTH)


@triton.jit
def _products(b_s, b_t, b_others):
    """s·s, t·t, s·t and s·others of each row."""
    return tl.sum(b_s * b_s, 1), tl.sum(b_t * b_t, 1), tl.sum(b_s * b_t, 1), tl.sum(b_s * b_others, 1)


@triton.jit
def _others(p_sums, p_class, o_columns, b_classed, WIDTH: tl.constexpr):
    """The sum of the negatives without that of each row's class; the row's own vector comes off later."""
    b_all = tl.load(p_sums + o_columns, mask=o_columns < WIDTH, other=0.0, eviction_policy="evict_last")[None, :]
    if p_class is not None:
        b_all = b_all - _load(p_class, o_columns, b_classed, WIDTH, "")
    return b_all


@triton.jit(do_not_specialize=_RUNTIME)
def rows(
    p_losses, p_grad, p_student, s_layer_s, s_sample_s, s_position_s, p_teacher, s_layer_t, s_sample_t, s_position_t,
    p_sums, p_counts, p_mask, s_mask_sample, s_mask_position, p_excluded, p_weights, s_weight, SCALE,
    SAMPLES, POSITIONS, SUMS, CHUNKS, SPAN,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT_S: tl.constexpr, UNIT_T: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    i_column = tl.program_id(0).to(tl.int64)
    i_position, i_chunk, i_layer = i_column % POSITIONS, i_column // POSITIONS % CHUNKS, i_column // POSITIONS // CHUNKS
    p_student += (i_layer * s_layer_s + i_position * s_position_s) * UNIT_S
    p_teacher += (i_layer * s_layer_t + i_position * s_position_t) * UNIT_T
    p_sums += (i_layer * SUMS * POSITIONS + i_position) * WIDTH
    count = tl.load(p_counts + i_position)
    o_block = tl.arange(0, BLOCK)
    first = i_chunk * SPAN
    last = tl.minimum(first + SPAN, SAMPLES)
    for i_row in range(first, last, ROWS):
        o_samples = i_row + tl.arange(0, ROWS)
        b_inside = o_samples < last
        b_there = _counted(p_mask, s_mask_sample, s_mask_position, o_samples, i_position, b_inside)
        b_classed = tl.zeros((ROWS,), tl.int1)
        b_own = tl.full((ROWS,), 1.0 if OWN else 0.0, tl.float32)  # whether the row's own vector comes off the sum
        b_count = count - b_own
        p_class = None
        if p_excluded is not None:
            b_class = tl.load(p_excluded + o_samples, mask=b_there, other=-1).to(tl.int64)
            b_classed = b_class >= 0
            o_class = tl.where(b_classed, 1 + b_class, 0) * POSITIONS
            p_class = p_sums + o_class * WIDTH
            b_taken = tl.load(p_counts + o_class + i_position, mask=b_classed, other=0.0)
            b_count = tl.where(b_classed, count - b_taken, b_count)
            b_own = tl.where(b_classed, 0.0, b_own)

        p_rows_s, p_rows_t = (
            p_student + o_samples * (s_sample_s * UNIT_S),
            p_teacher + o_samples * (s_sample_t * UNIT_T),
        )
        if BLOCKS == 1:
            b_s = _load(p_rows_s, o_block, b_there, WIDTH, "evict_first")
            b_t = _load(p_rows_t, o_block, b_there, WIDTH, "evict_first")
            b_others = _others(p_sums, p_class, o_block, b_classed, WIDTH)
            b_ss, b_tt, b_st, b_so = _products(b_s, b_t, b_others)
        else:
            b_ss = tl.zeros((ROWS,), tl.float32)
            b_tt = tl.zeros((ROWS,), tl.float32)
            b_st = tl.zeros((ROWS,), tl.float32)
            b_so = tl.zeros((ROWS,), tl.float32)
            for i_block in range(BLOCKS):
                o_columns = i_block * BLOCK + o_block
                b_part_s = _load(p_rows_s, o_columns, b_there, WIDTH, "")
                b_part_t = _load(p_rows_t, o_columns, b_there, WIDTH, "")
                b_part = _products(b_part_s, b_part_t, _others(p_sums, p_class, o_columns, b_classed, WIDTH))
                b_ss += b_part[0]
                b_tt += b_part[1]
                b_st += b_part[2]
                b_so += b_part[3]

        # u = a · t + h · others
        b_inverse = _inverse_norm(b_ss)
        b_h = tl.where(b_count > 0.5, 0.5 / tl.maximum(b_count, 1.0), 0.0)
        b_a = -(1.5 + b_h * b_own) * _inverse_norm(b_tt)
        b_along = (b_a * b_st + b_h * b_so) * b_inverse
        o_rows = (i_layer * SAMPLES + o_samples) * POSITIONS + i_position
        tl.store(p_losses + o_rows, tl.where(b_there, 2.0 + b_along, 0.0), mask=b_inside)
        if WITH_GRAD:
            b_factor = b_inverse * SCALE
            if p_weights is not None:
                b_factor *= tl.load(p_weights + o_samples * s_weight, mask=b_there, other=0.0)
            for i_block in range(BLOCKS):
                o_columns = i_block * BLOCK + o_block
                if BLOCKS > 1:
                    b_s = _load(p_rows_s, o_columns, b_there, WIDTH, "evict_first")
                    b_t = _load(p_rows_t, o_columns, b_there, WIDTH, "evict_first")
                    b_others = _others(p_sums, p_class, o_columns, b_classed, WIDTH)
                b_u = b_a[:, None] * b_t + b_h[:, None] * b_others
                b_grad = (b_u - (b_along * b_inverse)[:, None] * b_s) * b_factor[:, None]
                b_grad = tl.where(b_there[:, None], b_grad, 0.0).to(p_grad.dtype.element_ty)
                p_rows = p_grad + o_rows * WIDTH
                b_write = b_inside[:, None] & (o_columns < WIDTH)[None, :]
                tl.store(p_rows[:, None] + o_columns[None, :], b_grad, mask=b_write, cache_modifier=".cs")


@triton.jit(do_not_specialize=_RUNTIME)
def scale(p_grad, p_factor, ELEMENTS, BLOCK: tl.constexpr):
    factor = tl.load(p_factor)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, ELEMENTS, tl.num_programs(0) * BLOCK):
            p_block = p_grad + start + tl.arange(0, BLOCK)
            if start + BLOCK <= ELEMENTS:  # without a mask, so that accesses are 16 bytes wide
                tl.store(p_block, (tl.load(p_block).to(tl.float32) * factor).to(p_grad.dtype.element_ty))
            else:
                b_there = start + tl.arange(0, BLOCK) < ELEMENTS
                b_grad = tl.load(p_block, mask=b_there, other=0.0).to(tl.float32) * factor
                tl.store(p_block, b_grad.to(p_grad.dtype.element_ty), mask=b_there)
