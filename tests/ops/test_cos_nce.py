"""cos_nce gives the right numbers: every backend against the pairwise definition in fp64."""

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.benchmarks.kernels.cos_nce import by_definition, collapsed
from fastkd.ops import cos_nce
from fastkd.ops.cos_nce import eager_cos_nce

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, D, and why
VECTORS = {
    "one of everything": (1, 1),
    "two samples, one number": (2, 1),
    "primes": (7, 13),
    "one below a vector": (5, 15),
    "one vector": (5, 16),
    "one above a vector": (5, 17),
    "one below two vectors": (3, 31),
    "one above two vectors": (3, 33),
    "width 312": (65, 312),
    "width 768": (33, 768),
    "several chunks of samples, each summed in two levels": (700, 96),
}
# B, L, D
TOKENS = {
    "one of everything": (1, 1, 1),
    "primes": (5, 7, 13),
    "one position": (6, 1, 16),
    "one sample": (1, 9, 16),
    "several blocks of positions": (3, 43, 768),
    "several chunks and blocks": (150, 21, 200),
}


def drawn(*shape, device, dtype=torch.float32, teacher_dtype=None, scale=1.0):
    student, teacher = (scale * torch.randn(shape) for _ in range(2))
    return student.to(device, dtype), teacher.to(device, teacher_dtype or dtype)


def with_gradient(compute, student, upstream, dtype=None):
    """Losses, and the gradient of (losses · upstream).sum()."""
    leaf = student.detach().to(dtype or student.dtype).requires_grad_()
    losses = compute(leaf)
    return losses.detach(), torch.autograd.grad(losses, leaf, upstream.to(losses.dtype).expand_as(losses))[0]


@pytest.fixture
def check(backend, on_poisoned_allocations):
    """check(student, teacher, **options): losses and gradient keep the rule of benchmarks/accuracy.py."""

    def compare(student, teacher, upstream=None, **options):
        def expected(dtype):
            negatives = options.get("negatives")
            rest = options | ({} if negatives is None else {"negatives": negatives.to(dtype)})
            return with_gradient(lambda x: by_definition(x, teacher.to(dtype), **rest), student, upstream, dtype)

        def fused(x):
            return cos_nce(x, teacher, reduction="none", backend=backend.name, **options)

        if upstream is None:
            upstream = torch.randn((), device=student.device)
        exact, eager = expected(torch.float64), expected(student.dtype)
        if not all(x.isfinite().all() for x in eager):  # where it overflows in fp16, its fp32 form stands in
            eager = expected(torch.float32)
        losses, grad = with_gradient(fused, student, upstream)
        assert losses.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
        assert grad.dtype == student.dtype and grad.shape == student.shape
        # A loss is a difference of numbers of the size of one, a gradient of numbers of the size of 1 / ‖s‖.
        norms = student.double().nan_to_num(0, 0, 0).norm(dim=-1)
        smallest = norms[norms > 1e-8].min().item() if (norms > 1e-8).any() else 1.0
        verdict = judge(losses, eager[0], exact[0], noise=2 * FLOORS[losses.dtype])
        assert verdict, f"loss: {verdict}"
        verdict = judge(grad, eager[1], exact[1], noise=FLOORS[losses.dtype] * upstream.abs().max().item() / smallest)
        assert verdict, f"gradient: {verdict}"
        return losses, grad

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", VECTORS.values(), ids=VECTORS)
def test_vectors_are_right_in_every_shape(check, backend, shape, dtype):
    check(*drawn(*shape, device=backend.device, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TOKENS.values(), ids=TOKENS)
def test_tokens_are_right_in_every_shape(check, backend, shape, dtype):
    check(*drawn(*shape, device=backend.device, dtype=dtype), tokens=True)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("shape", TOKENS.values(), ids=TOKENS)
def test_any_mask_is_right_and_padding_may_hold_nan(check, backend, shape, kept):
    student, teacher = drawn(*shape, device=backend.device)
    mask = torch.rand(shape[:2]).to(backend.device) < kept
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    losses, grad = check(student, teacher, mask=mask)
    assert not grad[~mask].any(), "padding must get a gradient of exactly zero"
    assert not losses[~mask.any(1)].any(), "a sample without tokens has no loss"


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64], ids=str)
def test_masks_may_be_integers(check, backend, mask_dtype):
    student, teacher = drawn(5, 6, 8, device=backend.device)
    check(student, teacher, mask=(torch.rand(5, 6) > 0.4).to(backend.device, mask_dtype))


@pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "tokens"])
def test_layers_in_one_call_are_layers_one_by_one(check, backend, tokens):
    shape = (3, 5, 7, 24) if tokens else (3, 5, 24)
    student, teacher = drawn(*shape, device=backend.device)
    together, grad = check(student, teacher, tokens=tokens)
    assert together.shape == (3, 5)
    for layer in range(3):
        alone, alone_grad = check(student[layer], teacher[layer], tokens=tokens, upstream=torch.tensor(1.0))
        torch.testing.assert_close(alone, together[layer])
        assert alone_grad.shape == grad[layer].shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 24), (4, 24), (1, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("layers", [(), (2,)], ids=["one layer", "two layers"])
def test_explicit_negatives_for_all_samples(check, backend, layers, shape, dtype):
    student, teacher = drawn(*layers, 5, 24, device=backend.device, dtype=dtype)
    check(student, teacher, tokens=False, negatives=torch.randn(*layers, *shape).to(backend.device, dtype))


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("layers", [(), (2,)], ids=["one layer", "two layers"])
def test_explicit_negatives_of_each_sample(check, backend, layers, count):
    student, teacher = drawn(*layers, 5, 24, device=backend.device)
    negatives = torch.randn(*layers, 5, count, 24).to(backend.device)
    check(student, teacher, tokens=False, negatives=negatives)
    exclude = torch.arange(5), torch.randint(5, (5, count))
    check(student, teacher, tokens=False, negatives=negatives, exclude=exclude)


IDS = {
    "all different": [4, 1, 7, 0, 9, 3],
    "a pair": [4, 1, 7, 1, 9, 3],
    "several classes": [-5, 1, -5, 1, 9, -5],
    "large and negative": [2**62, -(2**62), 2**62, 0, 0, 1],
    "all the same": [3, 3, 3, 3, 3, 3],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_samples_of_equal_ids_are_no_negatives_of_each_other(check, backend, ids):
    student, teacher = drawn(6, 24, device=backend.device)
    check(student, teacher, exclude=torch.tensor(ids))
    check(student, teacher, exclude=torch.tensor(ids, device=backend.device))


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_ids_hold_at_every_position_and_in_every_layer(check, backend, ids):
    student, teacher = drawn(2, 6, 5, 24, device=backend.device)
    mask = torch.rand(6, 5).to(backend.device) > 0.4
    check(student, teacher, mask=mask, exclude=torch.tensor(ids))


@pytest.mark.parametrize("of_negatives", [[1, 9, 1, 5], [8, 8, 8, 8], [4, 1, 7, 3]], ids=str)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_explicit_negatives_of_the_samples_id_do_not_count(check, backend, ids, of_negatives):
    student, teacher = drawn(6, 24, device=backend.device)
    negatives = torch.randn(4, 24).to(backend.device)
    check(student, teacher, negatives=negatives, exclude=(torch.tensor(ids), torch.tensor(of_negatives)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_and_teacher_may_differ_in_dtype(check, backend, dtype):
    for teacher_dtype in DTYPES:
        check(*drawn(9, 40, device=backend.device, dtype=dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_accumulated_in_fp32(backend, dtype):
    student, teacher = drawn(65, 96, device=backend.device, dtype=dtype)
    losses = cos_nce(student, teacher, reduction="none", backend=backend.name)
    exact = by_definition(student.double(), teacher.double())
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e4), (torch.float32, 1e15), (torch.bfloat16, 1e15),
                                                (torch.float16, 65504), (torch.float32, 1e-6)])  # fmt: skip
def test_extreme_lengths_stay_finite_and_right(check, backend, dtype, largest):
    student, teacher = (largest * x.tanh() for x in drawn(9, 96, device=backend.device))
    check(student.to(dtype), teacher.to(dtype))


def test_a_student_parallel_to_its_teacher_keeps_a_small_exact_gradient(check, backend):
    _, teacher = drawn(9, 96, device=backend.device)
    check(3 * teacher + 1e-4 * torch.randn(9, 96).to(backend.device), teacher)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [0.0, 1e-10])
def test_zero_vectors_have_the_cosine_zero_and_no_gradient(check, backend, which, value):
    student, teacher = drawn(5, 24, device=backend.device)
    for name, x in (("student", student), ("teacher", teacher)):
        if which in (name, "both"):
            x[2] = value
    losses, grad = check(student, teacher)
    assert losses.isfinite().all() and grad.isfinite().all()
    if which != "teacher":
        assert losses[2] == 2 and not grad[2].any()


def test_a_batch_of_one_has_its_positive_part_alone(check, backend):
    student, teacher = drawn(1, 24, device=backend.device)
    losses, _ = check(student, teacher)
    torch.testing.assert_close(losses, 2 - 1.5 * torch.cosine_similarity(student, teacher))


def test_everything_excluded_leaves_the_positive_part(check, backend):
    student, teacher = drawn(4, 24, device=backend.device)
    losses, _ = check(student, teacher, exclude=torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(losses, 2 - 1.5 * torch.cosine_similarity(student, teacher))


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (4, 0, 8), (0, 3, 5, 8)], ids=str)
def test_an_empty_batch_has_no_loss_and_an_empty_gradient(backend, shape):
    student, teacher = drawn(*shape, device=backend.device)
    student.requires_grad_()
    loss = cos_nce(student, teacher, tokens=len(shape) > 2, backend=backend.name)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and grad.shape == student.shape


def test_the_exact_vectors_of_two_samples(backend):
    student, teacher = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])
    student, teacher = student.to(backend.device), teacher.to(backend.device)
    assert cos_nce(student, teacher, reduction="none", backend=backend.name).tolist() == [0.5, 2.5]
    assert cos_nce(student, teacher, backend=backend.name).item() == 1.5


@pytest.mark.parametrize(("positive", "negative", "loss"), [(1, -1, 0), (-1, 1, 4), (0, 0, 2)])
def test_the_extremes(backend, positive, negative, loss):
    x = torch.tensor([1.0, 0, 0], device=backend.device)
    orthogonal = torch.tensor([0, 0, 1.0], device=backend.device)
    teacher = positive * x if positive else orthogonal
    negatives = (negative * x if negative else orthogonal).expand(5, 3)
    assert cos_nce(x[None], teacher[None], negatives=negatives, backend=backend.name).item() == pytest.approx(loss)


@pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "tokens"])
def test_reductions_average_over_the_batch_and_sum_over_layers(backend, tokens):
    student, teacher = drawn(*((2, 5, 6, 8) if tokens else (2, 5, 8)), device=backend.device)
    mask = torch.rand(5, 6).to(backend.device) > 0.5 if tokens else None
    none, total, mean = (
        cos_nce(student, teacher, mask=mask, tokens=tokens, reduction=reduction, backend=backend.name)
        for reduction in ("none", "sum", "mean")
    )
    assert none.shape == (2, 5)
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.mean(1).sum())


def test_the_definition_is_the_papers_formula():
    student, teacher = torch.randn(4, 6).double(), torch.randn(4, 6).double()

    def distance(x, y):
        return 1 - x @ y / (x.norm() * y.norm())

    expected = []
    for b in range(4):
        positive = distance(teacher[b], student[b])
        terms = [2 - (distance(teacher[i], student[b]) - positive) for i in range(4) if i != b]
        expected.append(sum(terms) / (2 * len(terms)) + positive)
    pairs = ~torch.eye(4, dtype=torch.bool)
    actual = eager_cos_nce(student, teacher, teacher, pairs)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=0)


def test_the_definition_passes_gradcheck():
    student, teacher = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6).double()
    negatives, pairs = torch.randn(4, 3, 6).double(), torch.rand(4, 3) > 0.3
    assert torch.autograd.gradcheck(lambda x: eager_cos_nce(x, teacher, negatives, pairs), student)


@pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "tokens"])
def test_the_benchmarks_collapsed_form_is_the_definition(tokens):
    student, teacher = (x.double() for x in drawn(*((6, 5, 8) if tokens else (6, 8)), device="cpu"))
    torch.testing.assert_close(collapsed(student, teacher), by_definition(student, teacher, tokens=tokens).mean())


@pytest.mark.parametrize("backend", [("reference", "cpu")], ids=["reference"], indirect=True)
@pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "tokens"])
def test_written_out_gradient_of_the_reference_is_autograds_in_fp64(check, backend, tokens):
    student, teacher = drawn(*((2, 6, 5, 8) if tokens else (2, 6, 8)), device="cpu", dtype=torch.float64)
    mask = torch.rand(6, 5) > 0.3 if tokens else None
    check(student, teacher, mask=mask, tokens=tokens, exclude=torch.tensor([1, 2, 1, 3, 4, 1]))
