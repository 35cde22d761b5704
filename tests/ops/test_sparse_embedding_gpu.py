"""What only a GPU can show of sparse_embedding: no waiting host, the current stream, graph capture, 64-bit offsets."""

import pytest
import torch

from fastkd.benchmarks.kernels.sparse_embedding import random_code
from fastkd.ops import sparse_embedding
from fastkd.ops.sparse_arrays import Arrays

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(backend):
    if backend.device.type != "cuda" or backend.name == "reference":
        pytest.skip("the reference indexes with boolean masks, whose size the host must know")
    return backend


@pytest.fixture
def step(on_gpu):
    """step(ids) -> rows and gradients."""
    code = Arrays(*(x if x is None else x.cuda() for x in random_code(60, 12, 40, 5, weights=torch.float32)))
    code = code._replace(kept=code.kept.requires_grad_(), atom_weights=code.atom_weights.requires_grad_())

    def compute(ids):
        out = sparse_embedding(ids, code, padding_idx=3, backend=on_gpu.name)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (code.kept, code.atom_weights))

    return compute


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_host_does_not_wait(step):
    ids = torch.randint(60, (4, 20), device="cuda")
    step(ids)  # the first call may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(step):
    ids = torch.randint(60, (4, 20), device="cuda")
    expected = step(ids)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream overtakes this, and reads zeros
        actual = step(ids * 1)
    stream.synchronize()
    assert same(actual, expected)


def test_a_training_step_can_be_captured_in_a_graph(step):
    ids = torch.randint(60, (4, 20), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step(ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(ids)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


@pytest.mark.slow
def test_results_of_more_than_2_to_the_31_elements(on_gpu):
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    code = Arrays(*(x if x is None else x.cuda() for x in random_code(60, 12, 768, 5, rows=torch.float16)))
    ids = torch.randint(60, (2**31 // 768 + 9,), device="cuda")
    out = sparse_embedding(ids, code, dtype=torch.float16, backend=on_gpu.name)
    tail = sparse_embedding(ids[-99:].clone(), code, dtype=torch.float16, backend=on_gpu.name)
    assert torch.equal(out[-99:], tail)
