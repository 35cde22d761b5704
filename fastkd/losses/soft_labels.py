"""Soft labels: the teacher's predictions as targets (Hinton et al., arXiv 1503.02531)."""

import torch.nn.functional as F
from torch import Tensor


def soft_label_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, scale_tau2: bool = True
) -> Tensor:
    """τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), mean over the batch: a scalar in fp32.

    student_logits, teacher_logits: (B, C), floats of any dtype. One column is a score: mean squared error, without
        temperature.
    temperature: τ, positive.
    scale_tau2: false leaves out τ², by which the gradient stays as large as that of hard labels.

    Raises ValueError for unequal shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must have "
            "one shape (B, C)"
        )
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    if student_logits.shape[-1] == 1:
        return F.mse_loss(student_logits, teacher_logits)
    log_student = (student_logits / temperature).log_softmax(-1)
    log_teacher = (teacher_logits / temperature).log_softmax(-1)
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    return temperature**2 * divergence if scale_tau2 else divergence
