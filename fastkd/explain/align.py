"""Explanations of a teacher and a student whose tokenizers differ, compared on the words of the text.

A word is a run of characters without white space, as it stands in the text: both tokenizers have these, however they
cut and change them (WordPiece splits punctuation off, byte-level BPE joins spaces to words). A token belongs to the
word of its first character that is no space; special tokens, and tokens of spaces alone, belong to none. The score of
a word is the sum of its tokens' scores, so that what adds up over tokens (integrated gradients with reduce="sum",
KernelSHAP) adds up over words. Words that only one of the two saw, because the other cut the text before them, are left
out on both sides.

How a recipe uses it. Before any work:

    check_tokenizers(teacher_tokenizer, student_tokenizer, align)     # refuses other tokenizers without align="words"
    alignment = WordAlignment.of(teacher_tokenizer, student_tokenizer, texts, pairs, max_length=128)

Once, for the teacher: its batches hold `words`, (B, L) of `pad_words(rows of alignment.teacher, attention_mask)`, which
`Classifier` keeps from the model. Scores are summed as they are, and normalised over words:

    words = GradientSettings("gradient_x_input", reduce="sum", norm=None)
    compute_results(
        loader,
        Fingerprint.of(model, tokenizer, train, settings | {"align": alignment.digest}),
        per_example={
            "logits": teacher.logits,
            "pool_logits": lambda x: masked_logits(
                teacher, x, tokens_of_words(pool.spread(word_mask(x["words"])), x["words"])
            ),
        },
        per_token={
            "gradient": lambda x: normalise(word_scores(gradient_attribution(teacher, x, words), x["words"]), "l2"),
            "selected": lambda x: word_scores(selector.select(teacher, x, ratio).long(), x["words"]) > 0,
        },
        mask=lambda x: word_mask(x["words"]),
    )

At a step, `words` (B, L) being `pad_words(rows of alignment.student, attention_mask)`, from the collator:

    valid = word_mask(words)                                                            # (B, W)
    given = results.batch(example, valid)                                               # "gradient": (B, W)
    apart = lambda a: distance(normalise(word_scores(a, words, valid.shape[1]), "l2"), given["gradient"], valid)
    central_difference(student, inputs, words_settings, apart, target=classes)
    masked_logits(student, inputs, tokens_of_words(pool.spread(valid, which), words))   # the masks of a pool
    masked_logits(student, inputs, tokens_of_words(given["selected"][:, None], words))  # the selected words

`consistency` compares word scores (B, W) with the mask `valid`, and `side_by_side` shows `alignment.words`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.explain.fingerprint import of_tokenizer

ALIGNMENTS = (None, "words")
NO_WORD = -1


def check_tokenizers(teacher, student, align: str | None = None) -> None:
    """Raise a ValueError where explanations of the two tokenizers' tokens cannot be compared.

    teacher, student: tokenizers of transformers.
    align: None, which needs equal tokenizers; or "words", which needs fast ones.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align={align!r}; allowed are null and words")
    if align == "words":
        for side, tokenizer in (("teacher", teacher), ("student", student)):
            _check_fast(tokenizer, side)
    elif of_tokenizer(teacher) != of_tokenizer(student):
        same = teacher.get_vocab() == student.get_vocab()
        what = "have one vocabulary and cut texts differently" if same else "have different vocabularies"
        raise ValueError(
            f"the tokenizers of the teacher ({_named(teacher)}) and of the student ({_named(student)}) {what}: "
            "explanations of other tokens cannot be compared. align=words compares them on words"
        )


@dataclass(frozen=True, eq=False)
class WordAlignment:
    """Which word each token belongs to, of N examples, on both sides.

    Attributes:
        teacher, student: for each example the numbers of its tokens' words, `NO_WORD` where there is none. The words
            that both saw have the numbers 0, 1, ... in the order of the text, those of a second text after the first's.
        words: these words, as they stand in the text.
    """

    teacher: list[list[int]]
    student: list[list[int]]
    words: list[list[str]]

    @staticmethod
    def of(
        teacher, student, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int
    ) -> WordAlignment:
        """Of texts, or pairs of texts, as both tokenizers cut them to `max_length` tokens: `tokenizer(texts, pairs,
        truncation=True, max_length=max_length)`, as `Task.tokenize` does.

        Raises ValueError for a tokenizer that is not fast: it does not tell where in the text a token stands.
        """
        check_tokenizers(teacher, student, "words")
        sides = [_word_numbers(tokenizer, texts, pairs, max_length) for tokenizer in (teacher, student)]
        found, words = ([], []), []
        for i, rows in enumerate(zip(*sides, strict=True)):
            both = sorted(set(rows[0]) & set(rows[1]) - {NO_WORD})
            number = {word: k for k, word in enumerate(both)}
            for side, row in zip(found, rows, strict=True):
                side.append([number.get(word, NO_WORD) for word in row])
            spelled = [word for text in (texts, pairs) if text is not None for word in text[i].split()]
            words.append([spelled[word] for word in both])
        return WordAlignment(*found, words)

    @property
    def digest(self) -> str:
        """For the settings of a `Fingerprint`: results on words belong to both tokenizers."""
        return hashlib.sha256(json.dumps([self.teacher, self.student]).encode()).hexdigest()


def pad_words(rows: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """(B, L) int64, the numbers of a batch's rows of a `WordAlignment`, which lie where the mask does; `NO_WORD` in
    padding.

    mask: (B, L), nonzero at tokens, on whichever side the padding is.

    Raises ValueError where a row has another number of tokens than the mask.
    """
    valid = mask != 0
    found = valid.sum(1).tolist()
    if found != [len(row) for row in rows]:
        row = next(i for i, count in enumerate(found) if i >= len(rows) or count != len(rows[i]))
        raise ValueError(
            f"row {row} of the batch has {found[row]} tokens, its alignment {len(rows[row]) if row < len(rows) else 0}:"
            " it was cut to another length"
        )
    words = torch.full(valid.shape, NO_WORD, device=mask.device)
    words[valid] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64, device=mask.device)
    return words


def word_scores(scores: Tensor, words: Tensor, count: int | None = None) -> Tensor:
    """Scores of words, (B, W) or (B, C, W): the sums over each word's tokens, twice differentiable. Without atomic
    additions: on a GPU they are the same in every run.

    scores: (B, L), or (B, C, L) where every class is explained.
    words: (B, L) int64, the word of each token.
    count: W; by default as many as the batch has, for which a GPU is waited for.
    """
    member = _member(words, count)
    if scores.dim() == 3:
        member = member[:, None]
    return torch.where(member, scores[..., None], torch.zeros_like(scores[..., None])).sum(-2)


def word_mask(words: Tensor, count: int | None = None) -> Tensor:
    """(B, W) bool: the words that a sequence has; `words` and `count` as for `word_scores`."""
    return _member(words, count).any(1)


def tokens_of_words(kept: Tensor, words: Tensor) -> Tensor:
    """A mask over words as one over tokens: (B, L) of (B, W), or (B, S, L) of (B, S, W), in the same dtype: bool, or
    floats in [0, 1]. Tokens of no word are kept, as special tokens are.

    words: (B, L) int64, the word of each token, each less than W.
    """
    none = words == NO_WORD
    if not kept.shape[-1]:  # no sequence has a word
        return torch.ones(*kept.shape[:-1], words.shape[1], dtype=kept.dtype, device=kept.device)
    places = words.masked_fill(none, 0)
    if kept.dim() == 3:
        places, none = places[:, None].expand(-1, kept.shape[1], -1), none[:, None]
    return kept.gather(-1, places).masked_fill(none, 1)


def _member(words: Tensor, count: int | None) -> Tensor:
    """(B, L, W) bool: which tokens are of which word."""
    if count is None:
        count = int(words.max()) + 1 if words.numel() else 0
    return words[..., None] == torch.arange(count, device=words.device)


def _word_numbers(tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[list[int]]:
    """For each example the word of each token, counted over its one or two texts; `NO_WORD` for tokens of none."""
    columns = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    if not columns[0]:
        return []
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    examples = zip(*columns, strict=True)
    return [_of_tokens(encoding, example) for encoding, example in zip(encoded.encodings, examples, strict=True)]


def _of_tokens(encoding, texts: tuple[str, ...]) -> list[int]:
    starts = [[word.start() for word in re.finditer(r"\S+", text)] for text in texts]
    numbers = []
    for which, (begin, end) in zip(encoding.sequence_ids, encoding.offsets, strict=True):
        piece = "" if which is None else texts[which][begin:end]
        if not piece.strip():
            numbers.append(NO_WORD)
            continue
        first = begin + len(piece) - len(piece.lstrip())
        before = len(starts[0]) if which else 0
        numbers.append(before + bisect_right(starts[which], first) - 1)
    return numbers


def _check_fast(tokenizer, side: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"align=words: the {side}'s tokenizer ({_named(tokenizer)}) is a slow one, which does not tell where in "
            "the text a token stands; a fast tokenizer (of the tokenizers library) is needed"
        )


def _named(tokenizer) -> str:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return f"{name}, {len(tokenizer)} tokens"
