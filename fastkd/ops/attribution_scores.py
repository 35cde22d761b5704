"""Attributions made comparable, and how far two of them are apart: plain torch, differentiable twice.

Normalised by the norm over the sequence, â = a / ‖a‖ₚ; a vector of zeros stays one (AD-KD, Wu et al., ACL 2023).
"""

import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("norm", "sum")
NORMS = (None, "l1", "l2")
_DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
DISTANCES = tuple(_DISTANCES)


def length(vectors: Tensor) -> Tensor:
    """‖x‖₂ over the last dimension. Where x = 0 all its derivatives are 0, not NaN: the row norm of padding, and of a
    saturated classifier, is differentiated twice."""
    squares = vectors.square().sum(-1)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def normalise(scores: Tensor, norm: str | None) -> Tensor:
    """â = a / ‖a‖ over the last dimension, (..., L), of scores (..., L) that are 0 in padding, in their dtype.

    norm: "l1", "l2", or None for the scores as they are. Scores that are all 0 stay 0, and so does their gradient.

    Raises ValueError for another norm.
    """
    check_norm(norm)
    if norm is None:
        return scores
    size = scores.abs().sum(-1) if norm == "l1" else length(scores)
    zero = (size == 0)[..., None]
    return (scores / size[..., None].masked_fill(zero, 1)).masked_fill(zero, 0)


def distance(student: Tensor, teacher: Tensor, mask: Tensor, kind: str = "l2") -> Tensor:
    """How far normalised attributions are apart, a scalar in the student's dtype (bf16 and fp16: fp32 under autocast):

        1/B Σ_b Σ_c 1/n_b Σ_i |âT_bci - âS_bci|^q,   n_b the tokens of sequence b

    AD-KD divides by the tokens of the whole batch; a mean over sequences is the same however a batch is cut.

    student, teacher: (B, L) or (B, C, L) of equal shape, floats, the teacher's of any dtype; only the student gets a
        gradient.
    mask: (B, L), nonzero at tokens. Sequences without a token, or where the teacher's scores are all zero (a saturated
        classifier explains nothing), add 0.
    kind: "l2" (q = 2), "l1" (q = 1), or "smooth_l1" (0.5 x² below 1, |x| - 0.5 above).

    Scores that are NaN give NaN. Raises ValueError for another kind and for attributions of different shapes.
    """
    check_distance(kind)
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's attributions are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; both must "
            "be of the same tokens and classes"
        )
    valid = mask != 0
    tokens = valid.sum(1).clamp(min=1)
    if student.dim() == 3:
        valid, tokens = valid[:, None], tokens[:, None]
    teacher = teacher.detach().to(student.dtype)
    says = (teacher != 0).any(-1, keepdim=True)
    each = _DISTANCES[kind](student, teacher, reduction="none").masked_fill(~(valid & says), 0)
    return (each.sum(-1) / tokens).sum() / max(len(student), 1)


def check_norm(norm: str | None) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}; allowed are None, 'l1' and 'l2'")


def check_distance(kind: str) -> None:
    if kind not in DISTANCES:
        raise ValueError(f"distance={kind!r}; allowed are {', '.join(DISTANCES)}")
