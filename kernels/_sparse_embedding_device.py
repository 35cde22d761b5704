"""The device side of sparse_embedding in Triton; formula, schema and reference: fastkd/ops/sparse_embedding.py.

A program holds one row of WIDTH columns, padded to BLOCK, in registers. A rare token loads its atoms eight at a time,
as one tile, so that all their rows are on the way at once. The backward pass sorts contributions by the row they belong
to; one program then adds up a row in the order of its tokens: no atomics, and every run adds in the same order.

An id out of range is a device assert; nothing is read outside the arrays, also where a damaged code points there.
"""

import triton
import triton.language as tl

_ATOMS_AT_ONCE = tl.constexpr(8)

# What may change from batch to batch, and from model to model: none of it may become part of what a kernel is compiled
# for.
_RUNTIME = ("padding_idx", "LENGTH", "POSITIONS", "TYPES", "TOKENS", "KEPT", "CODED", "ATOMS", "PARTS", "SLOTS")


@triton.jit
def _in_range(index, COUNT):
    """The index, or 0 in the place of one that is out of range."""
    return tl.where((index >= 0) & (index < COUNT), index, 0)


@triton.jit
def _place(token, p_slot, TOKENS):
    tl.device_assert((token >= 0) & (token < TOKENS), "sparse_embedding: an id is out of range")
    place = tl.load(p_slot + _in_range(token, TOKENS)).to(tl.int64)
    return _in_range(place, TOKENS)


@triton.jit
def _row(
    token, p_slot, p_kept, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale, p_residual, p_codebook,
    TOKENS, KEPT, ATOMS, PARTS, o_columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row of one token in fp32, (BLOCK,)."""
    inside = o_columns < WIDTH
    place = _place(token, p_slot, TOKENS)
    b_row = tl.zeros((BLOCK,), tl.float32)
    if place < KEPT:
        b_row = tl.load(p_kept + place * WIDTH + o_columns, mask=inside, other=0).to(tl.float32)
        if p_kept_scale is not None:
            b_row *= tl.load(p_kept_scale + place)
    else:
        coded = place - KEPT
        if p_residual is not None:
            part_width = WIDTH // PARTS
            o_part = o_columns // part_width
            b_code = tl.load(p_residual + coded * PARTS + o_part, mask=inside, other=0).to(tl.int64)
            o_entry = (o_part * 256 + b_code) * part_width + o_columns % part_width
            b_row = tl.load(p_codebook + o_entry, mask=inside, other=0).to(tl.float32)
        for first in range(0, ATOMS, _ATOMS_AT_ONCE):
            o_atoms = first + tl.arange(0, _ATOMS_AT_ONCE)
            b_atoms, b_weights = _atoms(
                coded, o_atoms, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale, KEPT, ATOMS
            )
            there = (o_atoms < ATOMS)[:, None] & inside[None, :]
            b_rows = tl.load(p_kept + b_atoms[:, None] * WIDTH + o_columns[None, :], mask=there, other=0)
            b_row += tl.sum(b_rows.to(tl.float32) * b_weights[:, None], 0)
    return b_row


@triton.jit
def _atoms(coded, o_atoms, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale, KEPT, ATOMS):
    """Kept rows of a coded row, and their weights with both scales in them; zero behind the last."""
    there = o_atoms < ATOMS
    b_atoms = tl.load(p_atom_ids + coded * ATOMS + o_atoms, mask=there, other=0).to(tl.int64)
    b_weights = tl.load(p_atom_weights + coded * ATOMS + o_atoms, mask=there, other=0).to(tl.float32)
    b_atoms = _in_range(b_atoms, KEPT)
    if p_weight_scale is not None:
        b_weights *= tl.load(p_weight_scale + coded).to(tl.float32)
    if p_kept_scale is not None:
        b_weights *= tl.load(p_kept_scale + b_atoms, mask=there, other=0)
    return b_atoms, b_weights


@triton.jit(debug=True, do_not_specialize=_RUNTIME)
def lookup(
    p_out, p_ids, p_slot, p_kept, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale, p_residual, p_codebook,
    TOKENS, KEPT, ATOMS, PARTS, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_token = tl.program_id(0).to(tl.int64)
    o_columns = tl.arange(0, BLOCK)
    b_row = _row(
        tl.load(p_ids + i_token).to(tl.int64), p_slot, p_kept, p_kept_scale, p_atom_ids, p_atom_weights,
        p_weight_scale, p_residual, p_codebook, TOKENS, KEPT, ATOMS, PARTS, o_columns, WIDTH, BLOCK,
    )  # fmt: skip
    tl.store(p_out + i_token * WIDTH + o_columns, b_row.to(p_out.dtype.element_ty), mask=o_columns < WIDTH)


@triton.jit(debug=True, do_not_specialize=_RUNTIME)
def block(
    p_out, p_ids, p_type_ids, p_position_ids, p_slot, p_kept, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale,
    p_residual, p_codebook, p_positions, p_types, p_norm_weight, p_norm_bias, eps, LENGTH, POSITIONS, TYPES,
    TOKENS, KEPT, ATOMS, PARTS, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_token = tl.program_id(0).to(tl.int64)
    o_columns = tl.arange(0, BLOCK)
    inside = o_columns < WIDTH
    b_row = _row(
        tl.load(p_ids + i_token).to(tl.int64), p_slot, p_kept, p_kept_scale, p_atom_ids, p_atom_weights,
        p_weight_scale, p_residual, p_codebook, TOKENS, KEPT, ATOMS, PARTS, o_columns, WIDTH, BLOCK,
    )  # fmt: skip
    position = i_token % LENGTH
    if p_position_ids is not None:
        position = tl.load(p_position_ids + i_token).to(tl.int64)
    tl.device_assert((position >= 0) & (position < POSITIONS), "embedding_block: a position id is out of range")
    position = _in_range(position, POSITIONS)
    b_row += tl.load(p_positions + position * WIDTH + o_columns, mask=inside, other=0).to(tl.float32)
    if p_types is not None:
        kind = position * 0
        if p_type_ids is not None:
            kind = tl.load(p_type_ids + i_token).to(tl.int64)
        tl.device_assert((kind >= 0) & (kind < TYPES), "embedding_block: a token type id is out of range")
        kind = _in_range(kind, TYPES)
        b_row += tl.load(p_types + kind * WIDTH + o_columns, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(b_row, 0) / WIDTH
    b_centred = tl.where(inside, b_row - mean, 0.0)
    factor = 1 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 0) / WIDTH + eps)
    b_weight = tl.load(p_norm_weight + o_columns, mask=inside, other=0).to(tl.float32)
    b_bias = tl.load(p_norm_bias + o_columns, mask=inside, other=0).to(tl.float32)
    b_out = b_centred * factor * b_weight + b_bias
    tl.store(p_out + i_token * WIDTH + o_columns, b_out.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(debug=True, do_not_specialize=_RUNTIME)
def contributions(
    p_rows, p_weights, p_coded, p_ids, padding_idx, p_slot, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale,
    TOKENS, KEPT, CODED, ATOMS, PADDED: tl.constexpr,
):  # fmt: skip
    """The kept rows that a token gives gradient to, with their weights, and its coded row; KEPT and CODED for none."""
    i_token = tl.program_id(0).to(tl.int64)
    o_slots = tl.arange(0, PADDED)
    there = o_slots < tl.maximum(ATOMS, 1)
    token = tl.load(p_ids + i_token).to(tl.int64)
    place = _place(token, p_slot, TOKENS)
    b_rows = tl.where(o_slots == 0, place, KEPT)
    b_weights = tl.full((PADDED,), 1.0, tl.float32)
    coded = place * 0 + CODED
    if place >= KEPT:
        coded = place - KEPT
        b_atoms, b_weights = _atoms(
            coded, o_slots, p_kept_scale, p_atom_ids, p_atom_weights, p_weight_scale, KEPT, ATOMS
        )
        b_rows = tl.where(o_slots < ATOMS, b_atoms, KEPT)
    if token == padding_idx:
        b_rows = tl.full((PADDED,), 0, tl.int64) + KEPT
        coded = place * 0 + CODED
    o_own = i_token * tl.maximum(ATOMS, 1) + o_slots
    tl.store(p_rows + o_own, b_rows.to(tl.int32), mask=there)
    tl.store(p_weights + o_own, b_weights, mask=there)
    tl.store(p_coded + i_token, coded.to(tl.int32))


@triton.jit(do_not_specialize=_RUNTIME)
def kept_gradient(p_d_kept, p_upstream, p_begins, p_sorted, p_weights, SLOTS, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """d kept of one row: its contributions, from p_begins[row] to p_begins[row + 1] in the sorted list."""
    i_row = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o_columns < WIDTH
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for place in range(tl.load(p_begins + i_row), tl.load(p_begins + i_row + 1)):
        own = tl.load(p_sorted + place)
        b_upstream = tl.load(p_upstream + own // SLOTS * WIDTH + o_columns, mask=inside, other=0)
        b_sum += tl.load(p_weights + own) * b_upstream.to(tl.float32)
    tl.store(p_d_kept + i_row * WIDTH + o_columns, b_sum.to(p_d_kept.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def weight_gradient(
    p_d_weights, p_upstream, p_begins, p_sorted, p_kept, p_kept_scale, p_atom_ids, ATOMS, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d atom_weights of one coded row: the dot products of its kept rows with the sum of its tokens' gradients."""
    i_row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(p_begins + i_row), tl.load(p_begins + i_row + 1)
    o_atoms = tl.arange(0, PADDED)
    there = o_atoms < ATOMS
    b_dots = tl.zeros((PADDED,), tl.float32)
    if begin < end:
        b_atoms = tl.load(p_atom_ids + i_row * ATOMS + o_atoms, mask=there, other=0).to(tl.int64)
        for first in range(0, WIDTH, BLOCK):
            o_columns = first + tl.arange(0, BLOCK)
            inside = o_columns < WIDTH
            b_sum = tl.zeros((BLOCK,), tl.float32)
            for place in range(begin, end):
                token = tl.load(p_sorted + place)
                b_sum += tl.load(p_upstream + token * WIDTH + o_columns, mask=inside, other=0).to(tl.float32)
            o_rows = b_atoms[:, None] * WIDTH + o_columns[None, :]
            b_rows = tl.load(p_kept + o_rows, mask=there[:, None] & inside[None, :], other=0)
            b_dots += tl.sum(b_rows.to(tl.float32) * b_sum[None, :], 1)
        if p_kept_scale is not None:
            b_dots *= tl.load(p_kept_scale + b_atoms, mask=there, other=0)
    tl.store(p_d_weights + i_row * ATOMS + o_atoms, b_dots.to(p_d_weights.dtype.element_ty), mask=there)
