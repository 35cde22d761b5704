"""A teacher's results, computed once; what was stopped goes on where it was.

Batches are taken together until they hold `_OF_A_PART` examples. Such a part is written to a file of its own, whole or
not at all, whose fingerprint holds what the results belong to, the explainers, and these very batches. A part that is
there and fits is read; another one is computed anew.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import length_hint
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastkd.explain.arguments import as_mask, check_batches, check_type
from fastkd.explain.classifier import Inputs, valid_tokens
from fastkd.explain.fingerprint import Fingerprint, of_batches
from fastkd.explain.stored import TeacherResults

_OF_A_PART = 1024  # examples: one file of a small data set, some minutes of a large teacher under many masks

Explainers = Mapping[str, Callable[[Inputs], Tensor]]


def compute_results(
    batches: Iterable[Inputs],
    fingerprint: Fingerprint,
    *,
    per_example: Explainers,
    per_token: Explainers,
    mask: Callable[[Inputs], Tensor] = valid_tokens,
    dtype: torch.dtype = torch.float16,
    precise: Collection[str] = (),
    parts: str | Path | None = None,
    progress: bool = False,
) -> TeacherResults:
    """Run explainers over the data, once.

        compute_results(
            loader,
            fingerprint,
            per_example={
                "logits": teacher.logits,
                "pool_logits": lambda x: masked_logits(teacher, x, pool.spread(teacher.maskable(x))),
            },
            per_token={
                "gradient": lambda x: gradient_attribution(teacher, x, settings),
                "selected": lambda x: selector.select(teacher, x, ratio),
            },
        )

    Args:
        batches: padded inputs with attention_mask, in the order of the data.
        per_example: functions that give (B, ...).
        per_token: functions that give (B, L), or (B, C, L).
        mask: gives (B, L) bool, what of it is kept: tokens, or words (`fastkd.explain.align`).
        dtype: floating results are stored in it; normalised scores and logits have room in fp16.
        precise: names of results that are stored as they are, such as logits whose largest is asked for.
        parts: a folder in which what is computed so far is kept. The same call goes on from there, with the results of
            one that was not stopped, bit for bit where the explainers repeat themselves. Who has saved the results
            removes it.
        progress: show a bar.

    Raises:
        TypeError: a single batch, explainers that are no functions or give no tensor.
        ValueError: as the explainers do; no batches; explainers of one name, or that give another shape; values that
            are NaN or infinite (the first example is named), or that `dtype` cannot hold.
    """
    check_batches(batches)
    check_type("fingerprint", fingerprint, Fingerprint)
    explainers = _Explainers(per_example, per_token, mask, dtype, frozenset(precise))
    found = []
    with tqdm(total=length_hint(batches) or None, desc="results", unit=" batches", disable=not progress) as bar:
        for number, some in enumerate(_grouped(batches, 1 if parts is None else _OF_A_PART)):
            first = sum(map(len, found))
            if parts is None:
                found.append(explainers.of(some, fingerprint, first, bar))
                continue
            here = {
                "batches": of_batches(some),
                "explainers": explainers.names,
                "dtype": str(dtype),
                "precise": sorted(precise),
            }
            belongs = dataclasses.replace(fingerprint, settings=fingerprint.settings | {"part": here})
            file = Path(parts, f"{number:05}.safetensors")
            part = _kept(file, belongs)
            if part is None:
                part = explainers.of(some, belongs, first, bar)
                part.save(file)
            else:
                bar.update(len(some))
            found.append(part)
    if not found:
        raise ValueError("there are no batches to compute results of")
    return _joined(found, fingerprint)


def _grouped(batches: Iterable[Inputs], examples: int) -> Iterator[list[Inputs]]:
    """Batches that hold so many examples together, or a few more; at the end fewer."""
    some, count = [], 0
    for inputs in batches:
        some.append(inputs)
        count += len(valid_tokens(inputs))
        if count >= examples:
            yield some
            some, count = [], 0
    if some:
        yield some


def _kept(file: Path, belongs: Fingerprint) -> TeacherResults | None:
    """The part that was computed before; none where there is no such file, or one of something else."""
    try:
        return TeacherResults.load(file, belongs)
    except (FileNotFoundError, ValueError):
        return None


def _joined(pieces: list[TeacherResults], fingerprint: Fingerprint) -> TeacherResults:
    one = pieces[0]
    return TeacherResults(
        fingerprint,
        torch.cat([piece.tokens for piece in pieces]),
        {name: torch.cat([piece.per_example[name] for piece in pieces]) for name in one.per_example},
        {name: torch.cat([piece.per_token[name] for piece in pieces]) for name in one.per_token},
    )


@dataclasses.dataclass(frozen=True)
class _Explainers:
    """What is asked of each batch, as `compute_results` takes it."""

    per_example: Explainers
    per_token: Explainers
    mask: Callable[[Inputs], Tensor]
    dtype: torch.dtype
    precise: frozenset[str]

    def __post_init__(self):
        if twice := sorted(set(self.per_example) & set(self.per_token)):
            raise ValueError(f"{', '.join(twice)}: an explainer gives something for each example or for each token")
        for name, explain in {**self.per_example, **self.per_token}.items():
            if not callable(explain):
                raise TypeError(f"{name} is of type {type(explain).__name__}; a function of a batch is needed")

    @property
    def names(self) -> list[list[str]]:
        return [sorted(self.per_example), sorted(self.per_token)]

    def of(self, batches: list[Inputs], fingerprint: Fingerprint, first: int, bar: tqdm) -> TeacherResults:
        """`first` is the number of the first example."""
        pieces = []
        for inputs in batches:
            pieces.append(self._of_batch(inputs, fingerprint, first + sum(map(len, pieces))))
            bar.update()
        return _joined(pieces, fingerprint)

    @torch.no_grad()
    def _of_batch(self, inputs: Inputs, fingerprint: Fingerprint, first: int) -> TeacherResults:
        valid = as_mask("mask", self.mask(inputs)).cpu()
        examples, tokens = {}, {}
        for name, explain in self.per_example.items():
            examples[name] = self._stored(name, explain(inputs), first, valid.shape[:1])
        for name, explain in self.per_token.items():
            values = self._stored(name, explain(inputs), first, valid.shape)
            tokens[name] = values.movedim(-1, 1)[valid]
        return TeacherResults(fingerprint, valid.sum(1), examples, tokens)

    def _stored(self, name: str, values: Tensor, first: int, shape: torch.Size) -> Tensor:
        """On the CPU and in `dtype`; `shape` is that of their first and last dimension, or of the first alone."""
        check_type(name, values, Tensor)
        if values.dim() < len(shape) or (values.shape[0], values.shape[-1])[: len(shape)] != shape:
            needed = (
                f"({shape[0]}, ...)" if len(shape) == 1 else f"({shape[0]}, {shape[1]}) or ({shape[0]}, C, {shape[1]})"
            )
            raise ValueError(f"{name} gives {tuple(values.shape)} for a batch; {needed} is needed")
        values = values.detach().cpu()
        if not values.is_floating_point():
            return values
        bad = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero()
        if len(bad):
            raise ValueError(f"{name}: example {first + int(bad[0])} has NaN or infinite values; look at the teacher")
        stored = values if name in self.precise else values.to(self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"{name}: {self.dtype} cannot hold values up to {values.abs().max():.4g}; torch.float32 can"
            )
        return stored
