"""sparse_embedding behaves as an op of torch should: opcheck, compile, autocast, no_grad, flop counts, subclasses."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd.ops.flops  # noqa: F401  registers the formulas
from fastkd.benchmarks.kernels.sparse_embedding import random_code
from fastkd.ops import sparse_embedding, use_backend
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import embedding_block


@pytest.fixture
def code(backend):
    arrays = random_code(60, 12, 24, 5, weights=torch.float32)
    return Arrays(*(None if array is None else array.to(backend.device) for array in arrays))


@pytest.fixture
def ids(backend):
    return torch.randint(60, (2, 7), device=backend.device)


def op_of(name, backend):
    return getattr(torch.ops.fastkd, f"{name}_{backend.name}").default


def learning(code):
    return code._replace(
        kept=code.kept.clone().requires_grad_(), atom_weights=code.atom_weights.clone().requires_grad_()
    )


def tables_of(backend):
    return [torch.randn(*size, device=backend.device) for size in ((9, 24), (2, 24), (24,), (24,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rows": torch.int8, "weights": torch.int8, "residual_bytes": 6}], ids=str)
def test_opcheck_of_the_lookup(backend, ids, options, dtype):
    arrays = (None if array is None else array.to(backend.device) for array in random_code(60, 12, 24, 5, **options))
    torch.library.opcheck(op_of("sparse_embedding", backend), (ids, *arrays, dtype))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_of_the_backward(backend, code, ids, wanted):
    upstream = torch.randn(2, 7, 24, device=backend.device)
    torch.library.opcheck(op_of("sparse_embedding_backward", backend), (upstream, ids, *code, 3, *wanted))


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_opcheck_of_the_block(backend, code, ids, given):
    indices = (ids % 2, ids % 9) if given else (None, None)
    torch.library.opcheck(
        op_of("embedding_block", backend), (ids, *indices, *code, *tables_of(backend), 1e-12, torch.float16)
    )


def test_compiles_whole_and_recompiles_at_most_once_for_other_sizes(backend, code):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    positions, types, weight, bias = tables_of(backend)

    def step(ids, arrays):
        return sparse_embedding(ids, arrays, padding_idx=3, backend=backend.name) * 2

    def block(ids, arrays):
        return embedding_block(ids, arrays, positions, weight, bias, types=types, backend=backend.name)

    compiled_step, compiled_block = (torch.compile(f, backend=counter, fullgraph=True) for f in (step, block))
    for shape in ((2, 5), (3, 7), (5, 9)):
        ids = torch.randint(60, shape, device=backend.device)
        results = []
        for function in (compiled_step, step):
            arrays = learning(code)
            out = function(ids, arrays)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), (arrays.kept, arrays.atom_weights))))
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(compiled_block(ids, code), block(ids, code))
    assert counter.frame_count <= 4


class Calls(TorchDispatchMode):
    """Records the fused ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkd":
            self.names.append(func._schema.name.removeprefix("fastkd::"))
        return func(*args, **(kwargs or {}))


def test_nothing_is_kept_for_a_gradient_that_nobody_wants(backend, code, ids):
    trained = learning(code)
    assert not sparse_embedding(ids, code, backend=backend.name).requires_grad
    with torch.no_grad():
        assert not sparse_embedding(ids, trained, backend=backend.name).requires_grad
    with torch.inference_mode():
        assert not sparse_embedding(ids, trained, backend=backend.name).requires_grad
    assert sparse_embedding(ids, trained, backend=backend.name).requires_grad


def test_backward_stays_on_the_backend_of_forward(backend, code, ids):
    trained = learning(code)
    with Calls() as seen:
        out = sparse_embedding(ids, trained, backend=backend.name)
        with use_backend("auto"):
            out.sum().backward()
    assert seen.names == [f"sparse_embedding_{backend.name}", f"sparse_embedding_backward_{backend.name}"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, code, ids, dtype):
    results = []
    for enabled in (False, True):
        trained = learning(code)
        with torch.autocast(backend.device.type, dtype, enabled=enabled):
            out = sparse_embedding(ids, trained, backend=backend.name)
            out.sum().backward()
        results.append((out, trained.kept.grad, trained.atom_weights.grad))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


def test_the_arrays_are_not_written(backend, code, ids):
    before, trained = [x if x is None else x.clone() for x in code], learning(code)
    sparse_embedding(ids, trained, backend=backend.name).sum().backward()
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_many_upstream_gradients_one_after_the_other(backend, code, ids):
    trained = learning(code)
    out = sparse_embedding(ids, trained, backend=backend.name)
    upstream = torch.randn(2, 2, 7, 24, device=backend.device)
    apart = [torch.autograd.grad(out, trained.kept, g, retain_graph=True)[0] for g in upstream]
    (together,) = torch.autograd.grad(out, trained.kept, upstream.sum(0))
    torch.testing.assert_close(apart[0] + apart[1], together)


def test_flops_are_those_of_the_weighted_sums(backend, code, ids):
    trained = learning(code)
    with FlopCounterMode(display=False) as forward:
        out = sparse_embedding(ids, trained, backend=backend.name)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    positions, types, weight, bias = tables_of(backend)
    with FlopCounterMode(display=False) as block:
        embedding_block(ids, code, positions, weight, bias, types=types, backend=backend.name)
    sums = 2 * ids.numel() * 5 * 24
    counted = [counter.get_total_flops() for counter in (forward, backward, block)]
    assert counted == [sums, 2 * sums, sums]


def test_a_dtensor_is_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        arrays, mesh = random_code(60, 12, 24, 5), init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match=r"ids is a DTensor.*to_local"):
            sparse_embedding(distribute_tensor(torch.arange(8), mesh), arrays)
        with pytest.raises(TypeError, match=r"kept is a DTensor.*to_local"):
            sparse_embedding(torch.arange(8), arrays._replace(kept=distribute_tensor(arrays.kept, mesh)))
    finally:
        dist.destroy_process_group()
