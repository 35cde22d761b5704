"""The truth for relation_kl, and `check`, which holds a backend against it.

The truth is the eager definition in fp64 with autograd. It reads its sequences out of the batch one by one, so that it
shares neither layout nor mask handling with what it judges.
"""

from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.ops import backends, relation_kl
from fastkd.ops.relation_kl import eager_relation_kl


class Backend(NamedTuple):
    name: str
    device: torch.device


@pytest.fixture(
    params=[
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("cpp", "cpu"), id="cpp"),
        pytest.param(("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request) -> Backend:
    """Every backend that can run here, with the device it runs on; the others skip with their reason."""
    name, device = request.param
    op = next((op for op in backends.registered_ops() if request.path.stem.startswith(f"test_{op}")), "relation_kl")
    reason = backends.missing_reason(op, name, torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(f"{op} on {name}: {reason}")
    return Backend(name, torch.device(device))


@contextmanager
def poisoned_allocations():
    """Every uninitialised tensor that torch hands out inside, to C++ as well, is full of NaN."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8).isnan().all(), "torch no longer fills uninitialised memory in deterministic mode"
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def on_poisoned_allocations():
    with poisoned_allocations():
        yield


def _pair(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x, x)


def _sequences(x, mask, cu_seqlens):
    """The valid rows (n, D) of each sequence."""
    if cu_seqlens is not None:
        return [x[start:end] for start, end in cu_seqlens.unfold(0, 2, 1).tolist()]
    return list(x) if mask is None else [rows[keep] for rows, keep in zip(x, mask.bool(), strict=True)]


def by_definition(student, teacher, num_heads, mask=None, cu_seqlens=None, causal=False):
    """Losses (B,) of the eager form on the sequences read out one by one."""

    def padded(operands):
        return tuple(pad_sequence(_sequences(x, mask, cu_seqlens), batch_first=True) for x in _pair(operands))

    lengths = torch.tensor([len(rows) for rows in _sequences(_pair(student)[0], mask, cu_seqlens)])
    return eager_relation_kl(padded(student), padded(teacher), lengths.to(_pair(student)[0].device), num_heads, causal)


def with_gradients(compute, student, teacher, upstream, dtype=None):
    """Losses, and the gradient of (losses · upstream).sum() for each student operand, of compute(student, teacher)."""
    alone = not isinstance(student, (tuple, list))
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in ((student,) if alone else student)]
    teacher = tuple(x.to(dtype or x.dtype) for x in _pair(teacher)) if not alone else teacher.to(dtype or teacher.dtype)
    losses = compute(leaves[0] if alone else tuple(leaves), teacher)
    return losses.detach(), torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))


def gradient_noise(student, num_heads, upstream):
    """What three units in the last place of one fp32 probability come to in the gradient of a one-token sequence.

    G = S − P loses its digits where student and teacher agree, so the gradient itself does not show this scale.
    """
    largest = max(x.nan_to_num(0, 0, 0).abs().max().item() for x in _pair(student))
    head_width = _pair(student)[0].shape[-1] / num_heads
    return 2e-7 * largest * upstream.abs().max().item() / (num_heads * head_width**0.5)


@pytest.fixture
def truth():
    """truth(student, teacher, num_heads, upstream, **layout) -> losses (B,) and student gradients, in fp64."""

    def compute(student, teacher, num_heads, upstream, dtype=torch.float64, **layout):
        return with_gradients(
            lambda s, t: by_definition(s, t, num_heads, **layout), student, teacher, upstream, dtype=dtype
        )

    return compute


@pytest.fixture
def run(backend):
    """run(student, teacher, num_heads, upstream, **layout) -> the same from the backend, on poisoned allocations."""

    def compute(student, teacher, num_heads, upstream, **layout):
        def fused(s, t):
            return relation_kl(s, t, num_heads, reduction="none", backend=backend.name, **layout)

        with poisoned_allocations():
            return with_gradients(fused, student, teacher, upstream)

    return compute


@pytest.fixture
def check(run, truth, backend):
    """check(student, teacher, num_heads, **layout): loss and gradients keep the rule of benchmarks/accuracy.py."""

    def compare(student, teacher, num_heads, upstream=None, **layout):
        cu_seqlens = layout.get("cu_seqlens")
        sequences = len(_pair(student)[0]) if cu_seqlens is None else len(cu_seqlens) - 1
        if upstream is None:
            upstream = torch.randn(sequences).to(backend.device)
        layout_of_truth = {name: value for name, value in layout.items() if name != "max_seqlen"}
        losses, grads = run(student, teacher, num_heads, upstream, **layout)
        exact_losses, exact_grads = truth(student, teacher, num_heads, upstream, **layout_of_truth)
        for dtype in (None, torch.float32):  # where the eager form overflows in fp16, its fp32 form stands in
            eager_losses, eager_grads = truth(student, teacher, num_heads, upstream, dtype=dtype, **layout_of_truth)
            if all(x.isfinite().all() for x in (eager_losses, *eager_grads)):
                break
        assert losses.dtype == (torch.float64 if exact_losses.dtype == _pair(student)[0].dtype else torch.float32)
        verdict = judge(losses, eager_losses, exact_losses, noise=FLOORS[torch.float32])
        assert verdict, f"loss: {verdict}"
        for x, grad, eager, exact in zip(_pair(student), grads, eager_grads, exact_grads, strict=False):
            assert grad.dtype == x.dtype
            verdict = judge(grad, eager, exact, noise=gradient_noise(student, num_heads, upstream))
            assert verdict, f"gradient: {verdict}"
        return losses, grads

    return compare


@pytest.fixture
def draw(backend):
    """draw(B, L, (width, teacher's width)) -> standard normal student and teacher; `draw((T,), widths)` packed."""

    def normal(*leading_and_widths, dtype=torch.float32, teacher_dtype=None, scale=1.0):
        *leading, widths = leading_and_widths
        made = [(scale * torch.randn(*leading, width)).to(backend.device) for width in widths]
        return made[0].to(dtype), made[1].to(teacher_dtype or dtype)

    return normal
