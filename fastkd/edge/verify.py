"""Whether an exported file computes what torch computes, on real token ids of several batch sizes and lengths."""

from dataclasses import dataclass

import numpy as np

from fastkd.edge.runtimes import Runtime

# Of the largest number that torch gives. int8 rounds weights and activations; a graph that is wrong is off by more.
BOUNDS = {"fp32": 1e-4, "int8": 0.25}
_SHAPES = ((1, 1), (1, 16), (3, 33), (8, 9))
LONGEST = 512  # tokens, where a model has more positions: attention takes their square in memory
_TEXTS = 16


@dataclass(frozen=True)
class Verification:
    """cases: batch, length, kind ("ids drawn" or "texts") and the largest difference of each. difference: the largest
    of them. relative: that by the largest number which torch gave. bound: what `relative` may be."""

    cases: list[dict]
    difference: float
    relative: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.bound  # false for NaN


def token_batches(tokenizer, reference: Runtime, texts: list[str]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Batches of ids drawn from the tokenizer's vocabulary, one token to the longest length, padded to different
    lengths, and one of `texts`; the same ones every time."""
    draw = np.random.default_rng(0)
    padding = tokenizer.pad_token_id or 0
    known = np.array(sorted({id for id in tokenizer.get_vocab().values() if id < reference.vocabulary} - {padding}))
    longest = min(reference.max_length or LONGEST, LONGEST)
    found = []
    for batch, length in (*((batch, min(length, longest)) for batch, length in _SHAPES), (2, longest)):
        ids = draw.choice(known, (batch, length))
        lengths = np.linspace(length, 1, batch).astype(int)
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        types = (np.arange(length) >= (lengths[:, None] + 1) // 2) * mask * (reference.types > 1)
        ids = np.where(mask, ids, padding)
        found.append(("ids drawn", {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}))
    if texts:
        encoded = tokenizer(
            texts[:_TEXTS], padding=True, truncation=True, max_length=longest, return_tensors="np", verbose=False
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        found.append(("texts", {name: encoded[name] for name in names if name in encoded}))
    return found


def verify(exported: Runtime, reference: Runtime, tokenizer, texts: list[str], bound: float) -> Verification:
    """Run both on the batches of `token_batches` and compare."""
    cases, largest = [], 0.0
    for kind, batch in token_batches(tokenizer, reference, texts):
        expected, got = reference(**batch), exported(**batch)
        if got.shape != expected.shape:
            raise ValueError(f"{exported.name} gives {got.shape} where torch gives {expected.shape}")
        rows, length = batch["input_ids"].shape
        difference = float(np.abs(got - expected).max())
        cases.append({"batch": rows, "length": length, "kind": kind, "difference": difference})
        largest = max(largest, float(np.abs(expected).max()))
    difference = float(np.max([case["difference"] for case in cases]))  # NaN if one is
    return Verification(cases, difference, difference / max(largest, np.finfo(np.float32).tiny), bound)
