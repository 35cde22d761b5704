"""csrc/cuda/attribution_distance* gives the right numbers: compiled for the CPU, run by an emulation of a block's
threads, against the reference in fp64."""

import ctypes
import itertools

import pytest
import torch

from fastkd.benchmarks.accuracy import FLOORS, judge

REFERENCE = torch.ops.fastkd.attribution_distance_reference.default
fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [fp32, bf16, fp16]
FORMS = {"gradient x input": ("norm", True), "saliency": ("norm", False), "summed": ("sum", True)}
# Below, at and above a run of 16 bytes, a warp's runs and what a warp holds at a time.
WIDTHS = [1, 3, 4, 5, 7, 8, 9, 17, 31, 128, 300, 312, 511, 512, 516, 520, 1030]


@pytest.fixture(scope="module")
def library(compile_on_host):
    library = compile_on_host("attribution_distance")
    library.job.argtypes, library.job.restype = (ctypes.c_int64,) * 3, ctypes.c_int64
    return library


@pytest.fixture
def kernels(library):
    """kernels(G, x, teacher, mask=None, ..., seed=0, processors=1) -> sums and gradients, on poisoned allocations.

    `seed` draws the order in which threads run; of `processors` it depends how the work is cut.
    """

    def run(gradient, inputs, teacher, mask=None, weighted=True, reduce="norm", norm="l2", kind="l2", wanted=None,
            seed=0, processors=1):  # fmt: skip
        library.set_device(processors, seed)
        wanted = (True, inputs is not None) if wanted is None else wanted
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            op = torch.ops.fastkd.attribution_distance_cuda
            return op(gradient, inputs, teacher, mask, weighted, reduce, norm, kind, *wanted)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


@pytest.fixture
def check(kernels):
    """check(G, x, teacher, mask, ...): sums and gradients keep the rule of benchmarks/accuracy.py."""

    def compare(gradient, inputs, teacher, mask=None, weighted=True, reduce="norm", norm="l2", kind="l2", wanted=None,
                noise=0.0, **device):  # fmt: skip
        wanted = (True, inputs is not None) if wanted is None else wanted
        options = (weighted, reduce, norm, kind, wanted)
        results = kernels(gradient, inputs, teacher, mask, *options, **device)

        def reference(dtype=None):
            arguments = (gradient, inputs, teacher, mask)
            arguments = (x if x is None or x.dtype == torch.bool else x.to(dtype or x.dtype) for x in arguments)
            return REFERENCE(*arguments, *options[:-1], *wanted)

        eager, exact = reference(), reference(fp64)
        for name, result, other, truth in zip(("D", "of G", "of x"), results, eager, exact, strict=True):
            verdict = judge(result, other, truth, noise)
            assert verdict, f"{name}: {verdict}"
            assert result.is_contiguous() and result.dtype == other.dtype
        return results

    return compare


def drawn(batch, classes, length, width, dtype=fp32, scale=1.0):
    teacher = torch.rand(batch, classes, length) + 0.1
    teacher = teacher / teacher.norm(dim=-1, keepdim=True)
    gradient, inputs = scale * torch.randn(batch, classes, length, width), torch.randn(batch, length, width)
    return gradient.to(dtype), inputs.to(dtype), teacher


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_width_and_form_is_right(check, form, width, dtype):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(2, 1, 5, width, dtype=dtype)
    check(gradient, inputs if multiplied else None, teacher, weighted=dtype != fp16, reduce=reduce)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 33), (3, 2, 7, 13), (1, 3, 3, 312), (2, 2, 1, 24)], ids=str)
def test_several_classes_are_right(check, shape, dtype):
    gradient, inputs, teacher = drawn(*shape, dtype=dtype)
    # Of one token the derivatives cancel, up to a few units in the last place of what they would be.
    smallest = (gradient.double() * inputs[:, None]).norm(dim=-1).min().item()
    largest = max(gradient.abs().max().item(), inputs.abs().max().item())
    noise = FLOORS[fp32] * largest / smallest if shape[2] == 1 else 0.0
    check(gradient, inputs, teacher, weighted=dtype != fp16, noise=noise)


@pytest.mark.parametrize(("norm", "kind"), list(itertools.product(("none", "l1", "l2"), ("l1", "l2", "smooth_l1"))))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_norm_and_distance_is_right(check, form, norm, kind):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(2, 2, 7, 13)
    check(gradient, inputs if multiplied else None, teacher, reduce=reduce, norm=norm, kind=kind)


@pytest.mark.parametrize("length", [3, 4, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("processors", [1, 2, 132])
def test_lengths_around_a_tile_are_right_however_the_work_is_cut(check, processors, length):
    check(*drawn(7, 1, length, 24), processors=processors)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [13, 24])
def test_padding_may_hold_nan_and_gets_zero(check, width, dtype, kept):
    gradient, inputs, teacher = drawn(6, 2, 30, width, dtype=dtype)
    mask = torch.rand(6, 30) < kept
    mask[1] = False
    gradient.masked_fill_(~mask[:, None, :, None], float("nan"))
    inputs[~mask] = float("inf")
    teacher.masked_fill_(~mask[:, None], float("nan"))
    sums, of_gradient, of_inputs = check(gradient, inputs, teacher, mask, weighted=dtype != fp16)
    assert not sums[1].any() and not of_inputs[~mask].any()
    assert not of_gradient.transpose(1, 2)[~mask].any(), "padding must get a gradient of exactly zero"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_mask_of_any_stride_is_read(check, form):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(4, 2, 9, 24)
    mask = (torch.rand(9, 4) > 0.4).T
    check(gradient, inputs if multiplied else None, teacher, mask, reduce=reduce)


@pytest.mark.parametrize(("dtype", "scale"), [(fp32, 1e12), (fp32, 1e-15), (bf16, 1e-15), (fp16, 1e4), (fp16, 1e-4)])
def test_gradients_of_any_size_are_right(check, dtype, scale):
    check(*drawn(3, 1, 9, 24, dtype=dtype, scale=scale), noise=2**-24 * (dtype == fp16))


VIEWS = {
    "the second half of wider rows": lambda x: torch.cat([torch.full_like(x, float("nan")), x], -1)[..., x.shape[-1] :],
    "one ahead of a run": lambda x: torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape),
    "tokens before sequences": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "one sequence for the whole batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("width", [13, 24])
@pytest.mark.parametrize("of", [(True, False), (False, True), (True, True)], ids=["G", "x", "both"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_at_any_alignment_are_read_in_place_and_their_neighbours_not_at_all(check, view, of, width, dtype):
    gradient, inputs, teacher = drawn(3, 2, 5, width, dtype=dtype)
    gradient, inputs = (view(x) if changed else x for x, changed in zip((gradient, inputs), of, strict=True))
    check(gradient, inputs, teacher)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_wanted_is_written(kernels, wanted):
    operands = drawn(9, 2, 5, 24)
    expected = kernels(*operands)
    sums, *gradients = kernels(*operands, wanted=wanted)
    assert torch.equal(sums, expected[0])
    for found, whole, is_wanted in zip(gradients, expected[1:], wanted, strict=True):
        assert torch.equal(found, whole) if is_wanted else found.shape == (0,)


def test_without_weights_the_gradient_is_that_of_the_sum_of_all_distances(check, kernels):
    operands = drawn(3, 2, 5, 24)
    mask = torch.rand(3, 5) > 0.3
    plain, weighted = (kernels(*operands, mask, weighted) for weighted in (False, True))
    assert torch.equal(plain[0], weighted[0])
    torch.testing.assert_close(plain[2], weighted[2] * 3 * mask.sum(1).clamp(min=1)[:, None, None])


def test_tokens_without_attribution_get_no_gradient(check):
    gradient, inputs, teacher = drawn(3, 2, 6, 8)
    gradient[0, :, 2], inputs[1, 3] = 0, 0
    _, of_gradient, of_inputs = check(gradient, inputs, teacher)
    assert not of_gradient[0, :, 2].any() and not of_inputs[1, 3].any()


@pytest.mark.parametrize("norm", ["none", "l1", "l2"])
def test_a_student_that_explains_nothing_is_apart_and_gets_no_gradient(check, norm):
    gradient, inputs, teacher = drawn(2, 1, 6, 8)
    sums, of_gradient, of_inputs = check(torch.zeros_like(gradient), inputs, teacher, norm=norm)
    assert (sums > 0).all() and not of_gradient.any() and not of_inputs.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["NaN", "infinity", "overflow"])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["gradient", "inputs", "teacher"])
def test_what_is_not_finite_gives_nan_and_no_gradient_to_its_sequence(kernels, where, value):
    operands = drawn(3, 1, 6, 8)
    operands[where][1, ..., 2] = value
    sums, of_gradient, of_inputs = kernels(*operands)
    assert sums.isnan().flatten().tolist() == [False, True, False]
    for x in (of_gradient, of_inputs):
        assert x.isfinite().all() and x[0].any() and x[2].any() and not x[1].any()


def test_a_norm_that_overflows_gives_nan_and_no_gradient(kernels):
    gradient, inputs, teacher = drawn(2, 1, 30, 24)
    gradient[1] *= 2e18  # the scores are below 1e20, the sum of their squares is not
    sums, of_gradient, of_inputs = kernels(gradient, inputs, teacher)
    assert sums.isnan().flatten().tolist() == [False, True]
    assert of_gradient[0].any() and not of_gradient[1].any() and not of_inputs[1].any()


def test_what_the_teacher_explains_by_nothing_adds_nothing(kernels):
    gradient, inputs, teacher = drawn(3, 2, 6, 8)
    teacher[1], teacher[0, 1] = 0, 0
    gradient[1] = float("nan")
    sums, of_gradient, of_inputs = kernels(gradient, inputs, teacher)
    assert sums.isfinite().all() and not sums[1].any() and sums[0, 0] > 0 and sums[0, 1] == 0
    assert not of_gradient[1].any() and not of_inputs[1].any() and not of_gradient[0, 1].any()


def test_neither_the_order_of_the_threads_nor_the_device_changes_a_bit(kernels):
    """So a warp that reads what others wrote waits for it, and no sum depends on chance or on how the work is cut."""
    operands = drawn(9, 2, 50, 40, dtype=bf16)
    mask = torch.rand(9, 50) > 0.3
    first, *others = (
        kernels(*operands, mask, seed=seed, processors=processors)
        for seed, processors in ((1, 1), (5000, 1), (9000, 2), (13000, 132))
    )
    assert all(same(other, first) for other in others)


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_every_sequence_has_its_scores_and_later_its_gradients_once(library, batch, window):
    window = min(window, batch)
    jobs = [library.job(group, batch, window) for group in range(2 * batch)]
    assert sorted(jobs) == list(range(-batch, batch))
    ahead = 0
    for sequence in range(batch):
        scores, gradients = jobs.index(sequence), jobs.index(-1 - sequence)
        assert scores < gradients, "a block would wait for work that comes after its own"
        ahead = max(ahead, sum(job >= 0 for job in jobs[:gradients]) - sequence)
    assert ahead == window, "scores must not run further ahead than the cache holds"


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 1, 0, 8), (2, 0, 3, 8)], ids=str)
def test_of_nothing_there_is_nothing(kernels, shape):
    gradient, inputs, teacher = drawn(*shape)
    sums, of_gradient, of_inputs = kernels(gradient, inputs, teacher)
    assert sums.shape == shape[:2] and not sums.any()
    assert of_gradient.shape == gradient.shape and of_inputs.shape == inputs.shape and not of_inputs.any()


def test_an_option_that_the_kernel_does_not_know_is_named(kernels):
    with pytest.raises(RuntimeError, match="attribution_distance_cuda does not know l3"):
        kernels(*drawn(1, 1, 2, 8), norm="l3")
