"""relation_kl behaves as an op of torch should: compile, autocast, no_grad, subclasses, flop counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastkd.ops.flops  # noqa: F401  registers the formulas
from fastkd.ops import relation_kl
from fastkd.ops.relation_kl import eager_relation_kl

WITH_GRAD = 10  # position of `with_grad` in the schema


def op_of(backend):
    return getattr(torch.ops.fastkd, f"relation_kl_{backend.name}").default


def arguments_of_op(draw, backend, cross, packed, with_grad):
    leading = (9,) if packed else (2, 6)
    (student, teacher), (right, teacher_right) = (draw(*leading, (8, 12)) for _ in range(2))
    lengths = torch.tensor([6, 3], dtype=torch.int32, device=backend.device)
    starts = torch.tensor([0, 6] if packed else [0, 0], device=backend.device)
    order = None if packed else torch.arange(6, dtype=torch.int32, device=backend.device).repeat(2, 1)
    rights = (right, teacher_right) if cross else (None, None)
    return student, rights[0], teacher, rights[1], starts, lengths, order, 6, 2, False, with_grad


@pytest.mark.parametrize("with_grad", [True, False], ids=["gradient", "loss only"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_opcheck(draw, backend, cross, packed, with_grad):
    torch.library.opcheck(op_of(backend), arguments_of_op(draw, backend, cross, packed, with_grad))


class Calls(TorchDispatchMode):
    """Records the arguments of every call of a fused op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkd":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


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
    ((_, arguments),) = seen.calls
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
    assert not seen.calls


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


def test_a_retained_graph_gives_the_same_gradient_again(draw, backend):
    """The gradient is scaled where it lies once the graph is let go, and not before."""
    student, teacher = draw(2, 6, (8, 12))
    student.requires_grad_()
    loss = relation_kl(student, teacher, 2, backend=backend.name)
    first, second, last = (torch.autograd.grad(loss, student, retain_graph=keep)[0] for keep in (True, True, False))
    assert first.abs().sum() > 0
    assert torch.equal(first, second) and torch.equal(first, last)


def test_many_upstream_gradients_in_one_backward(draw, backend):
    student, teacher = draw(2, 6, (8, 12))
    student.requires_grad_()

    def losses():
        return relation_kl(student, teacher, 2, reduction="none", backend=backend.name)

    unit = torch.eye(2, device=backend.device)
    (batched,) = torch.autograd.grad(losses(), student, unit, is_grads_batched=True)
    alone = torch.stack([torch.autograd.grad(losses(), student, upstream)[0] for upstream in unit])
    assert torch.equal(batched, alone)
