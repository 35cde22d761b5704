"""What a score belongs to: a token, or a word of the text where teacher and student have tokens of their own.

`Tokens` and `Words` answer the same questions about a batch, so that a branch need not know which of them it works on.
U is the number of tokens L, or of words W. On tokens an answer is what was asked: nothing is copied.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from fastkd.explain import (
    Classifier,
    DistanceTo,
    GradientSettings,
    central_difference,
    distance,
    gradient_attribution,
    maskable_tokens,
    normalise,
    pad_words,
    tokens_of_words,
    word_mask,
    word_scores,
)

OF_WORDS = ("words", "word_mask")


class Tokens:
    """The tokens that teacher and student share."""

    def rows(self, here: Tensor) -> "Tokens":
        """Those of the examples `here` (R,)."""
        return self

    def mask(self, inputs: dict) -> Tensor:
        """(B, U), nonzero where there is something to score."""
        return inputs["attention_mask"]

    def maskable(self, inputs: dict, special_ids: Iterable[int]) -> Tensor:
        """(B, U) bool: what a perturbation may take away."""
        return maskable_tokens(inputs, special_ids)

    def over_tokens(self, kept: Tensor) -> Tensor:
        """(B, L) of (B, U), or (B, S, L) of (B, S, U), bool: the tokens that a mask keeps."""
        return kept

    def selected(self, kept: Tensor) -> Tensor:
        """(B, U) bool: what the tokens that are kept, (B, L) bool, belong to."""
        return kept

    def attribution(self, classifier: Classifier, inputs: dict, settings: GradientSettings, **how) -> Tensor:
        """`gradient_attribution`, (B, U), or (B, C, U) where every class is explained."""
        return gradient_attribution(classifier, inputs, settings, **how)

    def central_difference(
        self, classifier: Classifier, inputs: dict, settings: GradientSettings, wanted: Tensor, kind: str, **how
    ) -> Tensor:
        """`central_difference` of the distance to the scores `wanted`, (B, U) or (B, C, U)."""
        return central_difference(classifier, inputs, settings, DistanceTo(wanted, kind), **how)


@dataclass(frozen=True)
class Words:
    """The words of the texts, whose scores are sums over their tokens, normalised over words.

    words: (B, L) int64, the word of each token, see `pad_words`. valid: (B, W) bool, their `word_mask`.
    """

    words: Tensor
    valid: Tensor

    def rows(self, here: Tensor) -> "Words":
        return Words(self.words[here], self.valid[here])

    def mask(self, inputs: dict) -> Tensor:
        return self.valid

    def maskable(self, inputs: dict, special_ids: Iterable[int]) -> Tensor:
        return self.valid

    def over_tokens(self, kept: Tensor) -> Tensor:
        return tokens_of_words(kept, self.words)

    def selected(self, kept: Tensor) -> Tensor:
        return self._sums(kept.long()) > 0

    def attribution(self, classifier: Classifier, inputs: dict, settings: GradientSettings, **how) -> Tensor:
        scores = gradient_attribution(classifier, inputs, replace(settings, norm=None), **how)
        return normalise(self._sums(scores), settings.norm)

    def central_difference(
        self, classifier: Classifier, inputs: dict, settings: GradientSettings, wanted: Tensor, kind: str, **how
    ) -> Tensor:
        def apart(scores: Tensor) -> Tensor:
            return distance(normalise(self._sums(scores), settings.norm), wanted, self.valid, kind)

        return central_difference(classifier, inputs, replace(settings, norm=None), apart, **how)

    def _sums(self, scores: Tensor) -> Tensor:
        return word_scores(scores, self.words, self.valid.shape[1])


Units = Tokens | Words


def units_of(inputs: dict) -> Units:
    """Of a batch that `padded` has made."""
    return Words(*(inputs[name] for name in OF_WORDS)) if "words" in inputs else Tokens()


def padded(pad: Callable[[list[dict]], dict], rows: list[dict]) -> dict:
    """The batch that `pad` makes of rows of the data; beside it "words" (B, L) and "word_mask" (B, W) where the rows
    have words (`WordAlignment.with_words`). On the host: a device would be waited for to count them."""
    if "words" not in rows[0]:
        return pad(rows)
    batch = dict(pad([{name: value for name, value in row.items() if name != "words"} for row in rows]))
    batch["words"] = pad_words([row["words"] for row in rows], batch["attention_mask"])
    return batch | {"word_mask": word_mask(batch["words"])}
