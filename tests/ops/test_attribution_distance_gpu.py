"""What only a GPU can show of attribution_distance: no waiting host, current stream, graph capture, memory, 64 bits."""

import pytest
import torch

from fastkd.ops import attribution_distance

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
        pytest.skip("the reference holds intermediates of the size of the gradient")
    return on_gpu


def drawn(*shape, dtype=torch.float32):
    gradient, inputs = (torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
    return gradient, inputs, torch.rand(shape[:-1], device="cuda"), torch.rand(shape[:-1], device="cuda") > 0.3


def forward_and_backward(backend, gradient, inputs, teacher, mask):
    distance = attribution_distance(gradient, inputs, teacher, mask=mask, backend=backend.name)
    return distance.detach(), *torch.autograd.grad(distance, (gradient, inputs))


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_host_does_not_wait(kernels):
    operands = drawn(8, 40, 24)
    forward_and_backward(kernels, *operands)  # the first call may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(kernels, *operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(on_gpu):
    operands = drawn(8, 40, 24)
    expected = forward_and_backward(on_gpu, *operands)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = forward_and_backward(on_gpu, *operands)
    stream.synchronize()
    assert same(results, expected)


def test_results_are_the_same_run_to_run(kernels):
    operands = drawn(32, 128, 768)
    assert same(forward_and_backward(kernels, *operands), forward_and_backward(kernels, *operands))


def test_a_call_can_be_captured_in_a_graph(kernels):
    gradient, inputs, teacher, mask = drawn(8, 40, 24)

    op = getattr(torch.ops.fastkd, f"attribution_distance_{kernels.name}")

    def call():
        of_class = gradient.detach()[:, None], inputs.detach(), teacher[:, None], mask
        return op(*of_class, True, "norm", "l2", "l2", True, True)

    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    assert same(results, expected)


def test_beside_the_gradients_memory_is_that_of_the_scores(kernels):
    operands = drawn(32, 128, 768)
    forward_and_backward(kernels, *operands)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_and_backward(kernels, *operands)
    assert torch.cuda.max_memory_allocated() - before < 1.02 * 2 * operands[0].nbytes


@pytest.mark.slow
def test_offsets_reach_behind_2_to_the_31_elements(kernels):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    batch = 2**31 // (512 * 1024) + 2
    gradient, inputs, teacher, mask = drawn(batch, 512, 1024, dtype=torch.bfloat16)
    results = forward_and_backward(kernels, gradient, inputs, teacher, mask)
    last = slice(-1, None)
    alone = forward_and_backward(kernels, gradient[last], inputs[last], teacher[last], mask[last])
    for whole, part in zip(results[1:], alone[1:], strict=True):
        torch.testing.assert_close(batch * whole[last].float(), part.float(), rtol=2e-2, atol=1e-6)
