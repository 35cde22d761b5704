"""relation_kl: what is timed, on which shapes, against what. `both` is the loss and the student gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.benchmarks.harness import Case, Provider, free_bytes
from fastkd.benchmarks.kernels._cpu_limit import arithmetic_at_peak
from fastkd.benchmarks.kernels._cuda_limit import binding_limit, measured_peaks
from fastkd.ops import backends, relation_kl
from fastkd.ops.fastest import LENGTHS, WIDTHS
from fastkd.ops.relation_kl import eager_relation_kl

DTYPES = (torch.float32, torch.bfloat16)

# sequences, relation heads, length, width of a head of the student and of the teacher
_MAIN = [(32, 12, 128, 32, 64), (8, 12, 512, 32, 64), (8, 48, 512, 16, 16)]
_BY_LENGTH = [(8, 12, length, 32, 64) for length in (32, 64, 128, 256, 1024)]
_EDGES = [(1, 12, 16, 32, 64), (32, 12, 128, 26, 64), (2, 12, 4096, 32, 64), (1, 6, 4096, 32, 64)]
SHAPES = {"tiny": [(3, 2, 20, 4, 8)], "small": _MAIN, "full": _MAIN + _BY_LENGTH + _EDGES}


_MAIN_ON_CUDA = [(32, 48, 512, 16, 16), (32, 12, 512, 32, 64)]
# One for each class of fastkd/ops/fastest.py, of as many tokens.
_CLASSES = [(16384 // length, 12, length, width, width) for width in WIDTHS for length in LENGTHS]
SHAPES_ON_CUDA = {"tiny": SHAPES["tiny"], "small": _MAIN_ON_CUDA, "full": _MAIN_ON_CUDA + _EDGES + _CLASSES}
GOAL_ON_CUDA = 0.55  # of the limit, in bf16


def cases(shapes: str, device: str):
    """Every shape, full and ragged, in every dtype; made one at a time, because the tensors are large."""
    for shape in (SHAPES_ON_CUDA if device == "cuda" else SHAPES)[shapes]:
        for ragged in (False, True):
            for dtype in DTYPES:
                yield case(*shape, ragged=ragged, dtype=dtype, device=device)
    if device == "cuda" and shapes != "tiny":
        for shape in longest_shapes(free_bytes(device)):
            for dtype in DTYPES:
                yield case(*shape, ragged=False, dtype=dtype, device=device)


def eager_bytes(sequences: int, heads: int, length: int, itemsize: int) -> int:
    """What the eager form holds at once for forward and backward: measured are 5 to 6 score matrices."""
    return 6 * itemsize * sequences * heads * length**2


def longest_shapes(free: int) -> list[tuple[int, ...]]:
    """The main shapes at the longest length, by doubling, at which eager fits into `free` bytes: in bf16, and where
    that is another one, in fp32, in which a softmax in fp32 fits, too.
    """
    found = []
    for sequences, heads, length, *widths in _MAIN_ON_CUDA:
        for itemsize in (2, 4):
            longest = length
            while eager_bytes(sequences, heads, 2 * longest, itemsize) <= free:
                longest *= 2
            found.append((sequences, heads, longest, *widths))
    return [shape for shape in dict.fromkeys(found) if shape not in _MAIN_ON_CUDA]


def ragged_lengths(batch: int, length: int) -> Tensor:
    """The same draw for everybody and always: evenly from a quarter to the whole length, shuffled once."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    return torch.linspace(length / 4, length, batch).round().long()[order]


def case(
    batch: int,
    num_heads: int,
    length: int,
    width: int,
    teacher_width: int,
    *,
    ragged: bool,
    dtype: torch.dtype,
    device: str,
) -> Case:
    lengths = (ragged_lengths(batch, length) if ragged else torch.full((batch,), length)).to(device)
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        torch.randn(batch, length, num_heads * d, generator=generator).to(device, dtype) for d in (width, teacher_width)
    )
    student.requires_grad_()
    mask = torch.arange(length, device=device) < lengths[:, None] if ragged else None
    sizes = lengths.tolist()

    def gradient(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, student)

    def eager() -> Tensor:
        return eager_relation_kl((student, student), (teacher, teacher), lengths, num_heads).sum() / batch

    def softmax_in_fp32() -> Tensor:
        return eager_with_fp32_softmax(student, teacher, lengths, num_heads)

    def loop() -> Tensor:
        return sample_loop(student, teacher, sizes, num_heads)

    def fused(backend: str) -> Provider:
        def forward():
            return relation_kl(student, teacher, num_heads, mask=mask, backend=backend)

        return Provider(f"fastkd {backend}", forward, gradient, "fastkd", in_fp32 if backend == "reference" else 0)

    torch._dynamo.reset()  # without it the second shape would be timed in the code for dynamic shapes
    scores, in_fp32 = (eager_bytes(batch, num_heads, length, itemsize) for itemsize in (dtype.itemsize, 4))
    on_cuda = device == "cuda"
    mixed = on_cuda and dtype != torch.float32
    peaks = measured_peaks() if on_cuda else None
    return Case(
        op="relation_kl",
        shape={
            "sequences": batch, "heads": num_heads, "length": length, "student": width, "teacher": teacher_width,
            "fill": "ragged" if ragged else "full",
        },
        length=length,
        tokens=sum(sizes),
        dtype=dtype,
        device=device,
        exact=lambda precision: _one_head_at_a_time(student, teacher, sizes, num_heads, precision),
        providers=[
            Provider("eager", eager, gradient, needs_bytes=scores),
            *([Provider("eager, fp32 softmax", softmax_in_fp32, gradient, needs_bytes=in_fp32)] if mixed else []),
            Provider("torch.compile", torch.compile(eager, dynamic=False), gradient, needs_bytes=scores),
            Provider("sample loop", loop, gradient, needs_bytes=scores),
            *(fused(name) for name in backends.BACKENDS if _runs(name, device, dtype)),
            _bare_products(student, teacher, sizes, num_heads, scores // 2),
            *([] if on_cuda else [arithmetic_at_peak(sizes, num_heads, width, teacher_width, dtype)]),
        ],
        limit=peaks and binding_limit(peaks, sizes, num_heads, width, teacher_width, dtype),
        limit_goal=GOAL_ON_CUDA if peaks and dtype == torch.bfloat16 else None,
        width=max(width, teacher_width),
    )  # fmt: skip


def _runs(backend: str, device: str, dtype: torch.dtype) -> bool:
    return backends.missing_reason("relation_kl", backend, torch.device(device), dtype) is None


def _one_head_at_a_time(student: Tensor, teacher: Tensor, sizes: list[int], num_heads: int, dtype: torch.dtype):
    """Mean loss and student gradient by the eager definition in `dtype`, in the memory of one head of one sequence."""
    loss, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(student, dtype=dtype)
    for b, n in enumerate(sizes):
        for s, t, g in zip(*(x[b, :n].chunk(num_heads, -1) for x in (student.detach(), teacher, grad)), strict=True):
            x, y = s[None].to(dtype).requires_grad_(), t[None].to(dtype)
            one = eager_relation_kl((x, x), (y, y), torch.tensor([n], device=x.device), 1).sum()
            one = one / (num_heads * len(sizes))
            loss += one.detach().double().cpu()
            g.copy_(torch.autograd.grad(one, x)[0][0])
    return loss.to(dtype).to(student.device), grad


def eager_with_fp32_softmax(student: Tensor, teacher: Tensor, lengths: Tensor, num_heads: int) -> Tensor:
    """The eager form as mixed precision has it: products in the tensors' dtype, softmax and divergence in fp32."""
    valid = torch.arange(student.shape[1], device=student.device) < lengths[:, None]
    pairs = (valid[:, :, None] & valid[:, None])[:, None]

    def log_relations(x: Tensor) -> Tensor:
        heads = x.masked_fill(~valid[:, :, None], 0).unflatten(2, (num_heads, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(2, 3) / math.sqrt(heads.shape[-1])
        return scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).log_softmax(-1, dtype=torch.float32)

    log_student, log_teacher = log_relations(student), log_relations(teacher)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).masked_fill(~pairs, 0).sum((1, 2, 3))
    return (divergence / (num_heads * lengths)).mean()


def sample_loop(student: Tensor, teacher: Tensor, sizes: list[int], num_heads: int) -> Tensor:
    """What public reproductions of MiniLMv2 do: cut off the padding of one sample after the other."""
    total = student.new_zeros(())
    for b, n in enumerate(sizes):
        x, y = (t[b, :n].unflatten(-1, (num_heads, -1)).transpose(0, 1) for t in (student, teacher))
        log_student, log_teacher = ((z @ z.transpose(1, 2) / math.sqrt(z.shape[-1])).log_softmax(-1) for z in (x, y))
        total = total + F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / (num_heads * n)
    return total / len(sizes)


def _bare_products(student: Tensor, teacher: Tensor, sizes: list[int], num_heads: int, needs_bytes: int) -> Provider:
    """The matrix products without which there is no result: two score matrices, and one for the gradient.

    No padding, no softmax, heads already split; sequences of one length in one call.
    """

    def heads(x: Tensor) -> list[Tensor]:
        split = x.detach().unflatten(-1, (num_heads, -1)).transpose(1, 2)
        if len(set(sizes)) == 1:
            return [split[:, :, : sizes[0]].flatten(0, 1).contiguous()]
        return [split[b, :, :n].contiguous() for b, n in enumerate(sizes)]

    students, teachers = heads(student), heads(teacher)

    def forward():
        return [(x @ x.transpose(1, 2), y @ y.transpose(1, 2)) for x, y in zip(students, teachers, strict=True)]

    def backward(scores):
        return tuple(own @ x for (own, _), x in zip(scores, students, strict=True))

    return Provider("bare matmuls", forward, backward, "limit", needs_bytes)
