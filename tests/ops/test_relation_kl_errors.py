"""relation_kl refuses bad input before any work, naming the argument, what was given and what is allowed."""

import sys

import pytest
import torch

from fastkd.ops import relation_kl

STUDENT, TEACHER = torch.randn(2, 6, 312), torch.randn(2, 6, 768)
PACKED, PACKED_TEACHER = torch.randn(12, 8), torch.randn(12, 8)

REFUSED = {
    "heads that do not divide": (
        lambda: relation_kl(STUDENT, TEACHER, 48),
        ValueError,
        "num_heads=48 does not divide the student's width 312; 12 and 24 divide both",
    ),
    "heads that do not divide the teacher": (
        lambda: relation_kl(TEACHER[..., :12], STUDENT[..., :10], 4),
        ValueError,
        "num_heads=4 does not divide the teacher's width 10; 1 and 2 divide both",
    ),
    "no heads": (lambda: relation_kl(STUDENT, TEACHER, 0), ValueError, "num_heads=0"),
    "heads of another type": (
        lambda: relation_kl(STUDENT, TEACHER, 12.0),
        TypeError,
        "num_heads must be an int.*float",
    ),
    "a boolean for heads": (lambda: relation_kl(STUDENT, TEACHER, True), TypeError, "num_heads must be an int.*bool"),
    "no width": (lambda: relation_kl(STUDENT[..., :0], TEACHER, 1), ValueError, "student.*width is zero"),
    "another length": (
        lambda: relation_kl(STUDENT, TEACHER[:, :5], 12),
        ValueError,
        r"teacher has shape \(2, 5, 768\), but the student has \(2, 6, 312\)",
    ),
    "another batch": (lambda: relation_kl(STUDENT, TEACHER[:1], 12), ValueError, r"teacher has shape \(1, 6, 768\)"),
    "split heads": (
        lambda: relation_kl(STUDENT[None], TEACHER, 12),
        ValueError,
        r"student has shape \(1, 2, 6, 312\); expected \(B, L, D\)",
    ),
    "packed without offsets": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2),
        ValueError,
        r"\(12, 8\); expected \(B, L, D\)",
    ),
    "padded with offsets": (
        lambda: relation_kl(STUDENT, TEACHER, 12, cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"expected \(T, D\) with cu_seqlens",
    ),
    "integers": (
        lambda: relation_kl(STUDENT.long(), TEACHER, 12),
        TypeError,
        "student is torch.int64; allowed are float32",
    ),
    "8-bit floats": (
        lambda: relation_kl(STUDENT, TEACHER.to(torch.float8_e4m3fn), 12),
        TypeError,
        "teacher is torch.float8_e4m3fn",
    ),
    "no tensor": (lambda: relation_kl([[1.0]], TEACHER, 12), TypeError, "both be one tensor"),
    "a list for a tensor": (
        lambda: relation_kl(STUDENT.numpy(), TEACHER, 12),
        TypeError,
        "student must be a tensor.*ndarray",
    ),
    "three operands": (
        lambda: relation_kl((STUDENT,) * 3, (TEACHER,) * 3, 12),
        TypeError,
        r"a pair \(left, right\) of tensors",
    ),
    "a pair and a tensor": (lambda: relation_kl((STUDENT, STUDENT), TEACHER, 12), TypeError, "both a pair"),
    "operands of two widths": (
        lambda: relation_kl((STUDENT, STUDENT[..., :156]), (TEACHER, TEACHER), 12),
        ValueError,
        r"student's right operand has shape \(2, 6, 156\), its left \(2, 6, 312\)",
    ),
    "operands of two dtypes": (
        lambda: relation_kl((STUDENT, STUDENT.bfloat16()), (TEACHER, TEACHER), 12),
        TypeError,
        "student's right operand is torch.bfloat16, its left torch.float32",
    ),
    "another device": (
        lambda: relation_kl(STUDENT, TEACHER.to("meta"), 12),
        ValueError,
        "teacher is on meta, the student on cpu",
    ),
    "an unknown reduction": (
        lambda: relation_kl(STUDENT, TEACHER, 12, reduction="batchmean"),
        ValueError,
        "reduction='batchmean'; allowed are 'mean', 'sum' and 'none'",
    ),
    "an unknown backend": (
        lambda: relation_kl(STUDENT, TEACHER, 12, backend="fast"),
        ValueError,
        "backend='fast' is not a backend; allowed are 'auto'",
    ),
    "a mask of another shape": (
        lambda: relation_kl(STUDENT, TEACHER, 12, mask=torch.ones(2, 5)),
        ValueError,
        r"mask has shape \(2, 5\).*asks for \(2, 6\)",
    ),
    "a list for a mask": (
        lambda: relation_kl(STUDENT, TEACHER, 12, mask=[[1] * 6] * 2),
        TypeError,
        "mask must be a tensor, not list",
    ),
    "an additive mask": (
        lambda: relation_kl(STUDENT, TEACHER, 12, mask=torch.zeros(2, 6)),
        TypeError,
        "mask is torch.float32; allowed are bool",
    ),
    "a mask on another device": (
        lambda: relation_kl(STUDENT, TEACHER, 12, mask=torch.ones(2, 6, dtype=torch.bool, device="meta")),
        ValueError,
        "mask is on meta",
    ),
    "mask and offsets": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, mask=torch.ones(1, 12), cu_seqlens=torch.tensor([0, 12])),
        ValueError,
        "mask and cu_seqlens were both given",
    ),
    "a list for offsets": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=[0, 12]),
        TypeError,
        "cu_seqlens must be a tensor, not list",
    ),
    "offsets of another dtype": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([0.0, 12.0])),
        ValueError,
        r"expected \(B \+ 1,\)",
    ),
    "no offsets": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([], dtype=torch.int32)),
        ValueError,
        r"\(B \+ 1,\)",
    ),
    "offsets that fall": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([0, 7, 5, 12])),
        ValueError,
        "never fall",
    ),
    "offsets that do not start at zero": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([1, 12])),
        ValueError,
        "must start at 0",
    ),
    "offsets beyond the rows": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([0, 13])),
        ValueError,
        "12 packed rows",
    ),
    "max_seqlen below a sequence": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([0, 12]), max_seqlen=11),
        ValueError,
        "max_seqlen=11, but cu_seqlens holds a sequence of 12",
    ),
    "max_seqlen of another type": (
        lambda: relation_kl(PACKED, PACKED_TEACHER, 2, cu_seqlens=torch.tensor([0, 12]), max_seqlen=12.0),
        TypeError,
        "max_seqlen must be an int, not float",
    ),
    "causal of another type": (
        lambda: relation_kl(STUDENT, TEACHER, 12, causal="yes"),
        TypeError,
        "causal must be a bool, not str",
    ),
    "max_seqlen without offsets": (
        lambda: relation_kl(STUDENT, TEACHER, 12, max_seqlen=6),
        ValueError,
        "max_seqlen belongs to cu_seqlens",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("culprit", ["teacher", "student"])
def test_a_value_that_is_not_finite_names_its_tensor_and_sequence_on_cpu(draw, backend, culprit, value):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA a check of values would make the host wait")
    student, teacher = draw(3, 6, (8, 16))
    {"teacher": teacher, "student": student}[culprit][1, 4, 3] = value
    with pytest.raises(ValueError, match=rf"{culprit} holds NaN or infinity; the loss of sequences \[1\]"):
        relation_kl(student, teacher, 2, backend=backend.name)


def test_scores_that_overflow_are_named_on_cpu(draw, backend):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA a check of values would make the host wait")
    student, teacher = draw(3, 6, (8, 16))
    with pytest.raises(ValueError, match="relation scores overflow"):
        relation_kl(student * 1e25, teacher, 2, backend=backend.name)


def test_nothing_is_computed_for_bad_arguments(monkeypatch):
    op = sys.modules["fastkd.ops.relation_kl"]  # the attribute of this name is the function
    monkeypatch.setattr(op._RelationKL, "apply", lambda *_: pytest.fail("the kernel was called"))
    for call, error, _ in REFUSED.values():
        with pytest.raises(error):
            call()
