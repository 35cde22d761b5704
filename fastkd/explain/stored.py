"""A teacher's results, computed once and read from disk: attributions, logits of a mask pool, selected tokens.

One safetensors file, which is there whole or not at all. What belongs to an example (logits) is one tensor (N, ...).
What belongs to its tokens (attributions, selected tokens) is stored without padding: the tokens of all examples one
behind the other (T, ...), and how many each has (N,).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.explain import fingerprinted
from fastkd.explain.arguments import as_mask
from fastkd.explain.fingerprint import Fingerprint

_KIND = "teacher results"
_COUNTS = "tokens"


@dataclass(frozen=True, eq=False)
class TeacherResults:
    """Results of N examples, in the order of the data they were computed on.

    Attributes:
        fingerprint: what they belong to.
        tokens: (N,) int64, the tokens of each example.
        per_example: {name: (N, ...)}.
        per_token: {name: (T, ...)}, T = Σ tokens; a score for each class is a second dimension.
    """

    fingerprint: Fingerprint
    tokens: Tensor
    per_example: dict[str, Tensor]
    per_token: dict[str, Tensor]

    def __post_init__(self):
        object.__setattr__(self, "_starts", self.tokens.cumsum(0) - self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, examples: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The results of a batch, on the CPU: (B, ...) for an example; (B, L) or (B, C, L) for tokens, which lie where
        the mask does, 0 (False) in padding.

        examples: (B,) int64, the rows of the data.
        mask: (B, L), nonzero at tokens, on whichever side the padding is.

        Raises ValueError where the mask has another number of tokens than an example had, or there is no such example.
        """
        examples = self._rows(examples)
        valid = as_mask("mask", mask).cpu()
        if len(valid) != len(examples):
            raise ValueError(f"the mask is of {len(valid)} sequences, {len(examples)} examples are asked for")
        found = valid.sum(1)
        wrong = (found != self.tokens[examples]).nonzero()
        if len(wrong):
            row = int(wrong[0])
            example = int(examples[row])
            raise ValueError(
                f"example {example} has {int(found[row])} tokens here and {int(self.tokens[example])} in the stored "
                "results: it was cut to another length"
            )
        places = self._places(examples)
        batch = {name: values[examples] for name, values in self.per_example.items()}
        for name, values in self.per_token.items():
            padded = values.new_zeros(*valid.shape, *values.shape[1:])
            padded[valid] = values[places]
            batch[name] = padded.movedim(1, -1)
        return batch

    def select(self, examples: Tensor) -> TeacherResults:
        """The results of these examples, (M,) rows of the data, in this order. Raises ValueError for other rows."""
        examples = self._rows(examples)
        places = self._places(examples)
        return dataclasses.replace(
            self,
            tokens=self.tokens[examples],
            per_example={name: values[examples] for name, values in self.per_example.items()},
            per_token={name: values[places] for name, values in self.per_token.items()},
        )

    def _rows(self, examples: Tensor) -> Tensor:
        """(M,) on the CPU."""
        examples = torch.as_tensor(examples, device="cpu")
        if examples.dim() != 1 or examples.is_floating_point() or examples.dtype == torch.bool:
            raise ValueError(f"examples are {examples.dtype} of shape {tuple(examples.shape)}; numbers (M,) are needed")
        bad = examples[(examples < 0) | (examples >= len(self))]
        if len(bad):
            raise ValueError(f"there is no example {int(bad[0])}: the results are of {len(self)}, from 0 on")
        return examples.long()

    def _places(self, examples: Tensor) -> Tensor:
        """Where the tokens of these examples lie, one behind the other."""
        counts = self.tokens[examples]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return self._starts[examples].repeat_interleave(counts) + within

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, and the folders above it that are missing; one of that name is replaced once the new one is
        complete.

        Raises ValueError, before anything is written, for values that are NaN or infinite and for a path that is a
        folder.
        """
        for name, values in {**self.per_example, **self.per_token}.items():
            if values.is_floating_point() and not values.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values; nothing was written")
        tensors = {f"example.{name}": values for name, values in self.per_example.items()}
        tensors |= {f"token.{name}": values for name, values in self.per_token.items()}
        fingerprinted.write(path, _KIND, tensors | {_COUNTS: self.tokens}, self.fingerprint)

    @staticmethod
    def fingerprint_of(path: str | os.PathLike) -> Fingerprint:
        """What the results in a file belong to. Raises as `load`."""
        return fingerprinted.read(path, _KIND)[0]

    @staticmethod
    def load(path: str | os.PathLike, expected: Fingerprint) -> TeacherResults:
        """Read what `save` has written, for the teacher, tokenizer, data and settings of `expected`; the file may hold
        results of further settings.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind or cut short, or another fingerprint (what differs is named).
        """
        stored, tensors = fingerprinted.read(path, _KIND)
        stored.check(expected, path)
        parts = {
            kind: {name.removeprefix(kind): values for name, values in tensors.items() if name.startswith(kind)}
            for kind in ("example.", "token.")
        }
        return TeacherResults(stored, tensors[_COUNTS], parts["example."], parts["token."])
