"""The Triton kernels against the reference in fp64, on CPU tensors; started by ../test_interpreted.py."""

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off", allow_module_level=True)

from fastkd.benchmarks.accuracy import judge
from fastkd.kernels import attribution_distance as triton_kernels

fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
REFERENCE = torch.ops.fastkd.attribution_distance_reference.default
FORMS = {"gradient x input": ("norm", True), "saliency": ("norm", False), "summed": ("sum", True)}


def drawn(batch, classes, length, width, dtype=fp32):
    teacher = torch.rand(batch, classes, length) + 0.1
    teacher = teacher / teacher.norm(dim=-1, keepdim=True)
    return torch.randn(batch, classes, length, width).to(dtype), torch.randn(batch, length, width).to(dtype), teacher


@pytest.fixture
def check(monkeypatch):
    """check(G, x, teacher, mask, weighted, ...): sums and gradients keep the rule of benchmarks/accuracy.py."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))

    def compare(gradient, inputs, teacher, mask=None, weighted=True, reduce="norm", norm="l2", kind="l2", wanted=None):
        wanted = (True, inputs is not None) if wanted is None else wanted
        options = (weighted, reduce, norm, kind, *wanted)
        results = triton_kernels.attribution_distance(gradient, inputs, teacher, mask, *options)

        def reference(dtype):
            arguments = (gradient, inputs, teacher, mask)
            arguments = (x if x is None or x.dtype == torch.bool else x.to(dtype) for x in arguments)
            return REFERENCE(*arguments, *options)

        eager = REFERENCE(gradient, inputs, teacher, mask, *options)
        for name, result, other, truth in zip(("D", "of G", "of x"), results, eager, reference(fp64), strict=True):
            verdict = judge(result, other, truth)
            assert verdict, f"{name}: {verdict}"
            assert result.is_contiguous() and result.dtype == other.dtype
        return results

    return compare


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 2, 5, 13), (2, 1, 40, 24), (1, 3, 3, 300)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_shape_and_form_is_right(check, form, shape, dtype):
    reduce, multiplied = form
    gradient, inputs, teacher = drawn(*shape, dtype=dtype)
    check(gradient, inputs if multiplied else None, teacher, weighted=dtype != fp16, reduce=reduce)


@pytest.mark.parametrize(("norm", "kind"), list(itertools.product(("none", "l1", "l2"), ("l1", "l2", "smooth_l1"))))
@pytest.mark.parametrize("reduce", ["norm", "sum"])
def test_every_norm_and_distance_is_right(check, reduce, norm, kind):
    check(*drawn(2, 2, 7, 13), reduce=reduce, norm=norm, kind=kind)


def test_padding_may_hold_nan_and_gets_zero(check):
    gradient, inputs, teacher = drawn(4, 2, 30, 24)
    mask = torch.rand(4, 30) < 0.5
    mask[1] = False
    gradient.masked_fill_(~mask[:, None, :, None], float("nan"))
    inputs[~mask] = float("inf")
    teacher.masked_fill_(~mask[:, None], float("nan"))
    sums, of_gradient, of_inputs = check(gradient, inputs, teacher, mask)
    assert not sums[1].any() and not of_inputs[~mask].any() and not of_gradient[1].any()


def test_more_tokens_than_a_span_are_added_up(check):
    check(*drawn(1, 1, 600, 16))


def test_rows_wider_than_a_program_are_read_block_by_block(check, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_WIDEST", 64)
    check(*drawn(2, 2, 5, 150))


@pytest.mark.parametrize("offset", [1, 8])
def test_views_at_any_alignment_are_read_in_place(check, offset):
    gradient, inputs, teacher = drawn(2, 2, 5, 24)
    wide_g, wide_x = torch.full((2, 2, 5, 40), float("nan")), torch.full((2, 5, 40), float("nan"))
    wide_g[..., offset : offset + 24], wide_x[..., offset : offset + 24] = gradient, inputs
    check(wide_g[..., offset : offset + 24], wide_x[..., offset : offset + 24], teacher)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_wanted_is_written(check, wanted):
    _, *gradients = check(*drawn(2, 2, 5, 24), wanted=wanted)
    assert [bool(x.numel()) for x in gradients] == list(wanted)


def test_what_is_not_finite_gives_nan_and_no_gradient_and_what_is_not_said_nothing(check):
    gradient, inputs, teacher = drawn(4, 1, 5, 24)
    gradient[1, 0, 2, 3], inputs[2, 1, 1] = float("nan"), 1e30
    teacher[3] = 0
    sums, of_gradient, of_inputs = triton_kernels.attribution_distance(
        gradient, inputs, teacher, None, True, "norm", "l2", "l2", True, True
    )
    assert sums.isnan().flatten().tolist() == [False, True, True, False] and sums[3] == 0
    for x in (of_gradient, of_inputs):
        assert x.isfinite().all() and x[0].any() and not x[1:].any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 1, 0, 8)], ids=str)
def test_of_nothing_there_is_nothing(check, shape):
    sums, *_ = check(*drawn(*shape))
    assert not sums.any()
