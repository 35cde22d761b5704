"""LRC-BERT's loss on intermediate layers: COS-NCE between a teacher's vectors and a student's, mapped to its width."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ops import cos_nce

POOLINGS = ("cls", "mean", "token")


class LayerContrast(nn.Module):
    """COS-NCE (`fastkd.cos_nce`) summed over matched layers, with a learned map d_S → d_T, no bias, for each of them.

    Args:
        layers: number of matched layers.
        student_width, teacher_width: d_S and d_T.
        pooling: what stands for a sequence: "cls", its first token; "mean" of its tokens; "token", each token on its
            own, whose negatives are the tokens of other sequences at the same position.
        backend: see `fastkd.cos_nce`.

    A map starts as the identity, cut to its shape: the vectors of a student that was cut out of its teacher are in the
    teacher's space already.
    """

    def __init__(
        self, layers: int, student_width: int, teacher_width: int, *, pooling: str = "cls", backend: str = "auto"
    ):
        super().__init__()
        check_pooling(pooling)
        self.pooling, self.backend = pooling, backend
        self.projections = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(layers))
        for projection in self.projections:
            nn.init.eye_(projection.weight)

    def targets(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
        """The teacher's side: states (B, L, d_T) of the matched layers to (M, B, d_T), for "token" (M, B, L, d_T)."""
        return torch.stack([pool(states, mask, self.pooling) for states in hidden])

    def forward(
        self, hidden: Sequence[Tensor], targets: Tensor, mask: Tensor, *, exclude: Tensor | None = None, group=None
    ) -> Tensor:
        """The loss, a mean over the batch and a sum over layers: a scalar in fp32.

        hidden: the student's states (B, L, d_S) of the matched layers, in the order of `targets`.
        mask: (B, L), nonzero where there is a token. A sequence without any is neutral: it has no gradient.
        exclude, group: see `fastkd.cos_nce`; with "token" the processes may bring batches of any length.
        """
        mapped = [
            projection(pool(states, mask, self.pooling))
            for projection, states in zip(self.projections, hidden, strict=True)
        ]
        student = torch.stack(mapped)
        shared = {"exclude": exclude, "group": group, "backend": self.backend}
        if self.pooling != "token":
            return cos_nce(student, targets, tokens=False, **shared)
        if group is not None:
            room = _longest(mask, group) - mask.shape[1]
            student, targets = (F.pad(x, (0, 0, 0, room)) for x in (student, targets))
            mask = F.pad(mask, (0, room))
        return cos_nce(student, targets, mask=mask, **shared)


def check_pooling(pooling: str) -> None:
    """Raise a ValueError unless it is one of `POOLINGS`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}; allowed are {', '.join(POOLINGS)}")


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Hidden states (B, L, D) to vectors (B, D), zero for a sequence without a token; unchanged for "token"."""
    if pooling == "token":
        return hidden
    valid = mask != 0
    if pooling == "cls":
        first = valid.int().argmax(1)  # not always 0: padding may stand on the left
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), first]
        return vectors.masked_fill(~valid.any(1, keepdim=True), 0)
    total = hidden.masked_fill(~valid[..., None], 0).sum(1)
    return total / valid.sum(1, keepdim=True).clamp(min=1)


def _longest(mask: Tensor, group) -> int:
    length = torch.tensor(mask.shape[1], device=mask.device)
    dist.all_reduce(length, dist.ReduceOp.MAX, group=group)
    return int(length)
