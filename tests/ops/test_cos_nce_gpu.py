"""What only a GPU can show of cos_nce: no waiting host, current stream and device, graph capture, memory, 64 bits."""

import pytest
import torch

from fastkd.ops import cos_nce

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(backend):
    if backend.device.type != "cuda":
        pytest.skip("the same backend runs on the CPU here")
    return backend


@pytest.fixture
def kernels(on_gpu):
    """A backend whose memory and offsets are its own, not torch's."""
    if on_gpu.name == "reference":
        pytest.skip("the reference holds intermediates of the size of the vectors")
    return on_gpu


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape, device="cuda", dtype=dtype)


def forward_and_backward(backend, student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = cos_nce(student, teacher, backend=backend.name, **options)
    return loss.detach(), *torch.autograd.grad(loss, student)


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("form", ["vectors", "tokens", "exclude"])
def test_the_host_does_not_wait(kernels, form):
    student, teacher = drawn(40, 5, 24) if form == "tokens" else drawn(40, 24)
    options = {
        "vectors": {},
        "tokens": {"mask": torch.rand(40, 5, device="cuda") > 0.3},
        "exclude": {"exclude": torch.randint(9, (40,), device="cuda")},
    }[form]
    forward_and_backward(kernels, student, teacher, **options)  # the first call may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(kernels, student, teacher, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(on_gpu):
    student, teacher = drawn(300, 40)
    expected = forward_and_backward(on_gpu, student, teacher)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream overtakes this, and reads zeros
        actual = forward_and_backward(on_gpu, student * 1.0, teacher * 1.0)
    stream.synchronize()
    assert same(actual, expected)


def test_work_goes_to_the_tensors_device(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    student, teacher = (x.to("cuda:1") for x in drawn(33, 16))
    loss, grad = forward_and_backward(on_gpu, student, teacher)
    assert loss.device == grad.device == student.device and torch.cuda.current_device() == 0


def test_a_training_step_can_be_captured_in_a_graph(kernels):
    student, teacher = drawn(300, 40)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = forward_and_backward(kernels, student, teacher)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(kernels, student, teacher)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


def test_every_run_gives_the_same_bits(kernels):
    student, teacher = drawn(5000, 40, dtype=torch.bfloat16)
    ids = torch.randint(900, (5000,), device="cuda")
    first, *others = (forward_and_backward(kernels, student, teacher, exclude=ids) for _ in range(4))
    assert all(same(other, first) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_one_costs_no_second_gradient(kernels, dtype):
    """Loss and gradient of B = 65,536 fit in the gradient and 8 MiB: backward works where the gradient lies."""
    student, teacher = drawn(65536, 768, dtype=dtype)
    for _ in range(2):  # the first call may compile
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = forward_and_backward(kernels, student, teacher)
        extra = torch.cuda.max_memory_allocated() - before
        del results
    assert extra <= student.nbytes + 2**23


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_vectors_take_the_gradient_and_one_percent(kernels, dtype):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    student, teacher = drawn(1048576, 768, dtype=dtype)
    forward_and_backward(kernels, student[:99], teacher[:99])  # may compile
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = forward_and_backward(kernels, student, teacher)
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * student.nbytes
    assert abs(loss.item() - 2) < 0.01  # the cosines of independent vectors vanish in the mean


@pytest.mark.slow
def test_vectors_of_more_than_2_to_the_31_elements(kernels):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    student, teacher = drawn(2**31 // 768 + 99, 768, dtype=torch.bfloat16)
    negatives = torch.randn(50, 768, device="cuda")
    options = {"negatives": negatives, "reduction": "none", "backend": kernels.name}
    student.requires_grad_()
    losses = cos_nce(student, teacher, **options)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    tail = student[-99:].detach().clone().requires_grad_()
    tail_losses = cos_nce(tail, teacher[-99:].clone(), **options)
    (tail_grad,) = torch.autograd.grad(tail_losses.sum(), tail)
    torch.testing.assert_close(losses[-99:], tail_losses)
    torch.testing.assert_close(grad[-99:], tail_grad)


@pytest.mark.slow
def test_sums_over_more_than_2_to_the_31_elements(kernels):
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    sums = getattr(torch.ops.fastkd, f"cos_nce_sums_{kernels.name}")
    vectors = torch.zeros(1, 2**31 // 768 + 99, 1, 768, dtype=torch.bfloat16, device="cuda")
    vectors[:, -99:] = torch.randn(1, 99, 1, 768, device="cuda")
    torch.testing.assert_close(sums(vectors, None, None, 0), sums(vectors[:, -99:], None, None, 0))


@pytest.mark.slow
def test_scaling_reaches_behind_2_to_the_31_elements(kernels):
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    grad = torch.ones(2**31 + 99, dtype=torch.bfloat16, device="cuda")
    getattr(torch.ops.fastkd, f"scale_gradient_{kernels.name}")(grad, torch.tensor(0.5, device="cuda"))
    assert (grad[-99:] == 0.5).all() and (grad[:99] == 0.5).all()
