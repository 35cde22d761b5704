"""attribution_distance gives the right numbers: every backend against the definition in fp64."""

import itertools

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge
from fastkd.ops.attribution_distance import attribution_distance, eager_attribution_distance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, C, L, D, and why; C = 0 is a gradient of three dimensions
SHAPES = {
    "one of everything": (1, 0, 1, 1),
    "primes": (3, 2, 7, 13),
    "one below a vector": (2, 0, 5, 15),
    "one vector": (2, 0, 5, 16),
    "one above two vectors": (2, 3, 4, 33),
    "width 312": (5, 0, 16, 312),
    "one class of one": (4, 1, 9, 24),
    "more tokens than a tile": (2, 2, 300, 20),
    "larger than the caches": (3, 2, 140, 1536),
}
FORMS = {"gradient x input": ("norm", True), "saliency": ("norm", False), "summed": ("sum", True)}
NORMS, KINDS = (None, "l1", "l2"), ("l1", "l2", "smooth_l1")


def drawn(batch, classes, length, width, *, device, dtype=torch.float32, norm="l2", scale=1.0):
    """G, x, and scores of about the size that a student's have."""
    shape = (batch, *(classes,) * bool(classes), length)
    gradient, inputs = torch.randn(*shape, width), torch.randn(batch, length, width)
    teacher = torch.rand(shape) + 0.1
    if norm is not None:
        teacher = teacher / torch.linalg.vector_norm(teacher, ord=int(norm[1]), dim=-1, keepdim=True)
    return (scale * gradient).to(device, dtype), inputs.to(device, dtype), teacher.to(device)


def with_gradients(compute, gradient, inputs, upstream=1.0, dtype=None):
    """The distance, and the gradients of distance · upstream for G and x."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (gradient, inputs) if x is not None]
    loss = compute(*leaves, *(None,) * (2 - len(leaves)))
    return loss.detach(), *torch.autograd.grad(loss * upstream, leaves)


@pytest.fixture
def check(backend, on_poisoned_allocations):
    """check(G, x, teacher, mask=, **options): distance and gradients keep the rule of benchmarks/accuracy.py."""

    def compare(gradient, inputs, teacher, mask=None, upstream=0.7, **options):
        def eager(g, x):
            full = torch.ones(g.shape[0], g.shape[-2], dtype=torch.bool, device=g.device)
            keep = full if mask is None else mask != 0
            g, t = g.masked_fill(~_on(keep, g), 0), teacher.to(g.dtype).masked_fill(~_on(keep, teacher, 0), 0)
            x = None if x is None else x.masked_fill(~keep[..., None], 0)
            return eager_attribution_distance(g, x, t, keep, **options)

        def fused(g, x):
            return attribution_distance(g, x, teacher, mask=mask, backend=backend.name, **options)

        exact = with_gradients(eager, gradient, inputs, upstream, torch.float64)
        in_its_dtype = with_gradients(eager, gradient, inputs, upstream)
        if not all(x.isfinite().all() for x in in_its_dtype):  # where it overflows in fp16, its fp32 form stands in
            in_its_dtype = with_gradients(eager, gradient, inputs, upstream, torch.float32)
        results = with_gradients(fused, gradient, inputs, upstream)
        assert results[0].dtype == (torch.float64 if gradient.dtype == torch.float64 else torch.float32)
        names = ("distance", "gradient of G", "gradient of x")
        noises = (1e-13, *(_noise(gradient, inputs, mask, upstream, **options) for _ in range(2)))
        for name, result, other, truth, noise in zip(names, results, in_its_dtype, exact, noises, strict=False):
            verdict = judge(result, other, truth, noise)
            assert verdict, f"{name}: {verdict}"
        for result, operand in zip(results[1:], (gradient, inputs), strict=False):
            assert result.dtype == operand.dtype and result.shape == operand.shape
        return results

    return compare


def _noise(gradient, inputs, mask, upstream, reduce="norm", norm="l2", kind="l2"):
    """A few units in the last place of one token's ∂â/∂G or ∂â/∂x, which cancels where a sequence is one token."""
    g, x = (1.0 if y is None else y.double().nan_to_num(0) for y in (gradient, inputs))
    product = g if inputs is None else g * (x if g.dim() == 3 else x[:, None])
    if mask is not None:
        product = product.masked_fill(~_on(mask != 0, product), 0)
    sizes = product.sum(-1).norm(dim=-1) if reduce == "sum" else product.norm(dim=(-2, -1))
    smallest = 1.0 if norm is None or not sizes.any() else sizes[sizes > 0].min().item()
    largest = max(abs(y).max().item() for y in (torch.as_tensor(g), torch.as_tensor(x)))
    rounding = FLOORS[torch.float32] * upstream * largest / (smallest * gradient.shape[0] * gradient.shape[-2])
    return rounding + 2**-24 * (gradient.dtype == torch.float16)  # the smallest number of fp16


def _on(keep, x, width=1):
    """The mask (B, L) over x (B, L), (B, C, L), or the same with a width."""
    keep = keep[:, None] if x.dim() - width == 3 else keep
    return keep[..., None] if width else keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_shape_and_form_is_right(check, backend, form, shape, dtype):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(*shape, device=backend.device, dtype=dtype)
    check(gradient, inputs if multiplied else None, teacher, reduce=reduce)


@pytest.mark.parametrize(("norm", "kind"), list(itertools.product(NORMS, KINDS)))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_norm_and_distance_is_right(check, backend, form, norm, kind):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(3, 2, 7, 13, device=backend.device, norm=norm)
    check(gradient, inputs if multiplied else None, teacher, reduce=reduce, norm=norm, kind=kind)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_mask_is_right_and_padding_may_hold_nan(check, backend, shape, kept):
    gradient, inputs, teacher = drawn(*shape, device=backend.device)
    mask = torch.rand(shape[0], shape[2]).to(backend.device) < kept
    mask[0] = False
    for x, width in ((gradient, 1), (inputs, 1), (teacher, 0)):
        x.masked_fill_(~_on(mask, x, width), float("nan"))
    _, of_gradient, of_inputs = check(gradient, inputs, teacher, mask)
    assert not of_gradient.masked_fill(_on(mask, of_gradient), 0).any(), "padding must get a gradient of exactly zero"
    assert not of_inputs[~mask].any() and not of_gradient[0].any()


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64], ids=str)
def test_masks_may_be_integers(check, backend, mask_dtype):
    check(*drawn(5, 0, 6, 8, device=backend.device), (torch.rand(5, 6) > 0.4).to(backend.device, mask_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_accumulated_in_fp32(backend, dtype):
    gradient, inputs, teacher = drawn(9, 0, 33, 96, device=backend.device, dtype=dtype)
    distance = attribution_distance(gradient, inputs, teacher, backend=backend.name)
    mask = torch.ones(9, 33, dtype=torch.bool, device=backend.device)
    exact = eager_attribution_distance(gradient.double(), inputs.double(), teacher.double(), mask)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e12), (torch.float32, 1e-15), (torch.bfloat16, 1e-15),
                                              (torch.float16, 1e4), (torch.float16, 1e-4)])  # fmt: skip
def test_gradients_of_any_size_are_right(check, backend, dtype, scale):
    """A saturated classifier's are tiny: 1 / a times 1 / N would overflow where their product with G does not."""
    gradient, inputs, teacher = drawn(3, 0, 9, 24, device=backend.device, scale=scale)
    check(gradient.to(dtype), inputs.to(dtype), teacher)


def test_a_loss_scale_of_65536_costs_no_accuracy_in_fp16(backend):
    """Unscaled, these gradients are subnormal in fp16: a factor applied before the cast would cost their digits."""
    gradient, inputs, teacher = drawn(32, 0, 64, 48, device=backend.device, dtype=torch.float16)
    mask = torch.ones(32, 64, dtype=torch.bool, device=backend.device)

    def fused(g, x):
        return attribution_distance(g, x, teacher, backend=backend.name)

    def exact(g, x):
        return eager_attribution_distance(g, x, teacher.double(), mask)

    _, found, _ = with_gradients(fused, gradient, inputs, upstream=65536.0)
    _, expected, _ = with_gradients(exact, gradient, inputs, upstream=65536.0, dtype=torch.float64)
    assert (expected / 65536).abs().median() < 0.1 * torch.finfo(torch.float16).smallest_normal
    relative = ((found.double() - expected).abs() / expected.abs()).median().item()
    assert relative < torch.finfo(torch.float16).eps


def test_tokens_without_attribution_get_no_gradient(check, backend):
    gradient, inputs, teacher = drawn(3, 2, 6, 8, device=backend.device)
    gradient[0, :, 2], inputs[1, 3] = 0, 0
    _, of_gradient, of_inputs = check(gradient, inputs, teacher)
    assert not of_gradient[0, :, 2].any() and not of_inputs[1, 3].any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_student_that_explains_nothing_is_apart_and_gets_no_gradient(check, backend, norm):
    gradient, inputs, teacher = drawn(2, 0, 6, 8, device=backend.device, norm=norm)
    distance, of_gradient, of_inputs = check(torch.zeros_like(gradient), inputs, teacher, norm=norm)
    torch.testing.assert_close(distance, teacher.square().mean(), rtol=1e-5, atol=0)
    assert not of_gradient.any() and not of_inputs.any()


def test_a_sequence_that_the_teacher_explains_by_nothing_adds_nothing(check, backend):
    gradient, inputs, teacher = drawn(3, 2, 6, 8, device=backend.device)
    teacher[1], teacher[0, 1] = 0, 0
    gradient[1] = float("nan")
    distance, of_gradient, of_inputs = (
        x for x in with_gradients(
            lambda g, x: attribution_distance(g, x, teacher, backend=backend.name), gradient, inputs
        )
    )  # fmt: skip
    assert distance.isfinite() and not of_gradient[1].any() and not of_inputs[1].any() and not of_gradient[0, 1].any()
    gradient[1] = 1.0
    assert torch.equal(check(gradient, inputs, teacher, upstream=1.0)[0], distance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["NaN", "infinity", "overflow"])
@pytest.mark.parametrize("where", ["gradient", "inputs", "teacher"])
def test_what_is_not_finite_gives_nan_and_no_gradient_to_its_sequence(backend, where, value):
    operands = dict(zip(("gradient", "inputs", "teacher"), drawn(3, 0, 6, 8, device=backend.device), strict=True))
    operands[where][1, 2] = value
    gradient, inputs, teacher = operands.values()

    def fused(g, x):
        return attribution_distance(g, x, teacher, backend=backend.name)

    distance, of_gradient, of_inputs = with_gradients(fused, gradient, inputs)
    assert distance.isnan() and not of_gradient[1].any() and not of_inputs[1].any()
    assert of_gradient.isfinite().all() and of_inputs.isfinite().all() and of_gradient[0].any()


@pytest.mark.parametrize("shape", [(0, 0, 5, 8), (0, 3, 5, 8), (4, 0, 0, 8), (4, 2, 0, 8)], ids=str)
def test_an_empty_batch_has_no_distance_and_an_empty_gradient(backend, shape):
    gradient, inputs, teacher = drawn(*shape, device=backend.device)

    def fused(g, x):
        return attribution_distance(g, x, teacher, backend=backend.name)

    distance, of_gradient, of_inputs = with_gradients(fused, gradient, inputs)
    assert distance.item() == 0 and of_gradient.shape == gradient.shape and of_inputs.shape == inputs.shape


def test_the_exact_distance_of_two_tokens(backend):
    gradient = torch.tensor([[[3.0, 0], [0, -2]]], device=backend.device)
    inputs = torch.tensor([[[1.0, 5], [7, 2]]], device=backend.device)
    teacher = torch.tensor([[0.0, 1.0]], device=backend.device)  # the student's are 3 and 4, normalised 0.6 and 0.8
    distance = attribution_distance(gradient, inputs, teacher, backend=backend.name)
    assert distance.item() == pytest.approx((0.6**2 + 0.2**2) / 2)


def test_the_teachers_own_attributions_are_at_distance_zero(backend):
    gradient, inputs, _ = drawn(3, 2, 7, 12, device=backend.device)
    scores = (gradient * inputs[:, None]).norm(dim=-1)
    teacher = scores / scores.norm(dim=-1, keepdim=True)
    assert attribution_distance(gradient, inputs, teacher, backend=backend.name) < 1e-12


def test_a_batch_is_the_mean_of_its_sequences(backend):
    gradient, inputs, teacher = drawn(4, 2, 6, 8, device=backend.device)
    mask = torch.rand(4, 6).to(backend.device) < 0.6

    def of(rows):
        return attribution_distance(
            gradient[rows], inputs[rows], teacher[rows], mask=mask[rows], backend=backend.name
        )  # fmt: skip

    torch.testing.assert_close(of(slice(None)), sum(of(slice(b, b + 1)) for b in range(4)) / 4)


@pytest.mark.parametrize(("norm", "kind"), list(itertools.product(NORMS, ("l2", "smooth_l1"))))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_reference_passes_gradcheck(form, norm, kind):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(2, 2, 4, 3, device="cpu", dtype=torch.float64, norm=norm)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
    leaves = [x.requires_grad_() for x in (gradient, inputs)][: 1 + multiplied]

    def fused(g, x=None):
        return attribution_distance(
            g, x, teacher.double(), mask=mask, reduce=reduce, norm=norm, kind=kind, backend="reference"
        )  # fmt: skip

    assert torch.autograd.gradcheck(fused, leaves)
