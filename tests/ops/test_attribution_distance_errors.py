"""attribution_distance refuses bad input before any work, naming the argument, what was given and what is allowed."""

import sys

import pytest
import torch

from fastkd.ops.attribution_distance import attribution_distance

G, X, TEACHER = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.rand(4, 6)

REFUSED = {
    "two dimensions": (lambda: attribution_distance(G[0], X, TEACHER), ValueError, r"expected \(B, L, D\) or"),
    "no width": (lambda: attribution_distance(G[..., :0], X[..., :0], TEACHER), ValueError, "its width is zero"),
    "inputs of another width": (
        lambda: attribution_distance(G, X[..., :7], TEACHER),
        ValueError,
        r"inputs has shape \(4, 6, 7\); the gradient's \(4, 6, 8\) asks for \(4, 6, 8\)",
    ),
    "a teacher of other classes": (
        lambda: attribution_distance(G[:, None].expand(4, 3, 6, 8), X, TEACHER),
        ValueError,
        r"teacher has shape \(4, 6\); the gradient's \(4, 3, 6, 8\) asks for \(4, 3, 6\)",
    ),
    "a mask of another length": (
        lambda: attribution_distance(G, X, TEACHER, mask=torch.ones(4, 5).bool()),
        ValueError,
        r"mask has shape \(4, 5\).*asks for \(4, 6\)",
    ),
    "an additive mask": (
        lambda: attribution_distance(G, X, TEACHER, mask=torch.zeros(4, 6)),
        TypeError,
        "mask is torch.float32; allowed are bool and integers",
    ),
    "integers": (lambda: attribution_distance(G.long(), X, TEACHER), TypeError, "gradient is torch.int64; allowed are"),
    "no tensor": (lambda: attribution_distance(G, X, 0.5), TypeError, "teacher must be a tensor, not float"),
    "inputs of another dtype": (
        lambda: attribution_distance(G, X.double(), TEACHER),
        TypeError,
        "inputs are torch.float64, the gradient torch.float32",
    ),
    "another device": (
        lambda: attribution_distance(G, X, TEACHER.to("meta")),
        ValueError,
        "teacher is on meta, the gradient on cpu",
    ),
    "a teacher that requires a gradient": (
        lambda: attribution_distance(G, X, TEACHER.clone().requires_grad_()),
        ValueError,
        "teacher requires a gradient.*detach",
    ),
    "a sum of saliency": (
        lambda: attribution_distance(G, None, TEACHER, reduce="sum"),
        ValueError,
        r"inputs=None \(saliency\) has no reduce='sum'",
    ),
    "an unknown reduction": (
        lambda: attribution_distance(G, X, TEACHER, reduce="mean"),
        ValueError,
        "reduce='mean'; allowed are 'norm', 'sum'",
    ),
    "an unknown norm": (
        lambda: attribution_distance(G, X, TEACHER, norm="max"),
        ValueError,
        "norm='max'; allowed are None, 'l1', 'l2'",
    ),
    "an unknown distance": (
        lambda: attribution_distance(G, X, TEACHER, kind="cosine"),
        ValueError,
        "kind='cosine'; allowed are 'l1', 'l2', 'smooth_l1'",
    ),
    "a transform of torch.func": (
        lambda: torch.func.grad(lambda x: attribution_distance(G, x, TEACHER))(X),
        RuntimeError,
        "inputs is differentiated by torch.func",
    ),
    "a sparse layout": (lambda: attribution_distance(G, X, TEACHER.to_sparse()), TypeError, "teacher has the layout"),
    "an unknown backend": (
        lambda: attribution_distance(G, X, TEACHER, backend="fast"),
        ValueError,
        "is not a backend",
    ),
    "tensors on another device than the backend's": (
        lambda: attribution_distance(G, X, TEACHER, backend="cuda"),
        RuntimeError,
        "the CUDA kernel runs on CUDA devices, the tensors are on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, call, error, message):
    op = sys.modules["fastkd.ops.attribution_distance"]  # the attribute of this name is the function
    monkeypatch.setattr(op, "_OPS", {})
    with pytest.raises(error, match=message):
        call()


def test_an_evaluation_may_pass_a_trainable_teacher(backend):
    with torch.no_grad():
        operands = (x.to(backend.device) for x in (G, X, TEACHER.clone().requires_grad_()))
        assert attribution_distance(*operands, backend=backend.name).isfinite()
