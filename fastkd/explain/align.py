"""Explanations of a teacher and a student whose tokenizers differ, compared on the words of the text.

A word is a run of characters without white space, as it stands in the text: both tokenizers have these, however they
cut and change them (WordPiece splits punctuation off, byte-level BPE joins spaces to words). A token belongs to the
word of its first character that is no space; special tokens, and tokens of spaces alone, belong to none. The score of
a word is the sum of its tokens' scores, so that what adds up over tokens (integrated gradients with reduce="sum",
KernelSHAP) adds up over words. Words that only one of the two saw, because the other cut the text before them, are left
out on both sides.

Both sides number the words of a text alike, so their scores (B, W) compare as scores (B, L) of tokens do: normalised
over words, after the sums. Masks are masks of words, which on either side take all tokens of a word away. The recipe
`egkd` does this with `align=words` (docs/methods/egkd_cross_architecture.md).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastkd.explain.arguments import check_whole
from fastkd.explain.fingerprint import of_data, of_tokenizer

ALIGNMENTS = (None, "words")
SIDES = ("teacher", "student")
NO_WORD = -1
_AT_ONCE = 1000  # texts: what a tokenizer tells of them is many times what is kept


def check_tokenizers(teacher, student, align: str | None = None) -> None:
    """Raise a ValueError where explanations of the two tokenizers' tokens cannot be compared.

    teacher, student: tokenizers of transformers.
    align: None, which needs equal tokenizers; or "words", which needs fast ones.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align={align!r}; allowed are null and words")
    if align == "words":
        for side, tokenizer in zip(SIDES, (teacher, student), strict=True):
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
        words: these words of each text, one or the two of a pair, as they stand there.
        data: digests of the token ids of both sides, by `of_data`.
    """

    teacher: list[list[int]]
    student: list[list[int]]
    words: list[list[list[str]]]
    data: tuple[str, str]

    @staticmethod
    def of(
        teacher, student, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int
    ) -> WordAlignment:
        """Of texts, or pairs of texts, as both tokenizers cut them to `max_length` tokens: `tokenizer(texts, pairs,
        truncation=True, max_length=max_length)`, as `Task.tokenize` does.

        Raises ValueError for a tokenizer that is not fast: it does not tell where in the text a token stands; for texts
        that are no list of strings, and pairs that are not as many.
        """
        check_tokenizers(teacher, student, "words")
        check_whole("max_length", max_length)
        for name, column in (("texts", texts), ("pairs", pairs)):
            if column is not None and (isinstance(column, str) or not all(isinstance(text, str) for text in column)):
                raise ValueError(f"{name}: a list of strings is needed, one for each example")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(pairs)} pairs for {len(texts)} texts")
        columns = [list(column) for column in (texts, pairs) if column is not None]
        sides = [_tokens_and_words(tokenizer, columns, max_length) for tokenizer in (teacher, student)]
        found, words = ([], []), []
        for example, *rows in zip(zip(*columns, strict=True), *(numbers for _, numbers in sides), strict=True):
            both = sorted(set(rows[0]) & set(rows[1]) - {NO_WORD})
            number = {word: k for k, word in enumerate(both)}
            for side, row in zip(found, rows, strict=True):
                side.append([number.get(word, NO_WORD) for word in row])
            place = itertools.count()
            words.append([[word for word in text.split() if next(place) in number] for text in example])
        return WordAlignment(*found, words, tuple(of_data({"input_ids": ids}) for ids, _ in sides))

    @property
    def digest(self) -> str:
        """For the settings of a `Fingerprint`: results on words belong to the tokens of both sides."""
        return hashlib.sha256(json.dumps([self.teacher, self.student, self.data]).encode()).hexdigest()

    def with_words(self, side: Literal["teacher", "student"], data):
        """The tokenized data of one side, a datasets.Dataset with input_ids, with a further column "words".

        Raises ValueError where it is not the data whose tokens are aligned: of another length, cut to another one, in
        another order, of other texts or another tokenizer.
        """
        rows, ids = getattr(self, side), data["input_ids"][:]
        if len(ids) != len(rows):
            raise ValueError(f"the {side}'s data has {len(ids)} examples, the alignment is of {len(rows)}")
        for i, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
            if len(row) != len(tokens):
                raise ValueError(
                    f"example {i} of the {side}'s data has {len(tokens)} tokens, its alignment {len(row)}: it was cut "
                    "to another max_length, or is of another text or tokenizer"
                )
        if of_data({"input_ids": ids}) != self.data[SIDES.index(side)]:
            raise ValueError(
                f"the {side}'s data are not the tokens that are aligned: they stand in another order, or are of other "
                "texts or another tokenizer"
            )
        return data.add_column("words", rows)


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


def _tokens_and_words(tokenizer, columns: list[list[str]], max_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """For each example its token ids, and the word of each token, counted over its one or two texts; `NO_WORD` for
    tokens of none."""
    ids, numbers = [], []
    for first in range(0, len(columns[0]), _AT_ONCE):
        here = [column[first : first + _AT_ONCE] for column in columns]
        encoded = tokenizer(*here, truncation=True, max_length=max_length)
        ids += encoded["input_ids"]
        for encoding, *example in zip(encoded.encodings, *here, strict=True):
            numbers.append(_of_tokens(encoding, example))
    return ids, numbers


def _of_tokens(encoding, texts: Sequence[str]) -> list[int]:
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
