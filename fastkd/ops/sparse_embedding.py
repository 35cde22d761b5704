r"""Lookup in a sparse-coded embedding table (Tamura, Yoshinaga and Neishi, CoNLL 2024; the solve stands in
`fastkd/embeddings/fit.py`).

A table of V rows of width D is stored as M kept rows and R = V − M coded ones. Token t stands at slot[t]:

    slot[t] < M        out = kept[slot[t]]                                              (a common token, stored whole)
    r = slot[t] − M    out = Σ_a atom_weights[r, a] · kept[atom_ids[r, a]]              (a rare token, k atoms)
                             + (codebook[0, residual[r, 0]], …, codebook[m−1, residual[r, m−1]])    where there is one

The second line of the sum is the optional quantised residual: m sub-vectors of D / m numbers, each one of 256. With
k = 0 it is plain product quantisation of the rare rows, and with M = 0 of all rows. Stored int8 rows and weights have
one scale per row: the value is the integer times the scale. All sums are in fp32 (fp64 where kept rows are fp64).

Gradient, with g the upstream gradient of one token (none for `padding_idx`); indices, residual and codebook are fixed:

    d kept[slot[t]]        += g                                     common
    d kept[atom_ids[r, a]] += atom_weights[r, a] · g ,   d atom_weights[r, a] += ⟨g, kept[atom_ids[r, a]]⟩    rare

The embedding block of a BERT encoder adds to each token the row of its position and of its type, and normalises:

    x = out + positions[p] + types[s]
    block = (x − mean(x)) / √(var(x) + eps) · norm_weight + norm_bias       mean and biased variance over the D numbers
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import backends
from fastkd.ops.plain_tensors import check_plain
from fastkd.ops.sparse_arrays import Arrays, HasArrays, check_layout

_library = torch.library.Library("fastkd", "FRAGMENT")

# One schema for every backend; `dtype` is the output's. Ids of any shape give (*ids.shape, D), contiguous. The backward
# op gives d kept (M, D) and d atom_weights (R, k), each in its array's dtype, or an empty tensor where not wanted.
# Position and type ids have the shape of ids; without them a token's position is its place in the last dimension, and
# its type 0. An id out of range raises an IndexError on the CPU and is a device assert on CUDA.
_ARRAYS = (
    "Tensor slot, Tensor kept, Tensor? kept_scale, Tensor atom_ids, Tensor atom_weights, Tensor? weight_scale,"
    " Tensor? residual, Tensor? codebook"
)
_SCHEMAS = {
    "sparse_embedding": f"(Tensor ids, {_ARRAYS}, ScalarType dtype) -> Tensor",
    "sparse_embedding_backward": (
        f"(Tensor upstream, Tensor ids, {_ARRAYS}, int padding_idx, bool kept_wanted, bool weights_wanted)"
        " -> (Tensor, Tensor)"
    ),
    "embedding_block": (
        f"(Tensor ids, Tensor? type_ids, Tensor? position_ids, {_ARRAYS}, Tensor positions, Tensor? types,"
        " Tensor norm_weight, Tensor norm_bias, float eps, ScalarType dtype) -> Tensor"
    ),
}
_KERNEL_BACKENDS = ("reference", "cpp", "triton", "cuda")
_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _values(rows: Tensor, scale: Tensor | None, picked: Tensor, dtype: torch.dtype) -> Tensor:
    """The picked rows as the numbers they stand for."""
    values = rows[picked].to(dtype)
    return values if scale is None else values * scale[picked].to(dtype)[..., None]


def eager_sparse_embedding(ids: Tensor, arrays: Arrays, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition in plain torch, differentiable: a gather, and a weighted sum for the rare tokens alone.

    Every kernel is tested against this in fp64.
    """
    slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, residual, codebook = arrays
    sums = torch.float64 if kept.dtype == torch.float64 else torch.float32
    place = slot[ids.flatten()].long()
    rare = place >= kept.shape[0]
    (common_at,), (rare_at,) = (~rare).nonzero(as_tuple=True), rare.nonzero(as_tuple=True)
    row = place[rare_at] - kept.shape[0]
    weights = _values(atom_weights, weight_scale, row, sums)
    rebuilt = (weights[:, :, None] * _values(kept, kept_scale, atom_ids[row].long(), sums)).sum(1)
    if residual is not None:
        quantised = codebook[torch.arange(codebook.shape[0], device=ids.device), residual[row].long()]
        rebuilt = rebuilt + quantised.to(sums).flatten(1)
    out = torch.zeros(place.shape[0], kept.shape[1], dtype=sums, device=ids.device)
    out = out.index_copy(0, common_at, _values(kept, kept_scale, place[common_at], sums))
    return out.index_copy(0, rare_at, rebuilt).to(dtype).reshape(*ids.shape, kept.shape[1])


def eager_embedding_block(
    ids, type_ids, position_ids, arrays: Arrays, positions, types, norm_weight, norm_bias, eps, dtype=torch.float32
) -> Tensor:
    """The block's definition in plain torch, in the order of the schema."""
    sums = torch.float64 if arrays.kept.dtype == torch.float64 else torch.float32
    if position_ids is None:
        position_ids = torch.arange(ids.shape[-1], device=ids.device)
    x = eager_sparse_embedding(ids, arrays, sums) + positions[position_ids].to(sums)
    if types is not None:
        x = x + (types[0] if type_ids is None else types[type_ids]).to(sums)
    return F.layer_norm(x, x.shape[-1:], norm_weight.to(sums), norm_bias.to(sums), eps).to(dtype)


def _check_range(name: str, ids: Tensor, rows: int) -> None:
    outside = (ids < 0) | (ids >= rows)
    if ids.device.type == "cuda":
        torch._assert_async(~outside.any(), f"{name} outside [0, {rows})")
    elif outside.any():
        raise IndexError(f"{name} {ids[outside][0].item()} is out of range: the table has {rows} rows")


def _reference(ids, *arrays_and_dtype):
    *arrays, dtype = arrays_and_dtype
    _check_range("id", ids, arrays[0].shape[0])
    return eager_sparse_embedding(ids, Arrays(*arrays), dtype)


def _reference_backward(upstream, ids, *rest):
    """The gradient written out; torch's own backward of a dense embedding sums rows deterministically."""
    *arrays, padding_idx, kept_wanted, weights_wanted = rest
    slot, kept, kept_scale, atom_ids, atom_weights, weight_scale, _, _ = arrays
    sums = torch.float64 if kept.dtype == torch.float64 else torch.float32
    counted = ids.flatten() != padding_idx
    place, g = slot[ids.flatten()[counted]].long(), upstream.reshape(-1, kept.shape[1])[counted].to(sums)
    rare = place >= kept.shape[0]
    row, atoms = place[rare] - kept.shape[0], atom_ids[place[rare] - kept.shape[0]].long()
    d_kept, d_weights = kept.new_empty(0), atom_weights.new_empty(0)
    if kept_wanted:
        shares = _values(atom_weights, weight_scale, row, sums)[:, :, None] * g[rare][:, None]
        rows, grads = torch.cat([place[~rare], atoms.flatten()]), torch.cat([g[~rare], shares.flatten(0, 1)])
        d_kept = torch.ops.aten.embedding_dense_backward(grads, rows, kept.shape[0], -1, False).to(kept.dtype)
    if weights_wanted:
        dots = (_values(kept, kept_scale, atoms, sums) * g[rare][:, None]).sum(2)
        d_weights = torch.ops.aten.embedding_dense_backward(dots, row, atom_ids.shape[0], -1, False)
        d_weights = d_weights.to(atom_weights.dtype)
    return d_kept, d_weights


def _reference_block(ids, type_ids, position_ids, *rest):
    arrays, (positions, types, *norm_and_dtype) = Arrays(*rest[:8]), rest[8:]
    _check_range("id", ids, arrays.slot.shape[0])
    if position_ids is not None:
        _check_range("position id", position_ids, positions.shape[0])
    if type_ids is not None:
        _check_range("token type id", type_ids, types.shape[0])
    return eager_embedding_block(ids, type_ids, position_ids, arrays, positions, types, *norm_and_dtype)


def _fake(ids, slot, kept, *rest):
    return kept.new_empty((*ids.shape, kept.shape[1]), dtype=rest[-1])


def _fake_backward(upstream, ids, *rest):
    arrays, (_, kept_wanted, weights_wanted) = Arrays(*rest[:8]), rest[8:]
    wanted = ((arrays.kept, kept_wanted), (arrays.atom_weights, weights_wanted))
    return tuple(array.new_empty(array.shape if gradient else (0,)) for array, gradient in wanted)


def _fake_block(ids, type_ids, position_ids, *rest):
    return _fake(ids, *rest)


def _triton(name: str):
    def launch(*arguments):
        from fastkd.kernels import sparse_embedding as kernels

        return getattr(kernels, name)(*arguments)

    return launch


_FAKES = {"sparse_embedding": _fake, "sparse_embedding_backward": _fake_backward, "embedding_block": _fake_block}
_REFERENCES = {
    "sparse_embedding": _reference,
    "sparse_embedding_backward": _reference_backward,
    "embedding_block": _reference_block,
}
for _name, _schema in _SCHEMAS.items():
    for _backend in _KERNEL_BACKENDS:
        _library.define(f"{_name}_{_backend}{_schema}")
        torch.library.register_fake(f"fastkd::{_name}_{_backend}", _FAKES[_name], lib=_library)
    _library.impl(f"{_name}_reference", _REFERENCES[_name], "CompositeExplicitAutograd")
    _library.impl(f"{_name}_triton", _triton(_name), "CUDA")
_FORWARD, _BACKWARD, _BLOCK = (
    {backend: getattr(torch.ops.fastkd, f"{name}_{backend}").default for backend in _KERNEL_BACKENDS}
    for name in _SCHEMAS
)


# Also for backward and the block, which follow the backend of the lookup.
backends.register_kernels("sparse_embedding", (*backends.KERNEL_DTYPES, torch.int8))


class _SparseEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # apply() binds names by inspection, on every call
        *call, _, backend = inputs
        return _FORWARD[backend](*call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, *arrays, _, ctx.padding_idx, ctx.backend = inputs
        ctx.save_for_backward(ids, *arrays)

    @staticmethod
    def backward(ctx, upstream):
        # Under create_graph=True the gradient of the weights would silently count as a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sparse_embedding has no second derivative; "
                "fastkd.ops.sparse_embedding.eager_sparse_embedding (plain torch) has one"
            )
        wanted = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
        grads = _BACKWARD[ctx.backend](upstream, *ctx.saved_tensors, ctx.padding_idx, *wanted)
        d_kept, d_weights = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return None, None, d_kept, None, None, d_weights, *(None,) * 6


def sparse_embedding(
    ids: Tensor,
    code: HasArrays | Arrays,
    *,
    dtype: torch.dtype = torch.float32,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The rows of a sparse-coded table; formula and gradient stand above.

    Args:
        ids: tokens, int32 or int64, of any shape.
        code: `fastkd.SparseCode`, anything else with an attribute `arrays`, or the `Arrays` themselves. Kept rows and
            atom weights get a gradient where they are floating and require one.
        dtype: of the result: fp32, bf16, fp16 (fp64 on the reference). Sums are in fp32 whatever it is.
        padding_idx: a token that gives no gradient, as in `nn.Embedding`; its row is read like any other.
        backend: `"auto"`, `"reference"`, `"cpp"`, `"triton"`, `"cuda"`.

    Returns:
        (*ids.shape, D) of `dtype`.

    Raises:
        IndexError: an id outside [0, V), named, before it is read; on CUDA a device assert.
        ValueError, TypeError: a shape, dtype or option that does not fit, before any work.
        RuntimeError: an explicitly chosen backend cannot run, or a derivative is asked for that there is none of: a
            second one, forward mode, or one by torch.func (whose vmap works, slowly).
    """
    arrays = _arrays_of(code)
    _check_ids("ids", ids, arrays.kept.device)
    if padding_idx is not None:
        if not -arrays.slot.shape[0] <= padding_idx < arrays.slot.shape[0]:
            raise ValueError(f"padding_idx={padding_idx} is outside the table's {arrays.slot.shape[0]} rows")
        padding_idx %= arrays.slot.shape[0]
    chosen = _resolve(backend, arrays, dtype)
    kept, atom_weights = arrays.kept, arrays.atom_weights
    if torch.is_grad_enabled() and (kept.requires_grad or atom_weights.requires_grad):
        return _SparseEmbedding.apply(ids, *arrays, dtype, -1 if padding_idx is None else padding_idx, chosen)
    return _FORWARD[chosen](ids, *arrays, dtype)


def embedding_block(
    ids: Tensor,
    code: HasArrays | Arrays,
    positions: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    types: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    eps: float = 1e-12,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """A BERT encoder's whole embedding block in one pass, for inference; the formula stands above.

    Args:
        ids: tokens (..., L), int32 or int64.
        code: as in `sparse_embedding`.
        positions: (P, D), the rows of the positions, P >= L without `position_ids`.
        norm_weight, norm_bias: (D,) of the LayerNorm.
        types: (T, D), the rows of the token types; None for an encoder without them.
        token_type_ids: int32 or int64, of the shape of ids or what expands to it; None is type 0 everywhere.
        position_ids: the same; None counts 0, 1, … along the last dimension.
        eps: of the LayerNorm.
        dtype: of the result: fp32, bf16, fp16 (fp64 on the reference).
        backend: `"auto"`, `"reference"`, `"cpp"`, `"triton"`, `"cuda"`.

    Returns:
        (*ids.shape, D) of `dtype`.

    Raises:
        IndexError: a token, position or type out of range, named; on CUDA a device assert.
        ValueError, TypeError: a shape, dtype or option that does not fit, before any work.
        RuntimeError: an explicitly chosen backend cannot run, or a derivative is asked for.
    """
    arrays = _arrays_of(code)
    _check_ids("ids", ids, arrays.kept.device)
    tables = {"positions": positions, "types": types, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check_tables(tables, arrays)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*arrays, *tables.values())):
        raise RuntimeError("embedding_block is for inference and gives no gradient: call it under torch.no_grad()")
    if ids.dim() == 0:
        raise ValueError("ids has no dimension; expected (..., L)")
    if position_ids is None and ids.shape[-1] > positions.shape[0]:
        raise ValueError(f"ids has {ids.shape[-1]} positions, the position table {positions.shape[0]} rows")
    if token_type_ids is not None and types is None:
        raise ValueError("token_type_ids were given without the table `types` that they stand in")
    type_ids, position_ids = (
        None if given is None else _expanded(name, given, ids)
        for name, given in (("token_type_ids", token_type_ids), ("position_ids", position_ids))
    )
    chosen = _resolve(backend, arrays, dtype)
    norm = (norm_weight, norm_bias, eps)
    return _BLOCK[chosen](ids, type_ids, position_ids, *arrays, positions, types, *norm, dtype)


def _resolve(backend: str, arrays: Arrays, dtype: torch.dtype) -> str:
    if dtype not in _OUTPUTS:
        raise TypeError(f"dtype={dtype}; allowed are float32, bfloat16, float16 and float64")
    kept = arrays.kept
    return backends.resolve("sparse_embedding", backend, kept.device, dtype if dtype == torch.float64 else kept.dtype)


def _arrays_of(code: HasArrays | Arrays) -> Arrays:
    arrays = code if isinstance(code, Arrays) else getattr(code, "arrays", None)
    if not isinstance(arrays, Arrays):
        raise TypeError(f"code must be a SparseCode or Arrays, not {type(code).__name__}")
    check_layout(arrays)
    for name in ("kept", "atom_weights"):
        check_plain("sparse_embedding", name, getattr(arrays, name), vmap=True)
    return arrays


def _check_ids(name: str, ids: Tensor, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(ids).__name__}")
    check_plain("sparse_embedding", name, ids, vmap=True)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {ids.dtype}; allowed are int32 and int64")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device}, the code on {device}")


def _expanded(name: str, given: Tensor, ids: Tensor) -> Tensor:
    _check_ids(name, given, ids.device)
    try:
        return given.expand(ids.shape).to(ids.dtype)
    except RuntimeError:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, ids {tuple(ids.shape)}") from None


def _check_tables(tables: dict[str, Tensor | None], arrays: Arrays) -> None:
    width = arrays.kept.shape[1]
    for name, table in tables.items():
        if table is None and name == "types":
            continue
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(table).__name__}")
        check_plain("embedding_block", name, table, eager=f"{__name__}.eager_embedding_block", vmap=True)
        dtype = torch.float64 if arrays.kept.dtype == torch.float64 else tables["positions"].dtype
        dims, form = (1, f"({width},)") if name.startswith("norm") else (2, f"(rows, {width})")
        if table.dim() != dims or table.shape[-1] != width or (dims == 2 and table.shape[0] == 0):
            raise ValueError(f"{name} has shape {tuple(table.shape)}; expected {form}")
        if table.dtype not in _OUTPUTS or table.dtype != dtype:
            raise TypeError(f"{name} is {table.dtype}; the tables are all float32, bfloat16 or float16, here {dtype}")
        if table.device != arrays.kept.device:
            raise ValueError(f"{name} is on {table.device}, the code on {arrays.kept.device}")
