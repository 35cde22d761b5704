"""A selector, trained once against a frozen teacher: which k tokens are enough for the teacher to say what it says.

After L2X (Chen et al., ICML 2018), with the teacher itself in the place of its learned approximator:

    min over the selector's parameters of  KL(softmax z_T(x) ‖ softmax z_T(v ⊙ x + (1 - v) ⊙ e₀)),  v = relaxed top k

The teacher gets no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from operator import length_hint
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastkd.explain import fingerprinted
from fastkd.explain.arguments import check_batches, check_positive, check_share, check_type, check_whole
from fastkd.explain.classifier import BASELINES, Classifier, Inputs, valid_tokens
from fastkd.explain.fingerprint import Fingerprint
from fastkd.explain.perturbation import replaced
from fastkd.explain.scores import check_norm, normalise
from fastkd.explain.selection import hard_top_k, relaxed_top_k
from fastkd.explain.target import check_explained
from fastkd.losses import soft_label_loss

_KIND = "selector"


@dataclass(frozen=True)
class SelectorSettings:
    """How a selector is trained.

    Args:
        ratio: share of the maskable tokens that are selected, in (0, 1]; k is rounded up.
        temperature: t of the relaxed draws.
        baseline: what a token that is not selected becomes, "zero" or "mask".
        hidden: width of the selector.
        learning_rate: of Adam.
        epochs: passes over the batches.
        seed: of the selector's parameters and of the draws.

    Raises ValueError for settings outside their ranges.
    """

    ratio: float = 0.3
    temperature: float = 0.5
    baseline: Literal["zero", "mask"] = "zero"
    hidden: int = 64
    learning_rate: float = 1e-3
    epochs: int = 3
    seed: int = 0

    def __post_init__(self):
        check_share("ratio", self.ratio)
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline={self.baseline!r}; allowed are {', '.join(BASELINES)}")
        for name in ("temperature", "learning_rate"):
            check_positive(name, getattr(self, name))
        for name in ("hidden", "epochs"):
            check_whole(name, getattr(self, name))
        check_whole("seed", self.seed, 0)


class Selector(nn.Module):
    """Logits (B, L) of being selected, from a token's embedding, its neighbours' and the mean of its sequence."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.near = nn.Conv1d(width, hidden, kernel_size=3, padding=1)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """In fp32, of embeddings (B, L, D) and the tokens, mask (B, L) bool. Padding changes nothing."""
        embeddings = embeddings.float().masked_fill(~mask[..., None], 0)
        near = self.near(embeddings.transpose(1, 2)).transpose(1, 2).relu().masked_fill(~mask[..., None], 0)
        mean = near.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
        return self.out(self.combine(torch.cat([near, mean.expand_as(near)], -1)).relu())[..., 0]

    def probabilities(self, classifier: Classifier, inputs: Inputs, *, norm: str | None = None) -> Tensor:
        """(B, L) in fp32, softmax over the maskable tokens: the selector's attribution; 0 elsewhere. `norm` is "l1",
        "l2" or None, as of every attribution. Raises ValueError for another one."""
        check_norm(norm)
        logits, maskable = self._logits(classifier, inputs)
        none = ~maskable.any(1, keepdim=True)
        scores = logits.masked_fill(~maskable, -torch.inf).masked_fill(none, 0).softmax(1).masked_fill(~maskable, 0)
        return normalise(scores, norm)

    def select(self, classifier: Classifier, inputs: Inputs, ratio: float) -> Tensor:
        """(B, L) bool, the k tokens to keep, and beside them all that is not maskable; as `hard_top_k`."""
        return hard_top_k(*self._logits(classifier, inputs), ratio)

    def save(self, path: str | os.PathLike, fingerprint: Fingerprint) -> None:
        """Write one safetensors file, whole or not at all; `fingerprint` is of what the selector was trained on. Raises
        ValueError for a path that is a folder."""
        fingerprinted.write(path, _KIND, self.state_dict(), fingerprint)

    @staticmethod
    def load(path: str | os.PathLike, expected: Fingerprint) -> Selector:
        """Read what `save` has written, on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind or cut short, or another fingerprint (what differs is named).
        """
        stored, tensors = fingerprinted.read(path, _KIND)
        stored.check(expected, path)
        hidden, width, _ = tensors["near.weight"].shape
        with torch.device("meta"):  # draws nothing
            selector = Selector(width, hidden)
        selector.load_state_dict(tensors, assign=True)
        return selector.eval()

    @torch.no_grad()
    def _logits(self, classifier: Classifier, inputs: Inputs) -> tuple[Tensor, Tensor]:
        valid = check_explained(classifier, inputs)
        return self(classifier.embed(inputs), valid), classifier.maskable(inputs)


def train_selector(
    teacher: Classifier,
    batches: Iterable[Inputs],
    settings: SelectorSettings = SelectorSettings(),
    *,
    progress: bool = False,
) -> Selector:
    """A selector for the teacher's predictions, trained on batches that can be gone through several times.

    Its steps cost a forward of the teacher, and a forward and a backward to the embeddings. `progress` shows a bar.

    Raises:
        TypeError: a model in the place of its `Classifier`, a single batch, other settings.
        ValueError: no batches, batches that end after one epoch, or a loss that is not finite (the step is named).
    """
    check_type("teacher", teacher, Classifier, ": Classifier(model)")
    check_type("settings", settings, SelectorSettings)
    check_batches(batches, settings.epochs)
    total = settings.epochs * length_hint(batches) or None
    selector, optimizer = None, None
    with (
        torch.random.fork_rng(devices=_cuda_devices()),
        tqdm(total=total, desc="selector", unit=" steps", disable=not progress) as bar,
    ):
        torch.manual_seed(settings.seed)
        for epoch in range(settings.epochs):
            for step, inputs in enumerate(batches):
                with torch.no_grad():
                    embeddings = teacher.embed(inputs)
                    nothing = teacher.baseline(inputs, settings.baseline, embeddings)
                    wanted = teacher.logits(inputs)
                if selector is None:
                    selector = Selector(embeddings.shape[-1], settings.hidden).to(embeddings.device)
                    optimizer = torch.optim.Adam(selector.parameters(), settings.learning_rate)
                loss = _loss(teacher, selector, inputs, embeddings, nothing, wanted, settings)
                if not torch.isfinite(loss):
                    raise ValueError(f"selector, epoch {epoch}, step {step}: the loss is {loss.item()}")
                optimizer.zero_grad()
                loss.backward(inputs=list(selector.parameters()))  # and none for the teacher's
                optimizer.step()
                bar.update()
    if selector is None:
        raise ValueError("a selector cannot be trained on no batches")
    return selector.eval()


def _loss(teacher, selector, inputs, embeddings, nothing, wanted, settings: SelectorSettings) -> Tensor:
    logits = selector(embeddings, valid_tokens(inputs))
    kept = relaxed_top_k(logits, teacher.maskable(inputs), settings.ratio, settings.temperature)
    return soft_label_loss(teacher.logits(inputs, replaced(embeddings, nothing, kept)), wanted, temperature=1.0)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
