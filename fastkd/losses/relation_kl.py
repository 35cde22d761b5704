"""MiniLMv2's loss: a weighted sum of relation KLs, one for each kind of projection."""

from collections.abc import Mapping

from torch import Tensor, nn

from fastkd.ops import relation_kl


class RelationKL(nn.Module):
    """Attention-relation distillation between one teacher layer and one student layer.

    Args:
        num_heads: relation heads; divides the widths of teacher and student.
        weights: weight of each self relation by the name of its projection. Default: query, key and value, 1 each
            (MiniLMv2, equation 5).
        causal: for decoders, a row sees the columns up to its own position only.
        backend: see `fastkd.relation_kl`.
    """

    def __init__(
        self, num_heads: int, weights: Mapping[str, float] | None = None, *, causal: bool = False, backend: str = "auto"
    ):
        super().__init__()
        self.num_heads = num_heads
        self.weights = dict(weights or {"query": 1.0, "key": 1.0, "value": 1.0})
        self.causal = causal
        self.backend = backend

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Raw projections by name, each (B, L, D), to one unweighted loss by name; `total` weights and sums them."""
        losses = {
            name: relation_kl(
                student[name], teacher[name], self.num_heads, mask=mask, causal=self.causal, backend=self.backend
            )
            for name in self.weights
        }
        return losses | {"total": sum(self.weights[name] * loss for name, loss in losses.items())}
