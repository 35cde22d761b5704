"""relation_kl gives the right numbers: every backend against the eager definition in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.ops import relation_kl
from fastkd.ops.relation_kl import eager_relation_kl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, L, relation heads, student's and teacher's width of one head, and why
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1),
    "two tokens, odd widths": (2, 2, 1, 1, 3),
    "primes": (3, 7, 3, 5, 11),
    "primes, student wider": (2, 13, 2, 7, 3),
    "one below a 16 row tail": (2, 15, 2, 16, 16),
    "one 16 row tail": (1, 16, 1, 8, 16),
    "one above a 16 row tail": (2, 17, 2, 16, 8),
    "one below a 64 row tile": (1, 63, 2, 8, 16),
    "one 64 row tile": (1, 64, 1, 16, 32),
    "one above a 64 row tile": (1, 65, 2, 16, 8),
    "tail after two tiles": (1, 145, 2, 16, 16),
    "width 312 in 12 heads": (1, 31, 12, 26, 64),
    "width 384 in 64 heads": (1, 21, 64, 6, 16),
    "width 384 and 768 in 12 heads": (2, 37, 12, 32, 64),
    "widest heads": (1, 19, 2, 128, 128),
    "heads wider than two tiles": (1, 18, 1, 130, 200),
    "more sequences than threads": (9, 11, 2, 8, 8),
}


def skip_what_is_too_wide(backend, *widths):
    if backend.name in ("triton", "cuda") and max(widths) > 128:
        pytest.skip("the GPU kernels take relation heads up to 128 wide")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_self_relation_is_right_in_every_shape(draw, check, backend, shape, dtype):
    batch, length, heads, width, teacher_width = shape
    skip_what_is_too_wide(backend, width, teacher_width)
    check(*draw(batch, length, (heads * width, heads * teacher_width), dtype=dtype), heads)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_causal_self_relation_is_right_in_every_shape(draw, check, backend, shape):
    batch, length, heads, width, teacher_width = shape
    skip_what_is_too_wide(backend, width, teacher_width)
    check(*draw(batch, length, (heads * width, heads * teacher_width)), heads, causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 16, 65])
def test_cross_relation_gives_both_operands_their_gradient(draw, check, length, dtype, causal):
    (left, teacher_left), (right, teacher_right) = (draw(2, length, (24, 48), dtype=dtype) for _ in range(2))
    check((left, right), (teacher_left, teacher_right), 3, causal=causal)


def test_cross_relation_of_a_tensor_with_itself_is_the_self_relation(draw, backend):
    student, teacher = draw(2, 9, (12, 24))
    own = relation_kl(student, teacher, 3, backend=backend.name)
    cross = relation_kl((student, student), (teacher, teacher), 3, backend=backend.name)
    torch.testing.assert_close(cross, own)


def test_eager_definition_is_the_papers_formula():
    student, teacher = torch.randn(2, 6, 8).double(), torch.randn(2, 6, 12).double()
    lengths, heads = torch.tensor([6, 4]), 2
    expected = []
    for x, y, n in zip(student, teacher, lengths.tolist(), strict=True):
        total = 0.0
        for head in range(heads):
            a, b = x[:n, head * 4 : head * 4 + 4], y[:n, head * 6 : head * 6 + 6]
            relations = (a @ a.T / 4**0.5).log_softmax(-1), (b @ b.T / 6**0.5).softmax(-1)
            total += F.kl_div(*relations, reduction="sum")
        expected.append(total / (heads * n))
    actual = eager_relation_kl((student, student), (teacher, teacher), lengths, heads)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_eager_definition_passes_gradcheck(causal):
    left, right = (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teacher, lengths = torch.randn(2, 5, 6).double(), torch.tensor([5, 3])
    for operands in ((left, left), (left, right)):
        assert torch.autograd.gradcheck(
            lambda a, b: eager_relation_kl((a, b), (teacher, teacher), lengths, 2, causal), operands
        )


@pytest.mark.parametrize("backend", [("reference", "cpu")], ids=["reference"], indirect=True)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_written_out_gradient_of_the_reference_is_autograds_in_fp64(draw, check, cross, causal):
    student, teacher = draw(3, 11, (12, 24), dtype=torch.float64)
    mask = torch.rand(3, 11) > 0.3
    student, teacher = ((student, student.flip(0)), (teacher, teacher.flip(1))) if cross else (student, teacher)
    check(student, teacher, 3, mask=mask, causal=causal)


def test_reductions_sum_and_average_over_sequences_empty_ones_included(draw, backend):
    student, teacher = draw(4, 6, (8, 8))
    mask = torch.ones(4, 6, dtype=torch.bool, device=backend.device)
    mask[2] = False
    none, total, mean = (
        relation_kl(student, teacher, 2, mask=mask, reduction=reduction, backend=backend.name)
        for reduction in ("none", "sum", "mean")
    )
    assert none.shape == (4,) and none[2] == 0
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_and_teacher_may_differ_in_dtype(draw, check, dtype):
    for teacher_dtype in DTYPES:
        check(*draw(2, 19, (16, 32), dtype=dtype, teacher_dtype=teacher_dtype), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_accumulated_in_fp32(draw, run, truth, backend, dtype):
    """The loss of half-precision inputs is as exact as fp32: only the inputs and the gradient are rounded."""
    student, teacher = draw(2, 65, (32, 64), dtype=dtype)
    ones = torch.ones(2, device=backend.device)
    losses, _ = run(student, teacher, 2, ones)
    exact, _ = truth(student, teacher, 2, ones)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deviation", [10, 30])
def test_peaked_relations_stay_exact(draw, check, deviation):
    """Logits of this standard deviation; a softmax with one reference for all rows loses its digits here."""
    check(*draw(2, 70, (64, 64), scale=deviation**0.5), 2)  # a score x·y / √d of normal x, y has deviation scale²


def test_student_close_to_the_teacher_keeps_a_small_exact_gradient(draw, check):
    _, teacher = draw(2, 70, (64, 64))
    check(teacher + 1e-3 * torch.randn(2, 70, 64).to(teacher), teacher, 2)


def test_rows_of_very_different_norm_share_a_head(draw, check, backend):
    """The diagonal of the scores spreads over more than 120 nats: a scale common to rows and columns underflows."""
    student, teacher = draw(2, 70, (32, 32))
    norms = torch.linspace(0.05, 8, 70, device=backend.device)[:, None]
    check(student * norms, teacher * norms.flip(0), 2)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 1e4), (torch.float16, 65504)]
)  # fmt: skip
def test_extreme_projections_stay_finite_and_right(draw, check, dtype, largest):
    student, teacher = (largest * x.tanh() for x in draw(2, 33, (16, 32), dtype=torch.float32))
    check(student.to(dtype), teacher.to(dtype), 2)


def test_constant_projections_give_uniform_relations_and_no_loss(backend, run):
    ones = torch.ones(2, device=backend.device)
    for value in (0.0, 1e4):
        x = torch.full((2, 20, 16), value, device=backend.device)
        losses, (grad,) = run(x, x, 2, ones)
        assert losses.abs().max() <= 1e-5 and grad.abs().max() <= 1e-5 * max(value, 1)


def test_results_are_the_same_bits_run_to_run(draw, run, backend):
    student, teacher = draw(3, 70, (32, 32))
    upstream = torch.randn(3).to(backend.device)
    (first, (grad,)), (again, (grad_again,)) = (run(student, teacher, 2, upstream) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(grad, grad_again)
