r"""The fit of a sparse code (Tamura, Yoshinaga and Neishi, CoNLL 2024): which rows are kept, and how every other row
x is put together from its k nearest kept rows v_1 ... v_k by cosine (locally linear mapping, closed form):

    C_ij = ⟨x − v_i, x − v_j⟩ + [i = j] · λ tr(C) / k ,   w = C⁻¹1 / (1ᵀC⁻¹1) ,   x̂ = Σ_j w_j v_j

the minimiser of ‖x − Σ_j w_j v_j‖² + λ tr(C)/k ‖w‖² among weights that sum to one. The ridge makes C regular where
neighbours are equal or affinely dependent. Weights may be negative.
"""

import math
import operator
from collections.abc import Iterable, Iterator
from numbers import Real

import torch
from huggingface_hub.utils import tqdm  # silent where transformers' and datasets' progress bars are
from torch import Tensor

from fastkd.embeddings.code import SparseCode, decode_rows, encode_rows
from fastkd.embeddings.neighbours import SPARE_CANDIDATES, Neighbours
from fastkd.embeddings.residual import check_residual_bytes, product_quantise
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import sparse_embedding

FORMATS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_LARGEST_WEIGHT = 10.0  # beyond it, atoms cancel each other and rounding shows
_NUMBERS_AT_ONCE = 2**22  # 16 MB, which malloc reuses and caches like


def fit(
    weight: Tensor,
    counts: Tensor,
    keep: float,
    atoms: int,
    special_ids: Iterable[int],
    rows: str,
    weights: str,
    residual_bytes: int,
    mean_atoms: float | None,
    types: Tensor | None,
    ridge: float,
    search: type = Neighbours,
) -> SparseCode:
    """`SparseCode.fit`, where arguments and errors are described; `search` is what finds a row's atoms."""
    check_table(weight)
    weight = weight.detach()
    vocabulary, width = weight.shape
    special = _special_rows(special_ids, vocabulary)
    check_settings(
        vocabulary,
        width,
        special,
        keep=keep,
        atoms=atoms,
        rows=rows,
        weights=weights,
        residual_bytes=residual_bytes,
        mean_atoms=mean_atoms,
        ridge=ridge,
    )
    order, num_kept = rank_tokens(counts, vocabulary, keep, special)
    order = order.to(weight.device)
    tokens = order[num_kept:]
    groups = _groups(types, order, num_kept, atoms)

    kept, kept_scale = encode_rows(weight[order[:num_kept]], FORMATS[rows])
    importance = importance_of(torch.as_tensor(counts, device=weight.device)[tokens])
    allotted = torch.full((len(tokens),), atoms, device=weight.device)
    if mean_atoms is not None:
        allotted = share_atoms(importance, atoms, mean_atoms)
    found = _combine(weight, tokens, decode_rows(kept, kept_scale), groups, atoms, allotted, ridge, search)
    # Without atoms the format is of no matter; fp16 needs no scales.
    atom_weights, weight_scale = round_weights(found[1], FORMATS[weights] if atoms else torch.float16)
    arrays = Arrays(
        slot=order.argsort().to(index_dtype(vocabulary)),
        kept=kept,
        kept_scale=kept_scale,
        atom_ids=found[0].to(index_dtype(num_kept)),
        atom_weights=atom_weights,
        weight_scale=weight_scale,
        residual=None,
        codebook=None,
    )
    if residual_bytes and len(tokens):
        left = torch.cat(list(_differences(weight, tokens, arrays)))
        residual, codebook = product_quantise(left, residual_bytes, importance)
        arrays = arrays._replace(residual=residual, codebook=codebook)
    return SparseCode(arrays, relative_error(weight, tokens, arrays))


def check_table(weight: Tensor) -> None:
    """Raise a TypeError or ValueError unless `weight` is a tensor, a finite floating-point matrix."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; a torch tensor (V, D) is needed")
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; (V, D) floating is needed")
    bad = [start + i for start, part in _parts(weight) for i in (~part.isfinite().all(1)).nonzero()[:1, 0].tolist()]
    if bad:
        raise ValueError(f"weight holds NaN or infinite values, first in row {bad[0]}")


def rank_tokens(counts: Tensor, vocabulary: int, keep: float, special_ids: Iterable[int]) -> tuple[Tensor, int]:
    """(V,) tokens as they are stored, and how many of them keep their row: special ones, then by count, then by id.

    Frequent rows stand side by side, which lookups of real text like. Errors as in `SparseCode.fit`.
    """
    try:
        counts = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts is a {type(counts).__name__}; a tensor (V,) of one count per row is needed") from error
    if counts.shape != (vocabulary,):
        raise ValueError(
            f"counts has shape {tuple(counts.shape)}, the table has {vocabulary} rows: one count per row is needed"
        )
    if not ((counts >= 0) & counts.isfinite()).all():
        raise ValueError("counts holds negative values, infinite ones or NaN")
    special = _special_rows(special_ids, vocabulary)
    num_kept = _checked_rows_kept(keep, vocabulary, special)
    order = counts.argsort(descending=True, stable=True)
    is_special = torch.zeros(vocabulary, dtype=torch.bool, device=counts.device)
    is_special[special] = True
    return order[is_special[order].argsort(descending=True, stable=True)], num_kept


def check_settings(
    vocabulary: int,
    width: int,
    special_ids: Iterable[int],
    *,
    keep: float,
    atoms: int,
    rows: str,
    weights: str,
    residual_bytes: int = 0,
    mean_atoms: float | None = None,
    ridge: float = 1e-3,
) -> None:
    """Raise what `SparseCode.fit` raises on these arguments for a table of V rows of `width`, before it is counted."""
    _check_number("atoms", atoms, int)
    _check_number("residual_bytes", residual_bytes, int)
    _check_number("mean_atoms", 1 if mean_atoms is None else mean_atoms)
    _check_number("ridge", ridge)
    check_residual_bytes(residual_bytes, width)
    least = 0 if residual_bytes else 1
    if not least <= atoms <= width:
        raise ValueError(f"atoms={atoms}; allowed are {least} to {width}, the width of the table")
    if mean_atoms is not None and not 1 <= mean_atoms <= atoms:
        raise ValueError(f"mean_atoms={mean_atoms}; it must lie between 1 and atoms={atoms}")
    for name, given in (("rows", rows), ("weights", weights)):
        if given not in FORMATS:
            raise ValueError(f"{name}={given!r}; allowed are {', '.join(FORMATS)}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge={ridge}; it must be finite and not negative")
    num_kept = _checked_rows_kept(keep, vocabulary, _special_rows(special_ids, vocabulary))
    if num_kept < atoms:
        raise ValueError(f"atoms={atoms}, but only {num_kept} rows are kept")


def rows_kept(keep: float, vocabulary: int) -> int:
    """M, how many rows of `vocabulary` are kept."""
    return math.floor(keep * vocabulary + 1e-9)  # 0.29 * 100 is 28.999...


def _checked_rows_kept(keep: float, vocabulary: int, special: list[int]) -> int:
    _check_number("keep", keep)
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}; the kept fraction must lie in (0, 1]")
    num_kept = rows_kept(keep, vocabulary)
    if num_kept < max(1, len(special)):
        raise ValueError(
            f"keep={keep} of {vocabulary} rows is {num_kept}, with {len(special)} special tokens to keep; the least is "
            f"{max(1, len(special)) / vocabulary:.4g}"
        )
    return num_kept


def _check_number(name: str, given: object, kind: type = Real) -> None:
    if isinstance(given, bool) or not isinstance(given, kind):
        raise TypeError(f"{name}={given!r}; a {'whole number' if kind is int else 'number'} is needed")


def _special_rows(special_ids: Iterable[int], vocabulary: int) -> list[int]:
    """Each special token once, in ascending order."""
    try:
        given = special_ids.tolist() if isinstance(special_ids, Tensor) else special_ids
        special = sorted({operator.index(token) for token in given})
    except TypeError as error:
        raise TypeError(f"special_ids={special_ids!r}; a list or (n,) tensor of token ids is needed") from error
    outside = [token for token in special if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"special_ids holds {outside[0]}, which is no row of a table of {vocabulary}")
    return special


def _groups(types: Tensor | None, order: Tensor, num_kept: int, atoms: int) -> list[tuple[Tensor, Tensor]]:
    """For each type that has coded rows: the kept rows and the coded ones of that type, as positions among theirs."""
    types = torch.zeros_like(order) if types is None else torch.as_tensor(types, device=order.device)
    if types.shape != order.shape:
        raise ValueError(f"types has shape {tuple(types.shape)}, the table has {len(order)} rows: one type for each")
    kept_types, coded_types = types[order].tensor_split([num_kept])
    groups = []
    for kind in coded_types.unique():
        candidates = (kept_types == kind).nonzero()[:, 0]
        if len(candidates) < atoms:
            raise ValueError(f"atoms={atoms}, but only {len(candidates)} rows of type {kind.item()} are kept")
        groups.append((candidates, (coded_types == kind).nonzero()[:, 0]))
    return groups


def importance_of(counts: Tensor) -> Tensor:
    """(R,) fp64, how much a row matters: log2(2 + count). Counts themselves (Zipf) would leave nothing to most rows,
    of which other texts hold some."""
    return (2 + counts.double()).log2()


def share_atoms(importance: Tensor, atoms: int, mean_atoms: float) -> Tensor:
    """(R,) atoms of each coded row, in proportion to its importance, in [1, atoms] and R * mean_atoms in all.

    `importance` in descending order. What a row does not use stays in its place as zeros, since a lookup finds a row
    by its number: a ragged table would cost an offset per row and another dependent read.
    """
    budget = round(mean_atoms * len(importance))

    def allot(factor: float) -> Tensor:
        return (factor * importance).floor().clamp(1, atoms).long()

    low, high = 0.0, float(atoms)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if allot(middle).sum() <= budget else (low, middle)
    allotted = allot(low)
    left = budget - int(allotted.sum())  # equal counts take their next atom all at once; the first of them get it
    allotted[(allotted < atoms).nonzero()[:left, 0]] += 1
    return allotted


def _combine(
    weight: Tensor,
    tokens: Tensor,
    kept: Tensor,
    groups: list[tuple[Tensor, Tensor]],
    atoms: int,
    allotted: Tensor,
    ridge: float,
    search: type,
) -> tuple[Tensor, Tensor]:
    """(R, k) int64 atoms and fp64 weights of all coded rows; no more than some 2²² numbers are made at a time."""
    atom_ids = torch.zeros(len(tokens), atoms, dtype=torch.int64, device=weight.device)
    atom_weights = torch.zeros(len(tokens), atoms, dtype=torch.float64, device=weight.device)
    kept = kept.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    with tqdm(total=len(tokens), desc="fit", unit=" rows", delay=1, disable=not atoms) as progress:
        for candidates, coded in groups if atoms else ():
            neighbours = search(kept[candidates])
            at_once = max(1, _NUMBERS_AT_ONCE // max(len(candidates), (atoms + SPARE_CANDIDATES) * weight.shape[1]))
            for part in coded.split(at_once):
                x = weight[tokens[part]].to(kept.dtype)
                ids = candidates[neighbours.nearest(x, atoms)]
                for number in allotted[part].unique().tolist():
                    same = (allotted[part] == number).nonzero()[:, 0]
                    nearest = ids[same, :number]
                    atom_weights[part[same], :number] = solve(x[same], kept[nearest], ridge)
                    ids[same, number:] = nearest[:, :1]  # a row that is read anyway
                atom_ids[part] = ids
                progress.update(len(part))
    return atom_ids, atom_weights


def solve(x: Tensor, atoms: Tensor, ridge: float = 1e-3) -> Tensor:
    """(N, D), (N, k, D) -> (N, k) fp64 weights that sum to one: the formula at the head of this file. Where it has no
    answer: one weight of 1 where x equals an atom, equal weights where all atoms equal x. The ridge of a row is raised
    tenfold until no weight is larger than 10."""
    k = atoms.shape[1]
    differences = x[:, None] - atoms
    largest = torch.linalg.vector_norm(differences, math.inf, (1, 2), keepdim=True)
    differences /= torch.where(largest > 0, largest, 1)  # so that squares neither overflow nor vanish
    gram = (differences @ differences.mT).double()
    squares = gram.diagonal(dim1=1, dim2=2).clone()
    trace = squares.sum(1)
    weights = torch.full_like(squares, 1 / k)

    unsolved = (trace > 0).nonzero()[:, 0]
    gram /= (trace / k).clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
    identity = torch.eye(k, dtype=torch.float64, device=x.device)
    while len(unsolved):
        factor, failed = torch.linalg.cholesky_ex(gram[unsolved] + ridge * identity)
        solution = torch.cholesky_solve(identity.new_ones(len(unsolved), k, 1), factor)[..., 0]
        weights[unsolved] = solution / solution.sum(1, keepdim=True)
        bounded = weights[unsolved].abs().amax(1) <= _LARGEST_WEIGHT  # false for NaN as well
        unsolved = unsolved[~(bounded & (failed == 0))]
        ridge = 10 * max(ridge, 1e-12)

    near = 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    equal = squares.sqrt() * largest[:, 0] <= near
    one = torch.zeros_like(weights).scatter_(1, equal.int().argmax(1, keepdim=True), 1)
    return torch.where((equal.any(1) & (trace > 0))[:, None], one, weights)


def round_weights(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(R, k) fp64 that sum to one -> what is stored, and for int8 the (R,) fp16 scales.

    Rounded from the largest to the smallest, each taking over what the one before has lost, so that the stored weights
    sum to one up to the rounding of the smallest; int8 weights sum to a whole number exactly, and its inverse is the
    scale. Zeros stay zeros.
    """
    units = weights.new_ones(len(weights), 1)
    if dtype == torch.int8:
        # 126.5, not 127: half a unit may be carried into a weight as large as the largest.
        units = (126.5 / weights.abs().amax(1, keepdim=True)).floor()
    stored = torch.empty_like(weights)
    carried = torch.zeros_like(units)
    for column in weights.abs().argsort(dim=1, descending=True, stable=True).split(1, dim=1):
        exact = weights.gather(1, column) * units
        exact = torch.where(exact == 0, exact, exact + carried)
        rounded = exact.round() if dtype == torch.int8 else exact.to(dtype).double()
        stored.scatter_(1, column, rounded)
        carried = torch.where(exact == 0, carried, exact - rounded)
    return stored.to(dtype), (1 / units[:, 0]).half() if dtype == torch.int8 else None


def relative_error(weight: Tensor, tokens: Tensor, arrays: Arrays) -> Tensor:
    """(n,) fp32: ‖row − looked-up row‖ / ‖row‖ of `tokens`; the mean norm stands in for that of a row of zeros."""
    norm = torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for _, part in _parts(weight)])
    norm = torch.where(norm > 0, norm, norm.mean().clamp(min=torch.finfo(norm.dtype).tiny))
    lost = [torch.linalg.vector_norm(part, dim=1) for part in _differences(weight, tokens, arrays)]
    return torch.cat([norm.new_empty(0), *lost]) / norm[tokens]


def index_dtype(size: int) -> torch.dtype:
    """The dtype of indices below `size`: two bytes where they fit."""
    return torch.uint16 if size <= 2**16 else torch.int32


def _differences(weight: Tensor, tokens: Tensor, arrays: Arrays) -> Iterator[Tensor]:
    """Rows of `tokens` less what a lookup gives for them, (.., D) fp32, a part at a time."""
    atoms = 1 + arrays.atom_ids.shape[1]
    for part in tokens.split(max(1, _NUMBERS_AT_ONCE // (atoms * weight.shape[1]))):
        yield weight[part].float() - sparse_embedding(part, arrays, dtype=torch.float32)


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    at_once = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    return ((start, weight[start : start + at_once]) for start in range(0, len(weight), at_once))
