"""ARC stage A: a whole training step, from token ids to the optimizer, with the loss computed in several ways.

Teacher and student are BERT encoders of random weights, without dropout, so that all ways have the same result. The
learning rate is zero: the optimizer does all its work and every step begins at the same weights. `both` is the step;
"no loss" is a step whose loss costs nothing, and so the limit of what a fused loss can give.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from fastkd.benchmarks.harness import Case, Provider
from fastkd.benchmarks.kernels.relation_kl import sample_loop
from fastkd.losses import RelationKL
from fastkd.models import tap
from fastkd.ops.relation_kl import eager_relation_kl
from fastkd.recipes.training import bf16_pays

_TINY = ((2, 16, 2), (1, 8, 2))  # layers, width, attention heads of teacher and student
_ISSUE = ((12, 768, 12), (6, 384, 12))
# sequences, relation heads, length, and the two models
SHAPES = {
    "tiny": [(3, 4, 20, *_TINY)],
    "small": [(16, 12, 128, *_ISSUE), (16, 48, 128, *_ISSUE), (4, 12, 512, *_ISSUE), (4, 48, 512, *_ISSUE)],
}
SHAPES["full"] = [*SHAPES["small"], (64, 48, 128, *_ISSUE), (16, 48, 512, *_ISSUE)]
_WHAT = ("query", "key", "value")


def cases(shapes: str, device: str):
    """In the numbers that training would choose: bf16 autocast where it is faster, else fp32."""
    for shape in SHAPES[shapes]:
        yield case(*shape, dtype=torch.bfloat16 if bf16_pays() else torch.float32, device=device)


def encoder(layers: int, width: int, heads: int, seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
        initializer_range=0.1,  # with BERT's 0.02 all relations are nearly uniform, and the gradient nearly rounding
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).train()


def case(batch: int, num_heads: int, length: int, teacher, student, *, dtype: torch.dtype, device: str) -> Case:
    models = {"teacher": encoder(*teacher, 0).requires_grad_(False), "student": encoder(*student, 1)}
    models = {name: model.to(device) for name, model in models.items()}
    ids = torch.randint(0, 30522, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    # The layers above the last tapped projection get no gradient, however it is computed.
    reached = [name for name, _ in _reached(models["student"])]
    learnt = [models["student"].get_parameter(name) for name in reached]
    optimizer = torch.optim.AdamW(learnt, lr=0.0, fused=True)

    def forward(loss: Callable, stop: bool, teacher, student) -> Tensor:
        with torch.no_grad(), tap(teacher, [-1], _WHAT, stop_after=stop) as of_teacher:
            teacher(input_ids=ids, attention_mask=mask)
        with tap(student, [-1], _WHAT, stop_after=stop) as of_student:
            student(input_ids=ids, attention_mask=mask)
        return loss(of_student[-1], of_teacher[-1])

    def step(loss: Tensor) -> tuple[Tensor, ...]:
        loss.backward()
        optimizer.step()
        grads = torch.cat([parameter.grad.flatten() for parameter in learnt])
        optimizer.zero_grad()
        return (grads,)

    def provider(name: str, loss: Callable, *, stop: bool, role: str, needs_bytes: int = 0) -> Provider:
        def run():
            with _autocast(device, dtype):
                return forward(loss, stop, **models)

        return Provider(name, run, step, role, needs_bytes)

    def exact(precision: torch.dtype) -> tuple[Tensor, ...]:
        """The eager step; in fp64 in a copy of the models."""
        doubled = {name: copy.deepcopy(model).double() for name, model in models.items()}
        chosen = doubled if precision == torch.float64 else models
        with nullcontext() if precision == torch.float64 else _autocast(device, dtype):
            loss = forward(eager, False, **chosen)
        grads = torch.autograd.grad(loss, [chosen["student"].get_parameter(name) for name in reached])
        return loss.detach(), torch.cat([grad.flatten() for grad in grads])

    def fused(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        return RelationKL(num_heads)(student, teacher, mask.bool())["total"]

    def eager(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        pairs = [((student[name],) * 2, (teacher[name],) * 2) for name in _WHAT]
        return sum(eager_relation_kl(*pair, mask.sum(1), num_heads).sum() / batch for pair in pairs)

    def loop(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        return sum(sample_loop(student[name], teacher[name], [length] * batch, num_heads) for name in _WHAT)

    scores = 10 * batch * num_heads * length**2 * 4
    return Case(
        op="arc stage A",
        shape={
            "sequences": batch, "heads": num_heads, "length": length, "teacher": "x".join(map(str, teacher[:2])),
            "student": "x".join(map(str, student[:2])),
        },
        length=length,
        tokens=batch * length,
        dtype=dtype,
        device=device,
        exact=exact,
        providers=[
            provider("sample loop", loop, stop=False, role="baseline", needs_bytes=scores),
            provider("eager", eager, stop=False, role="baseline", needs_bytes=scores),
            provider("fused", fused, stop=False, role="fastkd"),
            provider("fused, stopped", fused, stop=True, role="fastkd"),
            provider("no loss, stopped", _free, stop=True, role="limit"),
        ],
        evaluated=False,
        limit_goal=0.95,
    )  # fmt: skip


def _free(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """A loss that costs nothing beside the encoders, and whose gradient reaches all they compute."""
    return sum(student[name].sum() for name in _WHAT)


def _reached(student) -> list[tuple[str, Tensor]]:
    ids = torch.zeros(1, 2, dtype=torch.long, device=student.device)
    with tap(student, [-1], _WHAT, stop_after=True) as taps:
        student(input_ids=ids)
    named = list(student.named_parameters())
    grads = torch.autograd.grad(_free(taps[-1], {}), [parameter for _, parameter in named], allow_unused=True)
    return [pair for pair, grad in zip(named, grads, strict=True) if grad is not None]


def _autocast(device: str, dtype: torch.dtype):
    return torch.autocast(device, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
