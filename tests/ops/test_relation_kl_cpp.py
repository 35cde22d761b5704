"""The C++ kernel against the definition in fp64, in every mode, layout and size class that it treats differently."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.benchmarks.harness import peak_extra_bytes
from fastkd.ops import backends
from fastkd.ops.relation_kl import eager_relation_kl

pytestmark = pytest.mark.skipif(backends.cpu_library_missing is not None, reason=str(backends.cpu_library_missing))

# The kernel works in tiles of 64 tokens whose last one is rounded up to 16: one token, one off each of these, several
# tiles, and sequences of different size classes in one batch.
LENGTHS = [(1,), (2, 1), (15, 16, 17), (63, 64, 65), (5, 0, 130), (128, 97)]
WIDTHS = [(16, 16), (32, 64), (26, 64), (2, 6), (128, 33)]  # of one head: student, teacher
MODES = ["self", "self causal", "cross", "cross causal"]


def tensors(lengths, num_heads, widths, mode, dtypes=(torch.float32, torch.float32), scale=1.0):
    """Padded student and teacher, as relation_kl takes them, the padding poisoned with NaN; and the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(max(lengths), 1)) < torch.tensor(lengths)[:, None]

    def operand(width, dtype):
        x = torch.randn(*mask.shape, num_heads * width, generator=generator) * scale
        return x.masked_fill(~mask[:, :, None], math.nan).to(dtype)

    count = 2 if mode.startswith("cross") else 1
    return [[operand(width, dtype) for _ in range(count)] for width, dtype in zip(widths, dtypes, strict=True)], mask


def expected(student, teacher, mask, num_heads, causal, dtype):
    """Losses (B,) and student gradients of their sum by the definition, one sequence at a time, computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in student]
    losses = []
    for b, valid in enumerate(mask):
        if not valid.any():
            losses.append(torch.zeros((), dtype=dtype))
            continue
        pairs = [[x[b][valid][None] for x in (operands[0], operands[-1])] for operands in (leaves, teacher)]
        pairs[1] = [x.to(dtype) for x in pairs[1]]
        losses.append(eager_relation_kl(*pairs, valid.sum()[None], num_heads, causal)[0])
    losses = torch.stack(losses)
    if losses.requires_grad:
        losses.sum().backward()
    return losses.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def computed(student, teacher, num_heads, **options):
    leaves = [x.detach().requires_grad_() for x in student]
    pick = (lambda xs: xs[0]) if len(leaves) == 1 else tuple
    losses = fastkd.relation_kl(pick(leaves), pick(teacher), num_heads, reduction="none", backend="cpp", **options)
    losses.sum().backward()
    return losses.detach(), [x.grad for x in leaves]


def assert_as_exact_as_eager(actual, student, teacher, mask, num_heads, causal):
    """Twice the error that eager fp32 makes on the same inputs, plus a floor; gradients are rounded to their dtype."""
    truth, eager = (expected(student, teacher, mask, num_heads, causal, d) for d in (torch.float64, torch.float32))
    rounding = torch.finfo(student[0].dtype).eps
    results = [("loss", actual[0], truth[0], eager[0], 1e-6)]
    for side, *grads in zip(("left", "right"), actual[1], truth[1], eager[1], strict=False):
        size = grads[1].abs().max().item()
        results.append((f"{side} gradient", *grads, (rounding if rounding > 1e-6 else 4e-6) * size + 1e-9))
    for name, value, true, own, floor in results:
        assert value.shape == true.shape
        error, allowed = (value.double() - true).abs().max().item(), (own.double() - true).abs().max().item()
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, eager fp32 {allowed:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_core_loss_and_gradient_match_the_definition_for_odd_lengths(lengths, mode):
    (student, teacher), mask = tensors(lengths, 2, (16, 24), mode)
    actual = computed(student, teacher, 2, mask=mask, causal="causal" in mode)
    assert_as_exact_as_eager(actual, student, teacher, mask, 2, "causal" in mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_core_any_head_width(widths, mode):
    (student, teacher), mask = tensors((70, 9), 3, widths, mode)
    actual = computed(student, teacher, 3, mask=mask, causal="causal" in mode)
    assert_as_exact_as_eager(actual, student, teacher, mask, 3, "causal" in mode)


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_core_student_and_teacher_of_any_dtype(student_dtype, teacher_dtype):
    for mode in ("self", "cross causal"):
        (student, teacher), mask = tensors((90, 33), 2, (26, 32), mode, (student_dtype, teacher_dtype))
        actual = computed(student, teacher, 2, mask=mask, causal="causal" in mode)
        assert actual[0].dtype == torch.float32
        assert actual[1][0].dtype == student_dtype
        assert_as_exact_as_eager(actual, student, teacher, mask, 2, "causal" in mode)


@pytest.mark.parametrize("mode", MODES)
def test_sequences_of_several_tiles(mode):
    (student, teacher), mask = tensors((700, 380), 2, (16, 40), mode)  # 700 is too long for the symmetric form to keep
    actual = computed(student, teacher, 2, mask=mask, causal="causal" in mode)
    assert_as_exact_as_eager(actual, student, teacher, mask, 2, "causal" in mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("widths", [(16, 24), (96, 64)], ids=str)
def test_a_sequence_too_long_to_keep_its_scores(widths, mode):
    (student, teacher), mask = tensors((2600, 70), 1, widths, mode)
    actual = computed(student, teacher, 1, mask=mask, causal="causal" in mode)
    assert_as_exact_as_eager(actual, student, teacher, mask, 1, "causal" in mode)


@pytest.mark.parametrize("mode", MODES)
def test_masks_with_holes_and_padding_on_the_left(mode):
    (student, teacher), _ = tensors((80, 80), 2, (16, 16), mode)
    mask = torch.rand(2, 80, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1] = torch.arange(80) >= 30
    student, teacher = ([x.masked_fill(~mask[:, :, None], math.nan) for x in xs] for xs in (student, teacher))
    actual = computed(student, teacher, 2, mask=mask, causal="causal" in mode)
    assert_as_exact_as_eager(actual, student, teacher, mask, 2, "causal" in mode)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_equal_padded_ones(mode):
    lengths = (40, 0, 65, 1)
    (student, teacher), mask = tensors(lengths, 2, (16, 24), mode)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    spare = 7  # rows behind the last sequence
    packed = [
        [torch.cat([x[mask], x.new_full((spare, x.shape[-1]), math.nan)]) for x in xs] for xs in (student, teacher)
    ]
    losses, grads = computed(*packed, 2, cu_seqlens=offsets, causal="causal" in mode)
    padded_losses, padded_grads = computed(student, teacher, 2, mask=mask, causal="causal" in mode)
    assert torch.equal(losses, padded_losses)
    for grad, padded in zip(grads, padded_grads, strict=True):
        assert torch.equal(grad[:-spare], padded[mask])
        assert not grad[-spare:].any()


def test_strided_inputs_are_read_in_place():
    fused = torch.randn(2, 50, 3 * 48, generator=torch.Generator().manual_seed(0))
    views = {
        "a slice of a fused projection": fused[:, :, 48:96],
        "batch and length swapped": fused[:, :, :48].transpose(0, 1).contiguous().transpose(0, 1),
        "one sequence for the whole batch": fused[:1, :, :48].expand(2, -1, -1),
    }
    teacher = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(1))
    for name, view in views.items():
        dense = computed([view.contiguous()], [teacher], 3)
        strided = computed([view], [teacher], 3)
        assert torch.equal(dense[0], strided[0]) and torch.equal(dense[1][0], strided[1][0]), name
        swapped = fastkd.relation_kl(teacher, view, 3, backend="cpp"), fastkd.relation_kl(teacher, view.contiguous(), 3)
        assert torch.equal(*swapped), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 3.0, 100.0])
def test_core_logits_from_tiny_to_ten_thousand(scale, causal):
    (student, teacher), mask = tensors((100, 31), 2, (16, 16), "self", scale=scale)
    actual = computed(student, teacher, 2, mask=mask, causal=causal)
    assert all(torch.isfinite(x).all() for x in (actual[0], *actual[1]))
    assert_as_exact_as_eager(actual, student, teacher, mask, 2, causal)


@pytest.mark.parametrize("deviation", [10.0, 20.0, 30.0])
def test_core_self_relations_whose_diagonal_spreads_widely(deviation):
    # Tokens of very different norm: the logits' diagonal runs over hundreds of nats.
    (student, teacher), mask = tensors((150, 64), 2, (16, 16), "self")
    size = torch.rand(2, 150, 1, generator=torch.Generator().manual_seed(2)) * math.sqrt(deviation)
    student, teacher = [student[0] * size], [teacher[0] * size.flip(1)]
    actual = computed(student, teacher, 2, mask=mask)
    assert_as_exact_as_eager(actual, student, teacher, mask, 2, False)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_core_a_teacher_that_is_nearly_the_student(noise):
    (student, _), mask = tensors((100, 31), 2, (16, 16), "self", scale=2.0)
    teacher = [student[0] + noise * torch.randn(student[0].shape, generator=torch.Generator().manual_seed(3))]
    actual = computed(student, teacher, 2, mask=mask)
    assert_as_exact_as_eager(actual, student, teacher, mask, 2, False)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_nan_in_a_valid_token_reaches_the_loss_of_its_sequence_alone(name):
    operands = {n: torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0)) for n in ("student", "teacher")}
    operands[name][1, 66, 5] = math.nan
    starts, lengths = torch.zeros(2, dtype=torch.int64), torch.full((2,), 70, dtype=torch.int32)
    losses, _, _ = torch.ops.fastkd.relation_kl_cpp(
        operands["student"], None, operands["teacher"], None, starts, lengths, None, 70, 2, False, 1, True
    )
    assert losses[0].isfinite() and losses[1].isnan()


def test_results_do_not_depend_on_the_number_of_threads():
    (student, teacher), mask = tensors((130, 1, 77, 64, 20), 6, (16, 24), "self")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(computed(student, teacher, 6, mask=mask))
    finally:
        torch.set_num_threads(before)
    for losses, grads in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(grads[0], results[0][1][0])


def test_without_a_gradient_the_loss_is_the_same_and_no_gradient_is_made():
    (student, teacher), _ = tensors((130, 130), 2, (16, 24), "self")
    starts, lengths = torch.zeros(2, dtype=torch.int64), torch.full((2,), 130, dtype=torch.int32)
    arguments = (student[0], None, teacher[0], None, starts, lengths, None, 130, 2, False, 1)
    with_grad, without = (torch.ops.fastkd.relation_kl_cpp(*arguments, wanted) for wanted in (True, False))
    assert torch.equal(with_grad[0], without[0])
    assert with_grad[1].shape == student[0].shape and without[1].numel() == 0


def test_a_batch_without_sequences_or_tokens_is_empty():
    losses = fastkd.relation_kl(torch.ones(0, 4, 8), torch.ones(0, 4, 8), 2, reduction="none", backend="cpp")
    assert losses.shape == (0,)
    losses = fastkd.relation_kl(torch.ones(2, 0, 8), torch.ones(2, 0, 8), 2, reduction="none", backend="cpp")
    assert losses.tolist() == [0, 0]


def test_an_impossible_length_is_refused():
    x, starts = torch.ones(1, 4, 8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="5 tokens"):
        torch.ops.fastkd.relation_kl_cpp(
            x, None, x, None, starts, torch.tensor([5], dtype=torch.int32), None, 5, 2, False, 1, True
        )


@pytest.mark.parametrize("widths", [(16, 16), (32, 64), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("length", [64, 300, 1024, 4096, 6500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scratch_stays_within_its_bound(dtype, length, widths):
    """Beside gradient and losses, on one thread: max(2 MiB, 4 L (d_student + 64) bytes), L rounded up to tiles."""
    if max(widths) > 64 and length > 4096:
        pytest.skip("the same code as at 4096, for seconds")
    lengths, starts = torch.tensor([length], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    student, teacher = (torch.randn(1, length, width).to(dtype) for width in widths)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        held = peak_extra_bytes(
            lambda: torch.ops.fastkd.relation_kl_cpp(
                student, None, teacher, None, starts, lengths, None, length, 1, False, 1, True
            ),
            "cpu",
        )
    finally:
        torch.set_num_threads(before)
    bound = max(2 * 2**20, 4 * -(-length // 64) * 64 * (widths[0] + 64))
    assert 0 < held - student.nbytes - lengths.nbytes <= bound


MEMORY = """
import os, random, torch, fastkd
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
random.seed(0)
def step(length):
    student, teacher = torch.randn(2, length, 32, requires_grad=True), torch.randn(2, length, 48)
    fastkd.relation_kl(student, teacher, 2, backend="cpp").backward()
for length in [*range(1, 200, 5), 400, 400]:  # every shape of the last tile, and the largest allocation
    step(length)
before = resident()
for _ in range(1000):
    step(random.randint(1, 400))
print((resident() - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_memory_stays_flat_over_batches_of_any_length():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 3, f"grew by {run.stdout} MiB"


@pytest.mark.parametrize(("capability", "isa"), [("default", "SSE41"), ("avx2", "AVX2")])
def test_the_library_of_a_lesser_instruction_set(capability, isa):
    if backends.cpu_capability() in ("default", capability):
        pytest.skip(f"this CPU is served by the {backends.cpu_capability()} library")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa}
    check = f"from fastkd.ops import backends; assert backends.cpu_capability() == {capability!r}"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-k", "core", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout
