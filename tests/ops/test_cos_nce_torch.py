"""cos_nce behaves as an op of torch should: compile, autocast, no_grad, upstream gradients, strides, flop counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd.ops.flops  # noqa: F401  registers the formulas
from fastkd.benchmarks.kernels.cos_nce import by_definition
from fastkd.ops import cos_nce

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def draw(backend):
    def normal(*shape, dtype=torch.float32):
        return tuple(torch.randn(shape).to(backend.device, dtype) for _ in range(2))

    return normal


def op_of(backend, name):
    return getattr(torch.ops.fastkd, f"{name}_{backend.name}").default


@pytest.mark.parametrize("classes", [0, 2], ids=["no classes", "classes"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_opcheck(draw, backend, masked, classes):
    student, teacher = draw(2, 4, 3, 8)
    device = backend.device
    mask = torch.rand(4, 3).to(device) > 0.3 if masked else None
    of = torch.tensor([0, -1, 1, 0], dtype=torch.int32, device=device) if classes else None
    sums = torch.randn(2, 1 + classes, 3, 8, device=device)
    counts = torch.full((1 + classes, 3), 5.0, device=device)
    torch.library.opcheck(op_of(backend, "cos_nce_sums"), (teacher, mask, of, classes))
    for weights, with_grad in ((None, True), (torch.rand(4, device=device), True), (None, False)):
        call = (student, teacher, sums, counts, mask, of, True, weights, 4, with_grad)
        torch.library.opcheck(op_of(backend, "cos_nce"), call)


@pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "masked tokens"])
def test_compiles_whole_and_recompiles_at_most_once_for_other_sizes(draw, backend, tokens):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss_of(student, teacher, mask):
        return cos_nce(student, teacher, mask=mask, backend=backend.name)

    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    for batch, length in ((3, 5), (4, 17), (6, 40)):
        student, teacher = draw(batch, length, 8) if tokens else draw(batch, 8)
        mask = torch.rand(batch, length).to(backend.device) > 0.3 if tokens else None
        results = []
        for function in (compiled, loss_of):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 2


def test_compiles_whole_with_ids(draw, backend):
    torch._dynamo.reset()
    student, teacher = draw(6, 8)
    ids = torch.tensor([1, 2, 1, 3, 2, 1])

    def loss_of(student, teacher, ids):
        return cos_nce(student, teacher, exclude=ids, backend=backend.name)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, ids), loss_of(student, teacher, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(draw, backend, dtype):
    student, teacher = draw(9, 32)
    results = []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast(backend.device.type, dtype, enabled=enabled):
            loss = cos_nce(leaf, teacher, backend=backend.name)
            loss.backward()
        results.append((loss, leaf.grad))
    assert results[1][0].dtype == results[1][1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Calls(TorchDispatchMode):
    """Records every call of a fused op, and every tensor that was multiplied."""

    def __init__(self):
        super().__init__()
        self.calls, self.multiplied = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkd":
            self.calls.append(args)
        if func._schema.name in ("aten::mul", "aten::mul_"):
            self.multiplied.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_the_gradient_is_computed_only_where_somebody_wants_it(draw, backend):
    student, teacher = draw(6, 8)
    leaf = student.clone().requires_grad_()

    def wanted(x):
        with Calls() as seen:
            cos_nce(x, teacher, backend=backend.name)
        return seen.calls[-1][-1]

    assert wanted(leaf) and not wanted(student)
    with torch.no_grad():
        assert not wanted(leaf)
    with torch.inference_mode():
        assert not wanted(student)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_from_one_touches_no_gradient(draw, backend, reduction):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA the kernel looks at the factor, so that the host need not")
    student, teacher = draw(6, 8)
    loss = cos_nce(student.requires_grad_(), teacher, reduction=reduction, backend=backend.name)
    with Calls() as seen:
        loss.backward()
    assert not seen.calls and not seen.multiplied


UPSTREAMS = {
    "stride 0, as from sum()": lambda: torch.tensor(0.7).expand(4),
    "strided": lambda: torch.randn(8)[::2],
    "zero": lambda: torch.zeros(4),
    "of mixed sign and size": lambda: torch.tensor([1e4, -1e-4, 0.0, -3.0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS.values(), ids=UPSTREAMS)
@pytest.mark.parametrize("form", ["vectors", "masked tokens", "negatives of each sample"])
def test_upstream_gradients_of_any_layout_and_value(draw, backend, form, upstream, dtype):
    student, teacher = draw(4, 5, 16, dtype=dtype) if form == "masked tokens" else draw(4, 16, dtype=dtype)
    options = {}
    if form == "masked tokens":
        options["mask"] = (torch.arange(5) < torch.tensor([5, 2, 0, 3])[:, None]).to(backend.device)
    if form == "negatives of each sample":
        options["negatives"] = torch.randn(4, 3, 16).to(backend.device, dtype)
    upstream = upstream().to(backend.device)
    student.requires_grad_()
    losses = cos_nce(student, teacher, reduction="none", backend=backend.name, **options)
    (grad,) = torch.autograd.grad(losses, student, upstream)
    exact = student.detach().double().requires_grad_()
    options |= {"negatives": options["negatives"].double()} if "negatives" in options else {}
    (expected,) = torch.autograd.grad(by_definition(exact, teacher.double(), **options), exact, upstream.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(
        grad.double(), expected, rtol=tolerance, atol=tolerance * upstream.abs().max().item() / 100
    )


def test_a_loss_scale_of_65536_costs_no_accuracy_in_fp16(draw, backend):
    """Unscaled, these gradients are subnormal in fp16: a factor applied before the cast would cost their digits."""
    student, teacher = draw(256, 48, dtype=torch.float16)
    student = (64 * student).requires_grad_()
    (grad,) = torch.autograd.grad(65536 * cos_nce(student, teacher, backend=backend.name), student)
    exact = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(65536 * by_definition(exact, teacher.double()).mean(), exact)
    assert (expected / 65536).abs().median() < 0.1 * torch.finfo(torch.float16).smallest_normal
    relative = ((grad.double() - expected).abs() / expected.abs()).median().item()
    assert relative < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradient_again(draw, backend, reduction):
    student, teacher = draw(6, 8)
    student.requires_grad_()
    loss = 3 * cos_nce(student, teacher, reduction=reduction, backend=backend.name).sum()
    first, second, last = (torch.autograd.grad(loss, student, retain_graph=keep)[0] for keep in (True, True, False))
    assert first.abs().sum() > 0
    assert torch.equal(first, second) and torch.equal(first, last)


def test_gradients_accumulate_in_a_leaf_that_keeps_its_graph(draw, backend):
    """The leaf must not be given the very memory that a second backward reads."""
    student, teacher = draw(6, 8)
    student.requires_grad_()
    loss = cos_nce(student, teacher, backend=backend.name)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 3 * once)


def test_many_upstream_gradients_in_one_backward(draw, backend):
    student, teacher = draw(3, 5, 8)
    student.requires_grad_()

    def losses():
        return cos_nce(student, teacher, tokens=True, reduction="none", backend=backend.name)

    unit = torch.eye(3, device=backend.device)
    (batched,) = torch.autograd.grad(losses(), student, unit, is_grads_batched=True)
    alone = torch.stack([torch.autograd.grad(losses(), student, upstream)[0] for upstream in unit])
    assert torch.equal(batched, alone)


def test_a_second_derivative_is_refused_by_name(draw, backend):
    student, teacher = draw(6, 8)
    loss = cos_nce(student.requires_grad_(), teacher, backend=backend.name)
    with pytest.raises(RuntimeError, match="cos_nce has no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


STRIDED = {
    "chunk of a wider tensor": lambda x: torch.cat([torch.full_like(x, float("nan")), x], -1).chunk(2, -1)[1],
    "the first of many tokens": lambda x: x.repeat_interleave(7, 0)[::7],
    "positions before samples": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one sample for the whole batch": lambda x: x[:1].expand_as(x),
    "last dimension not dense": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("shape", [(9, 32), (6, 5, 32)], ids=["vectors", "tokens"])
def test_strided_vectors_are_read_in_place(draw, backend, shape, view, dtype):
    student, teacher = draw(*shape, dtype=dtype)
    results = []
    for make in (view, lambda x: view(x).clone(memory_format=torch.contiguous_format)):
        leaf = student.clone().requires_grad_()
        loss = cos_nce(make(leaf), make(teacher), tokens=len(shape) == 3, backend=backend.name)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_too_large_for_the_caches_is_right(draw, backend, dtype):
    """From some MiB on, C++ writes it past them: another kind of store."""
    student, teacher = draw(4 * 2**20 // (512 * dtype.itemsize) + 3, 512, dtype=dtype)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(cos_nce(student, teacher, reduction="sum", backend=backend.name), student)
    (expected,) = torch.autograd.grad(cos_nce(student, teacher, reduction="sum", backend="reference"), student)
    torch.testing.assert_close(grad, expected, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads(draw, backend):
    if backend.name != "cpp":
        pytest.skip("torch's own sums are not ours")
    before, results = torch.get_num_threads(), []
    student, teacher = draw(500, 400)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_()
            loss = cos_nce(leaf, teacher, exclude=torch.arange(500) % 490, reduction="none", backend="cpp")
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for losses, grad in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(grad, results[0][1])


def test_flops_are_those_of_the_collapsed_form(draw, backend):
    """Multiplications of one number: norm and sum; two norms and two dot products; three multiples in the gradient."""
    student, teacher = draw(6, 5, 8)
    with FlopCounterMode(display=False) as counted:
        cos_nce(student.requires_grad_(), teacher, tokens=True, backend=backend.name).backward()
    with FlopCounterMode(display=False) as forward:
        cos_nce(student.detach(), teacher, tokens=True, backend=backend.name)
    assert counted.get_total_flops() == 2 * (2 + 4 + 3) * 6 * 5 * 8
    assert forward.get_total_flops() == 2 * (2 + 4) * 6 * 5 * 8
