"""relation_kl behaves as an op of torch should: compile, autocast, no_grad, upstream gradients, flop counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd.ops.flops  # noqa: F401  registers the formulas
from fastkd.ops import relation_kl
from fastkd.ops.relation_kl import eager_relation_kl

WITH_GRAD = 11  # position of `with_grad` in the schema


def op_of(backend):
    return getattr(torch.ops.fastkd, f"relation_kl_{backend.name}").default


def arguments_of_op(draw, backend, cross, packed, with_grad):
    leading = (9,) if packed else (2, 6)
    (student, teacher), (right, teacher_right) = (draw(*leading, (8, 12)) for _ in range(2))
    lengths = torch.tensor([6, 3], dtype=torch.int32, device=backend.device)
    starts = torch.tensor([0, 6] if packed else [0, 0], device=backend.device)
    order = None if packed else torch.arange(6, dtype=torch.int32, device=backend.device).repeat(2, 1)
    rights = (right, teacher_right) if cross else (None, None)
    return student, rights[0], teacher, rights[1], starts, lengths, order, 6, 2, False, 2, with_grad


@pytest.mark.parametrize("with_grad", [True, False], ids=["gradient", "loss only"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_opcheck(draw, backend, cross, packed, with_grad):
    torch.library.opcheck(op_of(backend), arguments_of_op(draw, backend, cross, packed, with_grad))


class Calls(TorchDispatchMode):
    """Records every op that is called, and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of_the_kernel(self):
        return [arguments for func, arguments in self.calls if func.name().startswith("fastkd::relation_kl")]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiles_whole_and_recompiles_at_most_once_for_other_sizes(draw, backend, packed):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layout = {"max_seqlen": 40} if packed else {}

    def loss_of(student, teacher, where):
        name = "cu_seqlens" if packed else "mask"
        return relation_kl(student, teacher, 2, **{name: where}, **layout, backend=backend.name)

    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    for batch, length in ((2, 5), (3, 17), (5, 40)):
        student, teacher = draw(*((batch * length,) if packed else (batch, length)), (8, 16))
        where = torch.arange(batch + 1) * length if packed else torch.rand(batch, length) > 0.3
        results = []
        for function in (compiled, loss_of):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, where.to(backend.device))
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(draw, backend, dtype):
    student, teacher = draw(2, 33, (16, 32))
    results = []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast(backend.device.type, dtype, enabled=enabled):
            loss = relation_kl(leaf, teacher, 2, backend=backend.name)
            loss.backward()
        results.append((loss, leaf.grad))
    assert results[1][0].dtype == results[1][1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def gradient_wanted(compute):
    with Calls() as seen:
        compute()
    (arguments,) = seen.of_the_kernel()
    return arguments[WITH_GRAD]


def test_the_gradient_is_computed_only_where_somebody_wants_it(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    leaf = student.clone().requires_grad_()
    loss_of = lambda s, t=teacher: relation_kl(s, t, 2, backend=backend.name)  # noqa: E731
    assert gradient_wanted(lambda: loss_of(leaf))
    assert gradient_wanted(lambda: loss_of((student, leaf), (teacher, teacher)))
    assert not gradient_wanted(lambda: loss_of(student))
    with torch.no_grad():
        assert not gradient_wanted(lambda: loss_of(leaf))
        assert not loss_of(leaf).requires_grad
    with torch.inference_mode():
        assert not gradient_wanted(lambda: loss_of(student))


def test_backward_runs_no_second_kernel(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    loss = relation_kl(student.requires_grad_(), teacher, 2, backend=backend.name)
    with Calls() as seen:
        loss.backward()
    assert seen.calls and not seen.of_the_kernel()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_leaves_the_gradient_as_it_is_where_upstream_is_one(draw, backend, dtype, reduction):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA a kernel finds out, so that the host need not wait")
    student, teacher = draw(2, 6, (8, 12), dtype=dtype)
    loss = relation_kl(student.requires_grad_(), teacher, 2, reduction=reduction, backend=backend.name)
    with Calls() as seen:
        loss.backward()
    assert not [func for func, arguments in seen.calls if func.name().startswith("aten::mul")]


UPSTREAMS = {
    "one": lambda: torch.ones(()),
    "a loss weight": lambda: torch.tensor(0.3),
    "zero": lambda: torch.zeros(()),
    "one per sequence": lambda: torch.tensor([0.5, -2.0, 1.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("upstream", UPSTREAMS.values(), ids=UPSTREAMS)
def test_upstream_gradients_of_any_value_and_dtype(draw, backend, upstream, packed, dtype):
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip("double precision runs on the reference")
    student, teacher = draw(3, 6, (8, 12), dtype=dtype)
    upstream = upstream().to(backend.device)
    student, lengths = student.requires_grad_(), torch.tensor([6, 3, 6], device=backend.device)
    here = torch.arange(6, device=backend.device) < lengths[:, None]
    exact = student.detach().double().requires_grad_()
    losses = eager_relation_kl((exact, exact), (teacher.double(),) * 2, lengths, 2)
    reductions = {"none": losses} if upstream.dim() else {"mean": losses.mean(), "sum": losses.sum()}
    for reduction, truth in reductions.items():
        (expected,) = torch.autograd.grad(truth, exact, upstream.double(), retain_graph=True)
        where = {"cu_seqlens": torch.tensor([0, 6, 9, 15], device=backend.device)} if packed else {"mask": here}
        operands = (student[here], teacher[here]) if packed else (student, teacher)
        loss = relation_kl(*operands, 2, **where, reduction=reduction, backend=backend.name)
        (grad,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
        assert grad.dtype == dtype
        tolerance = 1e-6 + 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            grad.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_loss_scale_of_65536_costs_no_accuracy_in_fp16(draw, backend, packed):
    """Unscaled, these gradients are subnormal in fp16: a factor applied before the cast would cost their digits."""
    student, teacher = draw(64, 16, (8, 8), dtype=torch.float16, scale=0.25)
    student.requires_grad_()
    where = {"cu_seqlens": torch.arange(65, device=backend.device) * 16} if packed else {}
    operands = (student.flatten(0, 1), teacher.flatten(0, 1)) if packed else (student, teacher)
    (grad,) = torch.autograd.grad(65536 * relation_kl(*operands, 2, **where, backend=backend.name), student)
    exact, lengths = student.detach().double().requires_grad_(), torch.full((64,), 16, device=backend.device)
    losses = eager_relation_kl((exact, exact), (teacher.double(),) * 2, lengths, 2)
    (expected,) = torch.autograd.grad(65536 * losses.mean(), exact)
    assert (expected / 65536).abs().median() < torch.finfo(torch.float16).smallest_normal
    relative = ((grad.double() - expected).abs() / expected.abs()).median().item()
    assert relative < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("wanted", [0, 1], ids=["left", "right"])
def test_only_the_operand_that_asks_gets_a_gradient(draw, backend, wanted):
    pairs = [draw(2, 6, (8, 12)) for _ in range(2)]
    students, teachers = tuple(s for s, _ in pairs), tuple(t for _, t in pairs)
    students[wanted].requires_grad_()
    relation_kl(students, teachers, 2, backend=backend.name).backward()
    assert students[wanted].grad is not None and students[1 - wanted].grad is None


def test_the_students_memory_is_not_written(draw, backend):
    student, teacher = draw(2, 33, (16, 32))
    before = student.clone(), teacher.clone()
    relation_kl(student.requires_grad_(), teacher, 2, backend=backend.name).backward()
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])
    assert student._version == teacher._version == 0


def test_a_second_derivative_is_refused_by_name(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    loss = relation_kl(student.requires_grad_(), teacher, 2, backend=backend.name)
    with pytest.raises(RuntimeError, match="relation_kl has no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_a_teacher_that_requires_grad_is_refused(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    with pytest.raises(ValueError, match=r"teacher requires a gradient.*detach"):
        relation_kl(student, teacher.requires_grad_(), 2, backend=backend.name)
    with torch.no_grad():  # an evaluation may pass a trainable teacher
        relation_kl(student, teacher, 2, backend=backend.name)


def test_a_dtensor_is_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 12)
        sharded = distribute_tensor(student, init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"student is a DTensor.*to_local"):
            relation_kl(sharded, teacher, 2)
    finally:
        dist.destroy_process_group()


def test_flops_of_a_cross_relation_are_those_of_the_eager_form(draw, backend):
    """The self relation needs one product less than autograd makes of it: (G + Gᵀ)X instead of GX and GᵀX."""
    (left, teacher_left), (right, teacher_right) = (draw(2, 6, (8, 12)) for _ in range(2))
    students, teachers = (left.requires_grad_(), right.requires_grad_()), (teacher_left, teacher_right)
    with FlopCounterMode(display=False) as fused:
        relation_kl(students, teachers, 2, backend=backend.name).backward()
    with FlopCounterMode(display=False) as own:
        relation_kl(left, teacher_left, 2, backend=backend.name).backward()
    with FlopCounterMode(display=False) as eager:
        lengths = torch.tensor([6, 6], device=backend.device)
        eager_relation_kl(students, teachers, lengths, 2).sum().backward()
    assert fused.get_total_flops() == eager.get_total_flops() > 0
    assert own.get_total_flops() == fused.get_total_flops() - 2 * 2 * 6 * 6 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradient_again(draw, backend, reduction, dtype):
    """The gradient is scaled where it lies once the graph is let go, and not before."""
    student, teacher = draw(2, 6, (8, 12), dtype=dtype)
    student.requires_grad_()
    loss = 3 * relation_kl(student, teacher, 2, reduction=reduction, backend=backend.name).sum()
    first, second, last = (torch.autograd.grad(loss, student, retain_graph=keep)[0] for keep in (True, True, False))
    assert first.abs().sum() > 0
    assert torch.equal(first, second) and torch.equal(first, last)


def test_gradients_accumulate_in_a_leaf_that_keeps_its_graph(draw, backend):
    """The leaf must not be given the very memory that a second backward reads."""
    student, teacher = draw(2, 6, (8, 12))
    loss = relation_kl(student.requires_grad_(), teacher, 2, backend=backend.name)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 3 * once)


def test_many_upstream_gradients_of_a_mean_in_one_backward(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    student.requires_grad_()
    upstreams = torch.tensor([1.0, -2.0], device=backend.device)

    def loss():
        return relation_kl(student, teacher, 2, backend=backend.name)

    (batched,) = torch.autograd.grad(loss(), student, upstreams, is_grads_batched=True)
    alone = torch.stack([torch.autograd.grad(loss(), student, upstream)[0] for upstream in upstreams])
    assert torch.equal(batched, alone)


def test_many_upstream_gradients_in_one_backward(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    student.requires_grad_()

    def losses():
        return relation_kl(student, teacher, 2, reduction="none", backend=backend.name)

    unit = torch.eye(2, device=backend.device)
    (batched,) = torch.autograd.grad(losses(), student, unit, is_grads_batched=True)
    alone = torch.stack([torch.autograd.grad(losses(), student, upstream)[0] for upstream in unit])
    assert torch.equal(batched, alone)
