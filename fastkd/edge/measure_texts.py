"""Texts that fill a batch to an exact length in tokens, by any tokenizer."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import count

import numpy as np

# What is read when no task is given. Of ordinary words: random ids would be rare tokens nearly all, and a sparse-coded
# table would be timed at its worst.
PROSE = (
    "The train to the coast leaves a little after nine and stops at every village on the way.",
    "She put the letter back into the drawer, closed it, and never spoke of it again.",
    "Most of the houses along the river were built before the bridge, and some before the road.",
    "I would not buy this camera a second time: the battery is weak and the menus are confusing.",
    "When the water boils, add the rice, stir once, and leave the lid on for twelve minutes.",
    "Our team measured the temperature of the lake every morning for more than three years.",
    "It is a quiet, patient film with two excellent actors and an ending that few will expect.",
    "Prices rose again last month, although the central bank had promised the opposite in spring.",
    "Please restart the computer before you call us, and keep the number on the label at hand.",
    "The museum is free on Sundays, which is also when nobody can see the paintings for people.",
    "He learned to repair clocks from his uncle and kept the small shop open until he was eighty.",
    "Nothing in the contract says who pays for the delay, so both sides have asked a lawyer.",
)


def texts_of_length(tokenizer, texts: Sequence[str], batch: int, length: int) -> list[str]:
    """`batch` texts of exactly `length` tokens, special ones included, when cut to it.

    Each runs on from another of `texts` and ends where it is just long enough, so that timing a tokenizer on it times
    `length` tokens and not what is cut off.
    """

    def tokens(text: str) -> int:
        return len(tokenizer(text, truncation=True, max_length=length)["input_ids"])

    found = []
    for row in range(batch):
        text = ""
        for i in count(row):
            text += texts[i % len(texts)] + " "
            if tokens(text) == length:
                break
        end = bisect_left(range(len(text)), length, key=lambda end, text=text: tokens(text[:end]))
        found.append(text[:end])
    return found


def encode(tokenizer, texts: Sequence[str], length: int, pairs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask` and perhaps `token_type_ids`, int64 (B, L), cut to `length` and padded to the
    longest."""
    second = () if pairs is None else (list(pairs),)
    encoded = tokenizer(
        list(texts), *second, truncation=True, max_length=length, padding=True, return_tensors="np", verbose=False
    )
    known = ("input_ids", "attention_mask", "token_type_ids")
    return {name: np.asarray(encoded[name], dtype=np.int64) for name in known if name in encoded}
