"""cos_nce: what is timed, on which shapes, against what. `both` is the loss and the student gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd.benchmarks.harness import Case, Provider
from fastkd.ops import backends, cos_nce
from fastkd.ops.cos_nce import EPSILON, eager_cos_nce

DTYPES = (torch.float32, torch.bfloat16)

# samples, positions (0: vectors without positions), width
_MAIN = [(4096, 0, 768), (64, 128, 768)]
_LARGE = [(65536, 0, 768)]  # three arrays of 201 MB in fp32: more than four times the last-level cache of most CPUs
_EDGES = [(32, 0, 768), (512, 0, 312), (16, 64, 384)]
SHAPES = {"tiny": [(5, 0, 12), (3, 4, 8)], "small": _MAIN + _LARGE, "full": _MAIN + _LARGE + _EDGES}


def cases(shapes: str, device: str):
    """One at a time, because the tensors are large."""
    for shape in SHAPES[shapes]:
        for dtype in DTYPES:
            yield case(*shape, dtype=dtype, device=device)


def by_definition(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    tokens: bool | None = None,
    negatives: Tensor | None = None,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Losses (B,) or (M, B) pair by pair; the arguments are those of `fastkd.cos_nce`. Tests judge by it, too."""
    per_token = tokens if tokens is not None else mask is not None or student.dim() == 4
    if per_token:
        student, teacher = student.transpose(-3, -2), teacher.transpose(-3, -2)  # (..., L, B, D)
    samples = torch.arange(student.shape[-2], device=student.device)
    if negatives is None:
        pairs = samples[:, None] != samples
        if exclude is not None:
            pairs = pairs & (exclude[:, None] != exclude).to(student.device)
    else:
        pairs = torch.ones(len(samples), negatives.shape[-2], dtype=torch.bool, device=student.device)
        if exclude is not None:
            pairs = (exclude[0][:, None] != exclude[1]).to(student.device)
    valid = None if mask is None else mask.bool().T  # (L, B)
    if valid is not None:
        student, teacher = (x.masked_fill(~valid[:, :, None], 0) for x in (student, teacher))
        pairs = pairs & valid[:, None]
    others = teacher if negatives is None else negatives
    losses = eager_cos_nce(student, teacher, others, pairs)
    if not per_token:
        return losses
    if valid is None:
        return losses.mean(-2)
    return losses.where(valid, 0).sum(-2) / valid.sum(-2).clamp(min=1)


def collapsed(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean loss in the form O(B·D), as one writes it in plain torch: samples first, positions behind, no mask."""

    def unit(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=EPSILON)

    s, t = unit(student), unit(teacher)
    positive = (s * t).sum(-1)
    negative = (s * t.sum(0)).sum(-1) - positive
    return (2 - 1.5 * positive + 0.5 / max(len(s) - 1, 1) * negative).mean()


def case(samples: int, positions: int, width: int, *, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    shape = (samples, positions, width) if positions else (samples, width)
    student, teacher = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    student.requires_grad_()
    tokens = bool(positions)

    def gradient(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, student)

    def pairwise() -> Tensor:
        return by_definition(student, teacher, tokens=tokens).mean()

    def plain() -> Tensor:
        return collapsed(student, teacher)

    def exact(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        x, y = student.detach().to(precision).requires_grad_(), teacher.to(precision)
        # Beyond that, pairs do not fit; the tests hold the collapsed form against them.
        loss = collapsed(x, y) if samples > 4096 else by_definition(x, y, tokens=tokens).mean()
        return loss.detach(), *torch.autograd.grad(loss, x)

    def baseline(name: str, forward: Callable[[], Tensor], needs_bytes: int = 0) -> list[Provider]:
        compiled = torch.compile(forward, dynamic=False)
        return [
            Provider(name, forward, gradient, needs_bytes=needs_bytes),
            Provider(f"{name}, torch.compile", compiled, gradient, needs_bytes=needs_bytes),
        ]

    def fused(name: str) -> Provider:
        def forward() -> Tensor:
            return cos_nce(student, teacher, tokens=tokens, backend=name)

        return Provider(f"fastkd {name}", forward, gradient, "fastkd")

    torch._dynamo.reset()  # without it the second shape would be timed in the code for dynamic shapes
    pairs = 5 * max(positions, 1) * samples**2 * dtype.itemsize  # what autograd keeps and makes of the cosines
    return Case(
        op="cos_nce",
        shape={"samples": samples, "positions": positions, "width": width},
        length=max(positions, 1),
        tokens=samples * max(positions, 1),
        dtype=dtype,
        device=device,
        exact=exact,
        providers=[
            *baseline("pairwise", pairwise, pairs),
            *baseline("collapsed", plain),
            *(fused(name) for name in backends.BACKENDS if _runs(name, device, dtype)),
            _copy(student),
        ],
    )


def _runs(backend: str, device: str, dtype: torch.dtype) -> bool:
    return backends.missing_reason("cos_nce", backend, torch.device(device), dtype) is None


def _copy(student: Tensor) -> Provider:
    """A copy that moves as many bytes as must move: student and teacher read, the gradient written, each once."""
    source = torch.ones(3 * student.nbytes // 2, dtype=torch.uint8, device=student.device)
    return Provider("copy of the bytes", source.clone, lambda result: (), "limit")
