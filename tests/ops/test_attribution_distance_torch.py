"""attribution_distance behaves as an op of torch should: compile, autocast, no_grad, upstream, strides, flop counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd.ops.flops  # noqa: F401  registers the formulas
from fastkd.ops.attribution_distance import attribution_distance


@pytest.fixture
def draw(backend):
    """draw(B, C or 0, L, D) -> G and x that require grad, and the teacher's scores."""

    def operands(batch, classes, length, width, dtype=torch.float32):
        shape = (batch, *(classes,) * bool(classes), length)
        teacher = torch.rand(shape).to(backend.device)
        vectors = torch.randn(*shape, width), torch.randn(batch, length, width)
        return *(x.to(backend.device, dtype).requires_grad_() for x in vectors), teacher

    return operands


def distance_and_gradients(backend, gradient, inputs, teacher, **options):
    distance = attribution_distance(gradient, inputs, teacher, backend=backend.name, **options)
    return distance.detach(), *torch.autograd.grad(distance, (gradient, inputs))


@pytest.mark.parametrize("form", ["gradient x input", "saliency", "summed"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_opcheck(draw, backend, masked, form):
    gradient, inputs, teacher = (x.detach() for x in draw(3, 2, 5, 8))
    mask = torch.rand(3, 5).to(backend.device) > 0.3 if masked else None
    op = getattr(torch.ops.fastkd, f"attribution_distance_{backend.name}").default
    inputs = None if form == "saliency" else inputs
    reduce = "sum" if form == "summed" else "norm"
    for wanted in ((True, inputs is not None), (True, False), (False, False)):
        torch.library.opcheck(op, (gradient, inputs, teacher, mask, True, reduce, "l2", "l1", *wanted))


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_compiles_whole_and_recompiles_at_most_once_for_other_sizes(draw, backend, masked):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def distance(gradient, inputs, teacher, mask):
        return attribution_distance(gradient, inputs, teacher, mask=mask, backend=backend.name)

    compiled = torch.compile(distance, backend=counter, fullgraph=True)
    for batch, length in ((3, 5), (4, 17), (6, 40)):
        gradient, inputs, teacher = draw(batch, 2, length, 8)
        mask = torch.rand(batch, length).to(backend.device) > 0.3 if masked else None
        results = []
        for function in (compiled, distance):
            found = function(gradient, inputs, teacher, mask)
            results.append((found.detach(), *torch.autograd.grad(found, (gradient, inputs))))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_autocast_changes_nothing(draw, backend):
    operands = draw(4, 0, 9, 32)
    expected = distance_and_gradients(backend, *operands)
    with torch.autocast(backend.device.type, torch.bfloat16):
        found = distance_and_gradients(backend, *operands)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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


def test_gradients_are_computed_only_where_somebody_wants_them(draw, backend):
    gradient, inputs, teacher = draw(3, 2, 5, 8)

    def wanted(g, x):
        with Calls() as seen:
            attribution_distance(g, x, teacher, backend=backend.name)
        return seen.calls[-1][-2:]

    assert wanted(gradient, inputs) == (True, True)
    assert wanted(gradient, inputs.detach()) == (True, False)
    assert wanted(gradient.detach(), inputs) == (False, True)
    with torch.no_grad():
        assert wanted(gradient, inputs) == (False, False)


def test_backward_from_one_touches_no_gradient(draw, backend):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA the host does not look at the factor")
    gradient, inputs, teacher = draw(3, 2, 5, 8)
    distance = attribution_distance(gradient, inputs, teacher, backend=backend.name)
    with Calls() as seen:
        distance.backward()
    assert not seen.calls and not seen.multiplied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [0.0, -3.0, 1e-3, 1e4])
def test_any_upstream_gradient_is_multiplied(draw, backend, upstream, dtype):
    operands = draw(3, 2, 5, 8, dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).to(backend.device)

    def gradients(x, factor, **options):
        distance = attribution_distance(*x, mask=mask, **options)
        return torch.autograd.grad(distance * factor, x[:2])

    exact = [x.detach().double().requires_grad_() for x in operands[:2]]
    expected = gradients((*exact, operands[2].double()), upstream, backend="reference")
    for found, wanted in zip(gradients(operands, upstream, backend=backend.name), expected, strict=True):
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
        size = wanted.abs().max().item()
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * size / 10 + 1e-7)


def test_a_retained_graph_gives_each_gradient_again(draw, backend):
    """The central difference asks for G's gradient first, and for that of x later, from the same graph."""
    gradient, inputs, teacher = draw(3, 0, 5, 8)
    expected = distance_and_gradients(backend, gradient, inputs, teacher)[1:]
    distance = attribution_distance(gradient, inputs, teacher, backend=backend.name)
    [first] = torch.autograd.grad(distance, gradient, retain_graph=True)
    kept = first.clone()
    (3 * distance).backward()
    assert torch.equal(first, expected[0]) and torch.equal(first, kept)
    torch.testing.assert_close(inputs.grad, 3 * expected[1])


def test_a_second_derivative_is_refused_by_name(draw, backend):
    gradient, inputs, teacher = draw(3, 0, 5, 8)
    distance = attribution_distance(gradient, inputs, teacher, backend=backend.name)
    with pytest.raises(RuntimeError, match="attribution_distance has no second derivative"):
        torch.autograd.grad(distance, gradient, create_graph=True)


STRIDED = {
    "chunk of a wider tensor": lambda x: torch.cat([torch.full_like(x, float("nan")), x], -1).chunk(2, -1)[1],
    "tokens before sequences": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "one sequence for the whole batch": lambda x: x[:1].expand_as(x),
    "last dimension not dense": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("classes", [0, 2])
def test_strided_operands_are_what_their_copies_are(draw, backend, classes, view, dtype):
    gradient, inputs, teacher = draw(4, classes, 5, 32, dtype=dtype)
    results = []
    for make in (view, lambda x: view(x).clone(memory_format=torch.contiguous_format)):
        distance = attribution_distance(make(gradient), make(inputs), teacher, backend=backend.name)
        results.append((distance, *torch.autograd.grad(distance, (gradient, inputs))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_strided_teacher_and_mask_are_read(draw, backend):
    gradient, inputs, teacher = draw(4, 0, 5, 8)
    mask = torch.rand(4, 5).to(backend.device) > 0.3
    expected = distance_and_gradients(backend, gradient, inputs, teacher, mask=mask)
    wide = torch.stack([teacher, teacher + 1], -1)[..., 0], torch.stack([mask, ~mask], -1)[..., 0]
    found = distance_and_gradients(backend, gradient, inputs, wide[0], mask=wide[1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(draw, backend):
    if backend.name != "cpp":
        pytest.skip("torch's own sums are not ours")
    before, results = torch.get_num_threads(), []
    operands = draw(7, 2, 50, 200)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(distance_and_gradients(backend, *operands))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_flops_are_those_of_the_scores_and_of_each_gradient(draw, backend):
    gradient, inputs, teacher = draw(3, 2, 5, 8)
    with FlopCounterMode(display=False) as both:
        attribution_distance(gradient, inputs, teacher, backend=backend.name).backward()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        attribution_distance(gradient, inputs, teacher, backend=backend.name)
    assert forward.get_total_flops() == 2 * 2 * 3 * 2 * 5 * 8
    assert both.get_total_flops() == 3 * forward.get_total_flops()
