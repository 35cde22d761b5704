"""Every way to store an embedding table in a given number of bytes, so that they can be compared at equal bytes."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastkd.embeddings import SparseCode
from fastkd.embeddings.baselines import (
    StoredTable,
    integer_rows,
    low_rank,
    product_quantised,
    random_neighbours,
    rare_as_unknown,
)
from fastkd.embeddings.fit import FORMATS, index_dtype

METHODS = {
    "sparse": "sparse code (the paper's method)",
    "residual": "sparse code with a quantised residual",
    "pq_rare": "exact frequent rows, product quantisation of the others",
    "pq": "product quantisation of all rows",
    "integers": "integers with a scale per row",
    "svd": "low rank (SVD)",
    "unknown": "rare tokens as [UNK]",
    "random": "sparse code of random neighbours",
}
# What is chosen among on held-out data, beside the kept rows, which take what the budget leaves.
_SPARSE = [{"atoms": atoms, "rows": "float16", "weights": "float16"} for atoms in (4, 8, 16)]
_RESIDUAL = [
    {"atoms": atoms, "rows": "int8", "weights": "int8", "numbers_per_byte": numbers}
    for atoms in (4, 8)
    for numbers in (32, 16, 8)
]
_PQ_RARE = [{"atoms": 0, "rows": "int8", "weights": "float16", "numbers_per_byte": numbers} for numbers in (16, 8, 4)]


def candidates(method: str, vocabulary: int, width: int, budget: int, special: int) -> list[dict]:
    """The settings of `method` that fill `budget` bytes, to choose among; none where the budget is too small for it.
    `special` tokens must be kept."""
    index = index_dtype(vocabulary).itemsize * vocabulary
    match method:
        case "sparse" | "random":
            grid = _SPARSE
        case "residual":
            grid = _RESIDUAL
        case "pq_rare":
            grid = _PQ_RARE
        case "pq":
            least = 2 * 256 * width + vocabulary + index
            return [{"weighted": False}, {"weighted": True}] if least <= budget else []
        case "integers":
            fitting = [bits for bits, scale in ((8, 4), (4, 2)) if vocabulary * (width * bits // 8 + scale) <= budget]
            return [{"bits": bits} for bits in fitting[:1]]
        case "svd":
            return [{}] if 2 * (vocabulary + width) <= budget else []
        case "unknown":
            return [{}] if special * 2 * width + index <= budget else []
        case _:
            raise ValueError(f"no method {method!r}; allowed are {', '.join(METHODS)}")
    filled = [_filled(dict(each), vocabulary, width, budget, special) for each in grid]
    return [each for place, each in enumerate(filled) if each is not None and each not in filled[:place]]


def code_bytes(
    kept: int, vocabulary: int, width: int, *, atoms: int, rows: str, weights: str, residual_bytes: int
) -> int:
    """`SparseCode.nbytes` of a code that keeps so many rows, without the fit."""
    row = width * FORMATS[rows].itemsize + (4 if rows == "int8" else 0)
    scale = 2 if weights == "int8" and atoms else 0
    coded = atoms * (FORMATS[weights].itemsize + index_dtype(kept).itemsize) + scale + residual_bytes
    codebook = 2 * 256 * width if residual_bytes else 0
    return kept * row + (vocabulary - kept) * coded + vocabulary * index_dtype(vocabulary).itemsize + codebook


def _filled(setting: dict, vocabulary: int, width: int, budget: int, special: int) -> dict | None:
    """Arguments of `SparseCode.fit` with the most kept rows that fit; None where these are too few."""
    numbers = setting.pop("numbers_per_byte", None)
    setting["residual_bytes"] = width // numbers if numbers else 0
    if setting["residual_bytes"] and width % setting["residual_bytes"]:
        return None
    low, high = 0, vocabulary - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = code_bytes(middle, vocabulary, width, **setting) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    enough = low >= max(special, setting["atoms"], 1) and code_bytes(low, vocabulary, width, **setting) <= budget
    return {"keep": low / vocabulary, **setting} if enough and setting["atoms"] <= width else None


def store(
    method: str,
    setting: dict,
    weight: Tensor,
    counts: Tensor,
    budget: int,
    *,
    special_ids: Iterable[int],
    unknown_id: int,
) -> SparseCode | StoredTable:
    """(V, D) `weight` as `method` stores it with one of its `candidates`, in at most `budget` bytes. counts: (V,)."""
    match method:
        case "random":
            given = {name: value for name, value in setting.items() if name != "residual_bytes"}
            return random_neighbours(weight, counts, special_ids=special_ids, **given)
        case "pq":
            return product_quantised(weight, budget, counts if setting["weighted"] else None)
        case "integers":
            return integer_rows(weight, setting["bits"])
        case "svd":
            return low_rank(weight, budget)
        case "unknown":
            return rare_as_unknown(
                weight, counts, budget, unknown_id=unknown_id, special_ids=special_ids, rows="float16"
            )
    return SparseCode.fit(weight, counts, special_ids=special_ids, **setting)


def disk_bytes(stored: SparseCode | StoredTable) -> int:
    """Bytes of a safetensors file of the arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        if isinstance(stored, SparseCode):
            stored.save(path)
        else:
            save_file({str(place): array.contiguous() for place, array in enumerate(stored.arrays)}, path)
        return path.stat().st_size
