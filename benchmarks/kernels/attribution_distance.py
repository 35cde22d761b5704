"""attribution_distance: what is timed, on which shapes, against what. `both` is the distance and both gradients."""

import torch
from torch import Tensor

from fastkd.benchmarks.harness import Case, Provider
from fastkd.ops import attribution_distance, backends
from fastkd.ops.attribution_distance import eager_attribution_distance

DTYPES = (torch.float32, torch.bfloat16)

# sequences, tokens of the longest, width, and whether all are as long; the others fall evenly to an eighth of it
_MAIN = [(32, 64, 384, True), (32, 128, 768, True), (32, 128, 768, False)]
_LARGE = [(64, 512, 768, True), (64, 512, 768, False)]  # four arrays of 101 MB in fp32
_EDGES = [(8, 16, 312, True), (8, 16, 312, False), (32, 64, 384, False)]
SHAPES = {"tiny": [(3, 5, 12, True), (4, 8, 16, False)], "small": _MAIN + _LARGE, "full": _MAIN + _LARGE + _EDGES}


def cases(shapes: str, device: str):
    """One at a time, because the tensors are large."""
    for shape in SHAPES[shapes]:
        for dtype in DTYPES:
            yield case(*shape, dtype=dtype, device=device)


def case(sequences: int, length: int, width: int, full: bool, *, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    gradient, inputs = (
        torch.randn(sequences, length, width, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)
    )
    least = length if full else max(length // 8, 1)
    lengths = torch.linspace(least, length, sequences).long()[torch.randperm(sequences, generator=generator)]
    mask = torch.arange(length) < lengths[:, None]
    teacher = torch.rand(sequences, length, generator=generator).masked_fill(~mask, 0)
    teacher = (teacher / teacher.norm(dim=1, keepdim=True)).to(device)
    mask = mask.to(device)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (gradient, inputs))

    def eager() -> Tensor:
        return eager_attribution_distance(gradient, inputs, teacher, mask)

    def in_fp32() -> Tensor:
        """The same with sums in fp32, as the kernels have them: compiled, nothing wide reaches memory."""
        return eager_attribution_distance(gradient.float(), inputs.float(), teacher, mask)

    def exact(precision: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(precision).requires_grad_() for x in (gradient, inputs)]
        loss = eager_attribution_distance(*leaves, teacher.to(precision), mask)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def fused(name: str) -> Provider:
        def forward() -> Tensor:
            return attribution_distance(gradient, inputs, teacher, mask=mask, backend=name)

        return Provider(f"fastkd {name}", forward, gradients, "fastkd")

    torch._dynamo.reset()  # without it the second shape would be timed in the code for dynamic shapes
    return Case(
        op="attribution_distance",
        shape={"sequences": sequences, "length": length, "width": width, "lengths": "equal" if full else "uneven"},
        length=length,
        tokens=int(lengths.sum()),
        dtype=dtype,
        device=device,
        exact=exact,
        providers=[
            Provider("eager", eager, gradients),
            Provider("eager, torch.compile", torch.compile(in_fp32, dynamic=False), gradients),
            *(fused(name) for name in backends.BACKENDS if _runs(name, device, dtype)),
            _copy(gradient),
        ],
    )


def _runs(backend: str, device: str, dtype: torch.dtype) -> bool:
    return backends.missing_reason("attribution_distance", backend, torch.device(device), dtype) is None


def _copy(gradient: Tensor) -> Provider:
    """A copy of as many bytes as must move without padding: G and x read, their gradients written, each once."""
    source = torch.ones(2 * gradient.nbytes, dtype=torch.uint8, device=gradient.device)
    return Provider("copy of the bytes", source.clone, lambda result: (), "limit")
