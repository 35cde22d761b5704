"""csrc/cuda/cos_nce* gives the right numbers: compiled for the CPU, run by an emulation of a block's threads, against
the definition in fp64."""

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.ops.cos_nce import eager_cos_nce

fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [fp32, bf16, fp16]
# Every class of the kernels, at its limits, and widths that whole loads do not divide.
WIDTHS = [1, 7, 8, 64, 256, 260, 312, 512, 768, 770, 1024, 1030, 1032, 2048, 2056]


@pytest.fixture(scope="module")
def library(compile_on_host):
    return compile_on_host("cos_nce")


def counted_pairs(samples, negatives, mask, classes, classes_of_negatives, own):
    """(positions or nothing, samples, negatives) bool: which is a negative of which sample, one by one."""
    pairs = torch.ones(samples, negatives, dtype=torch.bool)
    if classes is not None:
        pairs &= (classes[:, None] < 0) | (classes[:, None] != classes_of_negatives)
    if own:
        pairs &= ~torch.eye(samples, dtype=torch.bool)
    return pairs if mask is None or not own else pairs & mask.T[:, None]


def by_definition(dtype, student, teacher, negatives=None, mask=None, classes=None, classes_of_negatives=None,
                  weights=None, divisor=1):  # fmt: skip
    """Losses, and the gradient of their weighted sum, pair by pair and by autograd, in `dtype`."""
    own = negatives is None
    student, teacher, pool = (x.to(dtype).transpose(1, 2) for x in (student, teacher, teacher if own else negatives))
    if mask is not None:
        student, teacher = (x.where(mask.T[..., None], 0) for x in (student, teacher))
        pool = teacher if own else pool
    student = student.detach().requires_grad_()
    members = classes if own else classes_of_negatives
    pairs = counted_pairs(student.shape[2], pool.shape[2], mask, classes, members, own)
    losses = eager_cos_nce(student, teacher, pool, pairs.expand(*student.shape[:2], *pairs.shape[-2:])).transpose(1, 2)
    if mask is not None:
        losses = losses.where(mask, 0)
    factor = torch.ones(1, 1) / divisor if weights is None else weights[:, None] / divisor
    (grad,) = torch.autograd.grad((losses * factor.to(dtype)).sum(), student)
    return losses.detach(), grad.transpose(1, 2)


def assert_right(results, *operands, **options):
    losses, grad = results
    student = operands[0]
    exact = by_definition(fp64, *operands, **options)
    eager = next(
        x for x in (by_definition(d, *operands, **options) for d in (student.dtype, fp32)) if x[1].isfinite().all()
    )
    verdict = judge(losses, eager[0], exact[0], noise=FLOORS[fp32])
    assert verdict, f"loss: {verdict}"
    # A few units in the last place of u, which cancels with its part along the student where that is like the teacher.
    norms = torch.linalg.vector_norm(student.double(), dim=-1)
    noise = 4e-7 / norms[norms > 1e-8].min().item() if (norms > 1e-8).any() else 0.0
    verdict = judge(grad, eager[1], exact[1], noise=noise / options.get("divisor", 1))
    assert verdict, f"gradient: {verdict}"
    assert grad.is_contiguous() and grad.dtype == student.dtype


def call_kernels(op_sums, op_losses, student, teacher, negatives=None, mask=None, classes=None,
                 classes_of_negatives=None, weights=None, divisor=1, with_grad=True):  # fmt: skip
    """Sums, losses and gradient by the two schemas, as fastkd.cos_nce calls them."""
    own = negatives is None
    pool, counted, members = (teacher, mask, classes) if own else (negatives, None, classes_of_negatives)
    count = 0 if classes is None else int(max(classes.max(), members.max())) + 2  # nobody belongs to the last one
    sums = op_sums(pool, counted, members, count)
    held = torch.ones(pool.shape[1:3]) if counted is None else counted.float()
    counts = torch.zeros(1 + count, held.shape[1])
    if count:
        counts.index_add_(0, members.long() + 1, held)
    counts[0] = held.sum(0)
    return sums, *op_losses(student, teacher, sums, counts, mask, classes, own, weights, divisor, with_grad)


def draw(*shape, dtype=torch.float32, teacher_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(teacher_dtype or dtype)


@pytest.fixture
def kernels(library):
    """kernels(student, teacher, ..., seed=0) -> sums, losses, gradient, on poisoned allocations.

    `seed` draws the order in which threads run.
    """

    def run(*operands, seed=0, **options):
        library.set_seed(seed)
        op = torch.ops.fastkd
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return call_kernels(op.cos_nce_sums_cuda, op.cos_nce_cuda, *operands, **options)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


@pytest.fixture
def check(kernels):
    """check(student, teacher, ...): losses and gradient keep the rule of benchmarks/accuracy.py."""

    def compare(*operands, **options):
        _, *results = kernels(*operands, **options)
        assert_right(results, *operands, **options)

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_is_right(check, width, dtype):
    check(*draw(1, 5, 1, width, dtype=dtype))


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 17, 33, 200])
def test_numbers_of_samples_around_a_chunk_are_right(check, samples):
    check(*draw(1, samples, 1, 24))


def test_layers_and_positions_are_independent(check):
    check(*draw(2, 40, 3, 24, dtype=bf16))


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 13])
def test_student_and_teacher_may_differ_in_dtype(check, width, dtype, teacher_dtype):
    check(*draw(1, 9, 1, width, dtype=dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_what_the_mask_leaves_out_may_hold_nan_and_gets_zero(check, dtype):
    student, teacher = draw(1, 40, 3, 24, dtype=dtype)
    mask = torch.rand(40, 3) > 0.4
    mask[7], mask[:, 2] = False, False
    student[:, ~mask], teacher[:, ~mask] = 0, 0
    weights = 1 / mask.sum(1).clamp(min=1).float()
    expected = by_definition(fp64, student, teacher, mask=mask, weights=weights)
    check(student, teacher, mask=mask, weights=weights, divisor=40)
    assert not expected[1][:, ~mask].any()


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_nan_behind_the_mask_reaches_nothing(kernels, dtype):
    student, teacher = draw(1, 40, 3, 24, dtype=dtype)
    mask = torch.rand(40, 3) > 0.4
    expected = kernels(student, teacher, mask=mask)
    student[:, ~mask], teacher[:, ~mask] = float("nan"), float("nan")
    results = kernels(student, teacher, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not results[1][:, ~mask].any() and not results[2][:, ~mask].any()


@pytest.mark.parametrize("classes", [1, 3, 60])
@pytest.mark.parametrize("samples", [2, 45, 150])
def test_samples_of_a_class_are_no_negatives_of_each_other(check, samples, classes):
    of_samples = torch.randint(-1, classes, (samples,), dtype=torch.int32)
    of_samples[0] = classes - 1
    check(*draw(2, samples, 2, 13), mask=torch.rand(samples, 2) > 0.2, classes=of_samples)


def test_classes_that_reach_over_many_chunks_are_right(check):
    check(*draw(1, 300, 1, 24), classes=(torch.arange(300, dtype=torch.int32) // 100).sub(1))


@pytest.mark.parametrize("excluding", [False, True], ids=["all", "excluding"])
def test_explicit_negatives_are_right(check, excluding):
    classes = {}
    if excluding:
        classes = {"classes": torch.randint(-1, 3, (20,), dtype=torch.int32).clamp(max=2)}
        classes["classes_of_negatives"] = torch.randint(-1, 3, (50,), dtype=torch.int32)
    check(*draw(1, 20, 1, 24), torch.randn(1, 50, 1, 24), **classes)


def test_negatives_of_each_sample_are_a_transposed_view(check):
    student, teacher = (x.transpose(1, 2) for x in draw(1, 30, 1, 24))
    check(student, teacher, torch.randn(1, 30, 7, 24).transpose(1, 2))


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("offset", [1, 8])
def test_views_at_any_alignment_are_read_in_place_and_their_neighbours_not_at_all(check, offset, dtype):
    operands = []
    for x in draw(2, 9, 2, 24, dtype=dtype):
        wide = torch.full((2, 9, 2, 40), float("nan"), dtype=dtype)
        wide[..., offset : offset + 24] = x
        operands.append(wide[..., offset : offset + 24])
    check(*operands)


def test_weights_of_stride_zero_are_read(check):
    check(*draw(1, 9, 1, 24), weights=torch.full((1,), 0.25).expand(9), divisor=3)


def test_zero_vectors_have_no_direction_and_no_gradient(kernels):
    student, teacher = draw(1, 6, 1, 24)
    student[0, 1], teacher[0, 2] = 1e-9 / 24**0.5, 0
    sums, losses, grad = kernels(student, teacher)
    others = torch.nn.functional.normalize(teacher[0, [0, 1, 3, 4, 5], 0], dim=-1).sum(0)
    torch.testing.assert_close(sums[0, 0, 0], others)
    assert losses[0, 1, 0] == 2 and not grad[0, 1].any() and grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_a_norm_that_is_not_finite_gives_nan(kernels, value):
    student, teacher = draw(1, 6, 1, 24)
    student[0, 1, 0, 3] = value
    _, losses, grad = kernels(student, teacher)
    assert losses[0, 1].isnan() and grad[0, 1].isnan().any() and losses[0, 2:].isfinite().all()
    teacher[0, 1, 0, 3] = value
    assert kernels(student, teacher)[0].isnan().any()


@pytest.mark.parametrize("classes", [None, torch.zeros(6, dtype=torch.int32)], ids=["alone", "all of one class"])
def test_without_negatives_the_pair_itself_remains(kernels, classes):
    student, teacher = draw(1, 1 if classes is None else 6, 1, 24)
    _, losses, _ = kernels(student, teacher, classes=classes)
    expected = 2 - 1.5 * torch.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(losses, expected)


def test_no_order_of_the_threads_changes_a_bit(kernels):
    """So there is a barrier wherever two warps meet, and no sum whose order is left to chance."""
    operands = draw(1, 150, 1, 300, dtype=bf16)
    classes = torch.randint(-1, 9, (150,), dtype=torch.int32)
    first, *others = (kernels(*operands, classes=classes, seed=seed) for seed in (1, 1000, 2000))
    assert all(torch.equal(x, y) for other in others for x, y in zip(other, first, strict=True))


def test_without_a_gradient_there_is_the_same_loss_and_nothing_else(kernels):
    operands = draw(1, 9, 1, 24)
    _, losses, _ = kernels(*operands)
    _, alone, grad = kernels(*operands, with_grad=False)
    assert torch.equal(losses, alone) and grad.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 3, 1, 8), (2, 0, 3, 8), (2, 3, 0, 8)], ids=str)
def test_of_nothing_there_is_nothing(kernels, shape):
    sums, losses, grad = kernels(*draw(*shape))
    assert not sums.any() and sums.shape == (shape[0], 1, *shape[2:])
    assert losses.shape == shape[:3] and grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 8, 4099])
def test_a_gradient_is_scaled_where_it_lies_and_rounded_once(library, elements, dtype):
    grad = torch.randn(elements, dtype=dtype)
    expected = (grad.float() * 0.3).to(dtype)
    torch.ops.fastkd.scale_gradient_cuda(grad, torch.tensor(0.3))
    assert torch.equal(grad, expected)
    torch.ops.fastkd.scale_gradient_cuda(grad, torch.tensor(1.0))
    assert torch.equal(grad, expected)
