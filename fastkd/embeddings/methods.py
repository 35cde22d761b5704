"""The methods of `fastkd compress-embeddings` as arguments of `SparseCode.fit`, one setting or a grid of them."""

import itertools

import torch

from fastkd.embeddings.fit import index_dtype, rows_kept

# What is tried. A residual is given by the numbers that share one of its bytes.
_KEEPS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
_ATOMS = {"sparse": (4, 8, 16), "residual": (4, 8), "pq": (0,)}
_NUMBERS_PER_BYTE = {"sparse": (None,), "residual": (32, 16), "pq": (16, 8, 6, 4)}
_STORAGE = (("float16", "float16"), ("int8", "int8"))
METHODS = tuple(_ATOMS)


def setting(
    method: str,
    width: int,
    *,
    keep: float = 0.1,
    atoms: int | None = None,
    numbers_per_byte: int | None = None,
    rows: str | None = None,
    weights: str | None = None,
) -> dict:
    """The arguments of `SparseCode.fit` for one of `METHODS`: `sparse`, the paper's; `residual`, with a
    product-quantised residual beside the atoms; `pq`, coded rows product-quantised as they are. `width` is the table's.

    atoms: 8 by default, none in `pq`. numbers_per_byte: numbers of a row that share a byte of the residual, 16 by
    default, in `pq` 6; the nearest that divides the width is taken. rows, weights: fp16 by default, in `residual` and
    `pq` int8, whose rounding is far below what those two leave.

    Raises ValueError on atoms for `pq`.
    """
    if method == "pq" and atoms:
        raise ValueError(f"atoms={atoms}: in product quantisation (pq) a row is made of none; leave them out")
    parts = 0
    if method != "sparse":
        wanted = width / (numbers_per_byte or {"residual": 16, "pq": 6}[method])
        parts = min((m for m in range(1, width + 1) if width % m == 0), key=lambda m: abs(m - wanted))
    atoms = 0 if method == "pq" else 8 if atoms is None else atoms
    stored = "float16" if method == "sparse" else "int8"
    return {
        "keep": keep,
        "atoms": atoms,
        "rows": rows or stored,
        "weights": weights or stored,
        "residual_bytes": parts,
    }


def settings_to_try(
    method: str,
    vocabulary: int,
    width: int,
    special: int,
    *,
    rows: str | None = None,
    weights: str | None = None,
    nbytes: int | None = None,
) -> list[dict]:
    """A grid over kept share, atoms, residual and storage, without what a table of `vocabulary` rows of `width`, of
    which `special` must be kept, has no room for. Given formats are not varied.

    nbytes: a budget; without settings whose code is larger, which saves the fits that take longest.

    Raises ValueError where nothing is left, with the least budget that leaves something.
    """
    grid = itertools.product(_KEEPS, _ATOMS[method], _NUMBERS_PER_BYTE[method], _STORAGE)
    tried = [
        setting(
            method,
            width,
            keep=keep,
            atoms=atoms,
            numbers_per_byte=numbers,
            rows=rows or both[0],
            weights=weights or both[1],
        )
        for keep, atoms, numbers, both in grid
        if max(atoms, special, 1) <= rows_kept(keep, vocabulary) < vocabulary and atoms <= width
    ]
    tried = [each for place, each in enumerate(tried) if each not in tried[:place]]
    if not tried:
        raise ValueError(
            f"method={method}: nothing to choose from for a table of {vocabulary} rows of {width}, of which {special} "
            "must be kept"
        )
    fitting = [each for each in tried if nbytes is None or code_bytes(each, vocabulary, width) <= nbytes]
    if not fitting:
        least = min(code_bytes(each, vocabulary, width) for each in tried)
        raise ValueError(
            f"budget={nbytes:,} bytes is too small for this table; the least for {method} is {least:,} bytes"
        )
    return fitting


def code_bytes(setting: dict, vocabulary: int, width: int) -> int:
    """`SparseCode.nbytes` of what a setting makes of a table of `vocabulary` rows of `width`, before it is fitted."""
    rows, weights = setting["rows"], setting["weights"]
    kept, atoms, residual = rows_kept(setting["keep"], vocabulary), setting["atoms"], setting["residual_bytes"]
    per_kept = width * getattr(torch, rows).itemsize + (4 if rows == "int8" else 0)
    per_coded = atoms * (index_dtype(kept).itemsize + getattr(torch, weights).itemsize) + residual
    per_coded += 2 if atoms and weights == "int8" else 0
    codebook = 2 * 256 * width if residual else 0
    return vocabulary * index_dtype(vocabulary).itemsize + kept * per_kept + (vocabulary - kept) * per_coded + codebook
