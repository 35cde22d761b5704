"""cos_nce refuses bad input before any work, naming the argument, what was given and what is allowed."""

import sys

import pytest
import torch
import torch.distributed as dist

from fastkd.ops import cos_nce

STUDENT, TEACHER = torch.randn(4, 8), torch.randn(4, 8)
TOKENS, TOKENS_TEACHER = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
IDS = torch.arange(4)

REFUSED = {
    "widths that differ": (
        lambda: cos_nce(STUDENT[:, :6], TEACHER),
        ValueError,
        r"teacher has shape \(4, 8\), the student \(4, 6\); project the student first",
    ),
    "another batch": (lambda: cos_nce(STUDENT, TEACHER[:3]), ValueError, r"teacher has shape \(3, 8\), the student"),
    "no width": (lambda: cos_nce(STUDENT[:, :0], TEACHER[:, :0]), ValueError, "width is zero"),
    "three dimensions that may be both": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER),
        ValueError,
        r"say tokens=True for \(B, L, D\) or tokens=False for \(M, B, D\)",
    ),
    "tokens of another type": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER, tokens="yes"),
        TypeError,
        "tokens must be a bool, not str",
    ),
    "one dimension": (lambda: cos_nce(STUDENT[0], TEACHER[0]), ValueError, r"expected vectors \(B, D\)"),
    "four dimensions of vectors": (
        lambda: cos_nce(TOKENS[None], TOKENS_TEACHER[None], tokens=False),
        ValueError,
        r"expected vectors \(B, D\) or \(M, B, D\)",
    ),
    "two dimensions of tokens": (
        lambda: cos_nce(STUDENT, TEACHER, tokens=True),
        ValueError,
        r"expected tokens \(B, L, D\) or \(M, B, L, D\)",
    ),
    "integers": (lambda: cos_nce(STUDENT.long(), TEACHER), TypeError, "student is torch.int64; allowed are float32"),
    "no tensor": (lambda: cos_nce(STUDENT.numpy(), TEACHER), TypeError, "student must be a tensor, not ndarray"),
    "another device": (lambda: cos_nce(STUDENT, TEACHER.to("meta")), ValueError, "teacher is on meta, the student"),
    "a mask of another shape": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER, mask=torch.ones(4, 5).bool()),
        ValueError,
        r"mask has shape \(4, 5\).*asks for \(4, 6\)",
    ),
    "an additive mask": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER, mask=torch.zeros(4, 6)),
        TypeError,
        "mask is torch.float32; allowed are bool and integers",
    ),
    "a mask of pooled vectors": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER, mask=torch.ones(4, 6).bool(), tokens=False),
        ValueError,
        "mask was given with tokens=False",
    ),
    "negatives of another width": (
        lambda: cos_nce(STUDENT, TEACHER, negatives=torch.randn(5, 7)),
        ValueError,
        r"negatives has shape \(5, 7\); the student's \(4, 8\) allows \(K, 8\) or \(4, K, 8\)",
    ),
    "negatives of another batch": (
        lambda: cos_nce(STUDENT, TEACHER, negatives=torch.randn(3, 5, 8)),
        ValueError,
        r"allows \(K, 8\) or \(4, K, 8\)",
    ),
    "negatives of another number of layers": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER, tokens=False, negatives=torch.randn(3, 5, 8)),
        ValueError,
        r"allows \(4, K, 8\) or \(4, 6, K, 8\)",
    ),
    "negatives of tokens": (
        lambda: cos_nce(TOKENS, TOKENS_TEACHER, tokens=True, negatives=torch.randn(5, 8)),
        ValueError,
        r"negatives were given for tokens; explicit negatives are for vectors, such as student\[mask\]",
    ),
    "negatives that require a gradient": (
        lambda: cos_nce(STUDENT, TEACHER, negatives=torch.randn(5, 8, requires_grad=True)),
        ValueError,
        "negatives require a gradient",
    ),
    "ids of another length": (
        lambda: cos_nce(STUDENT, TEACHER, exclude=torch.arange(5)),
        ValueError,
        r"exclude has shape \(5,\); expected \(4,\)",
    ),
    "ids that are no integers": (
        lambda: cos_nce(STUDENT, TEACHER, exclude=torch.zeros(4)),
        TypeError,
        "exclude is torch.float32; ids are integers",
    ),
    "a list of ids": (lambda: cos_nce(STUDENT, TEACHER, exclude=[1, 2, 3, 4]), TypeError, "must be a tensor of ids"),
    "ids without those of the negatives": (
        lambda: cos_nce(STUDENT, TEACHER, negatives=torch.randn(5, 8), exclude=IDS),
        TypeError,
        r"exclude must be a pair of tensors \(ids, ids of the negatives\)",
    ),
    "ids of other negatives": (
        lambda: cos_nce(STUDENT, TEACHER, negatives=torch.randn(5, 8), exclude=(IDS, IDS)),
        ValueError,
        r"exclude\[1\] has shape \(4,\); expected \(5,\)",
    ),
    "a teacher that requires a gradient": (
        lambda: cos_nce(STUDENT, TEACHER.clone().requires_grad_()),
        ValueError,
        "teacher requires a gradient.*detach",
    ),
    "an unknown reduction": (
        lambda: cos_nce(STUDENT, TEACHER, reduction="batchmean"),
        ValueError,
        "reduction='batchmean'; allowed are 'mean', 'sum' and 'none'",
    ),
    "an unknown backend": (lambda: cos_nce(STUDENT, TEACHER, backend="fast"), ValueError, "is not a backend"),
    "a group without processes": (
        lambda: cos_nce(STUDENT, TEACHER, group=object()),
        ValueError,
        "torch.distributed is not initialised",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, call, error, message):
    op = sys.modules["fastkd.ops.cos_nce"]  # the attribute of this name is the function
    monkeypatch.setattr(op, "_SUMS", {})
    with pytest.raises(error, match=message):
        call()


def test_negatives_of_each_sample_have_ids_of_their_own():
    negatives = torch.randn(4, 5, 8)
    with pytest.raises(ValueError, match=r"exclude\[1\] has shape \(5,\); expected \(4, 5\)"):
        cos_nce(STUDENT, TEACHER, negatives=negatives, exclude=(IDS, torch.arange(5)))


def test_an_evaluation_may_pass_a_trainable_teacher(backend):
    with torch.no_grad():
        cos_nce(STUDENT.to(backend.device), TEACHER.clone().to(backend.device).requires_grad_(), backend=backend.name)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_without_this_process_is_refused(process_group):
    with pytest.raises(ValueError, match=r"this process \(rank 0\) is no member of the process group"):
        cos_nce(STUDENT, TEACHER, group=dist.GroupMember.NON_GROUP_MEMBER)


def test_something_else_than_a_group_is_refused(process_group):
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group, not str"):
        cos_nce(STUDENT, TEACHER, group="world")


def test_explicit_negatives_of_a_group_are_refused(process_group):
    with pytest.raises(ValueError, match="negatives and group were both given"):
        cos_nce(STUDENT, TEACHER, negatives=torch.randn(5, 8), group=dist.group.WORLD)


def test_a_dtensor_is_refused_by_name(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    with pytest.raises(TypeError, match=r"student is a DTensor.*to_local"):
        cos_nce(distribute_tensor(STUDENT, init_device_mesh("cpu", (1,))), TEACHER)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("culprit", ["student", "teacher", "negatives"])
def test_a_value_that_is_not_finite_names_its_tensor_on_cpu(backend, culprit, value):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA a check of values would make the host wait")
    vectors = {"student": STUDENT.clone(), "teacher": TEACHER.clone(), "negatives": torch.randn(5, 8)}
    vectors[culprit][1, 3] = value
    with pytest.raises(ValueError, match=f"{culprit} holds NaN or infinity"):
        cos_nce(**vectors, backend=backend.name)


def test_a_norm_that_overflows_is_named_on_cpu(backend):
    if backend.device.type != "cpu":
        pytest.skip("on CUDA a check of values would make the host wait")
    with pytest.raises(ValueError, match="the square of a vector's norm overflows fp32"):
        cos_nce(1e20 * STUDENT, TEACHER, backend=backend.name)
