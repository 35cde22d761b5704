"""Gradient perturbation: a training step taken from where its own loss is larger (Fu et al., AAAI 2021).

With e the output of the student's embeddings and L the loss of the step,

    g = dL/de,   e' = e + g / ‖g‖,   and the step minimises L(e') in the place of L(e)

e' is a constant step away from e: there is no second derivative. Both passes read the same e, its dropout included;
dropout above it is drawn anew in the second.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

PERTURBATIONS = (None, "embedding")
NORMS = {"token": (-1,), "sequence": (-2, -1), "batch": (-3, -2, -1)}
_SMALLEST = 1e-12  # a gradient of a smaller norm gives a smaller step, none of zero

Result = TypeVar("Result")


class EmbeddingPerturbation:
    """Runs a step twice, the second time from perturbed embeddings.

    Args:
        norm: over what the step has length 1: "token", "sequence" or "batch" (the batch of one forward, on one
            process).

    Attributes:
        skipped: how many gradients were not finite since it was last set to zero; their step was zero. Lies on the
            device, so that the host need not wait.
    """

    def __init__(self, norm: str):
        self.norm = norm
        self.skipped: Tensor | int = 0

    def __call__(
        self, embeddings: nn.Module, mask: Tensor | None, first: Callable[[], Tensor], second: Callable[[], Result]
    ) -> Result:
        """What `second` gives from perturbed embeddings.

        embeddings: the module whose output (B, L, D) is perturbed; each of the two must run it once.
        mask: (B, L), zero where there is padding, which stays as it is.
        first: gives the loss, a scalar of any positive scale. It leaves no gradient in a parameter.

        Raises RuntimeError where the embeddings do not run once.
        """
        with _output_of(embeddings, _watched) as outputs:
            loss = first()
        if len(outputs) != 1:
            raise RuntimeError(
                f"the embeddings ran {len(outputs)} times in one pass; perturbation=embedding needs one run that no "
                "torch.compile hides"
            )
        [clean] = outputs
        [gradient] = torch.autograd.grad(loss, clean)
        step, finite = unit_step(gradient, mask, self.norm)
        self.skipped = self.skipped + ~finite
        # A leaf was cut off from frozen embeddings by us, to have a gradient at all.
        start = clean.detach() if clean.is_leaf else clean
        with _output_of(embeddings, lambda _: start + step.to(start.dtype)):
            return second()


def unit_step(gradient: Tensor, mask: Tensor | None, norm: str) -> tuple[Tensor, Tensor]:
    """g / ‖g‖ in fp32 (B, L, D), zero where the mask (B, L) is, and whether g is finite (a bool tensor); if it is not,
    the step is zero everywhere. The scale of g, and so that of the loss, does not matter."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if mask is not None:
        g = g.masked_fill(mask[..., None] == 0, 0)
    finite = g.isfinite().all()
    step = g / torch.linalg.vector_norm(g, dim=NORMS[norm], keepdim=True).clamp(min=_SMALLEST)
    return step.masked_fill(~finite, 0), finite


def _watched(output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


@contextmanager
def _output_of(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Within, the module gives `change(output)`, which is also put into the list."""
    given: list[Tensor] = []

    def hook(module, args, output):
        given.append(change(output))
        return given[-1]

    handle = module.register_forward_hook(hook)
    try:
        yield given
    finally:
        handle.remove()
