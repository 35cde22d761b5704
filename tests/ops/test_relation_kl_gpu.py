"""What only a GPU can show: no waiting host, the current stream and device, offsets beyond 32 bits, graph capture."""

import pytest
import torch

from fastkd.ops import relation_kl

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(backend):
    if backend.device.type != "cuda":
        pytest.skip("the same backend runs on the CPU here")
    return backend


def forward_and_backward(backend, student, teacher, **layout):
    loss = relation_kl(student, teacher, 2, backend=backend.name, **layout)
    return loss.detach(), *torch.autograd.grad(loss, student)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_host_does_not_wait(draw, on_gpu, packed):
    student, teacher = draw(*((32,) if packed else (2, 16)), (16, 32))
    student.requires_grad_()
    if packed:
        layout = {"cu_seqlens": torch.tensor([0, 20, 32], device=on_gpu.device), "max_seqlen": 20}
    else:
        layout = {"mask": torch.rand(2, 16, device=on_gpu.device) > 0.3}
    forward_and_backward(on_gpu, student, teacher, **layout)  # the first call may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(on_gpu, student, teacher, **layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(draw, on_gpu):
    student, teacher = draw(4, 70, (32, 32))
    expected = forward_and_backward(on_gpu, student.clone().requires_grad_(), teacher)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream overtakes this, and reads zeros
        late = (student * 1.0).requires_grad_()
        actual = forward_and_backward(on_gpu, late, teacher * 1.0)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_work_goes_to_the_tensors_device(draw, on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    student, teacher = (x.to("cuda:1") for x in draw(2, 33, (16, 32)))
    loss, grad = forward_and_backward(on_gpu, student.requires_grad_(), teacher)
    assert loss.device == grad.device == student.device and torch.cuda.current_device() == 0


def test_a_training_step_can_be_captured_in_a_graph(draw, on_gpu):
    if on_gpu.name == "reference":
        pytest.skip("the reference indexes with boolean masks, whose size the host must know")
    student, teacher = draw(2, 33, (16, 32))
    student.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = forward_and_backward(on_gpu, student, teacher)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(on_gpu, student, teacher)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("length", [128, 2000])
def test_scratch_is_16_bytes_per_row_and_head(draw, on_gpu, length):
    """And the loss of each block of rows, at most four bytes per 16 rows."""
    if on_gpu.name == "reference":
        pytest.skip("the reference holds the score matrices")
    heads, (student, teacher) = 12, draw(4, length, (12 * 32, 12 * 64), dtype=torch.bfloat16)
    student.requires_grad_()
    for _ in range(2):  # the first call may compile
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = relation_kl(student, teacher, heads, backend=on_gpu.name)
        scratch = torch.cuda.max_memory_allocated() - before - student.numel() * student.element_size()
        del loss
    assert scratch <= (16 + 0.25) * 4 * length * heads + 2**16


@pytest.mark.slow
def test_tensors_of_more_than_2_to_the_31_elements(on_gpu):
    if on_gpu.name == "reference" or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a kernel backend and 24 GiB of free GPU memory")
    length, width = 128, 768
    batch = 2**31 // (length * width) + 2
    student = torch.randn(batch, length, width, dtype=torch.bfloat16, device=on_gpu.device).requires_grad_()
    teacher = torch.randn(batch, length, 12, dtype=torch.bfloat16, device=on_gpu.device)
    losses = relation_kl(student, teacher, 12, reduction="none", backend=on_gpu.name)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    tail = student[-2:].detach().clone().requires_grad_()
    tail_losses = relation_kl(tail, teacher[-2:], 12, reduction="none", backend=on_gpu.name)
    (tail_grad,) = torch.autograd.grad(tail_losses.sum(), tail)
    torch.testing.assert_close(losses[-2:], tail_losses)
    torch.testing.assert_close(grad[-2:], tail_grad)
