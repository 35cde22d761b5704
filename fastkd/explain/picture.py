"""A page with sentences whose tokens are coloured by two attributions, one above the other."""

import html
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #111; background: #fff }
table { border-collapse: collapse; margin-bottom: 1.5em; width: 100% }
td { border-top: 1px solid #ddd; padding: .2em .6em; vertical-align: top }
td:first-child { color: #666; white-space: nowrap; width: 1% }
span { border-radius: 3px; padding: .1em .15em }
"""
_FOR, _AGAINST = (214, 96, 77), (67, 147, 195)


def side_by_side(
    path: str | Path,
    tokens: Sequence[Sequence[str]],
    attributions: dict[str, Sequence[Tensor]],
    notes: Sequence[str] = (),
) -> None:
    """Write an HTML page, whole or not at all: each sentence once for every attribution, red for tokens that speak for
    the class and blue for those against it, as strong as their share of the sentence's largest score.

    Args:
        path: of the page; a file of that name is replaced.
        tokens: of each sentence, as text; it is escaped.
        attributions: {"teacher": [(n,) scores of each sentence], "student": ...}, one score for each token.
        notes: a line above each sentence, such as its label.

    Raises ValueError, before anything is written, where numbers of sentences or tokens differ or scores are NaN or
    infinite.
    """
    if notes and len(notes) != len(tokens):
        raise ValueError(f"{len(notes)} notes for {len(tokens)} sentences")
    for name, scores in attributions.items():
        if len(scores) != len(tokens):
            raise ValueError(f"{name}: attributions of {len(scores)} sentences, {len(tokens)} are given")
        for i, (words, values) in enumerate(zip(tokens, scores, strict=True)):
            if len(words) != len(values):
                raise ValueError(f"{name}, sentence {i}: {len(values)} scores for {len(words)} tokens")
            if not torch.as_tensor(values).isfinite().all():
                raise ValueError(f"{name}, sentence {i}: scores are NaN or infinite")
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>Attributions</title><style>{_STYLE}</style>',
    ]
    for i, words in enumerate(tokens):
        parts.append(f"<p>{html.escape(notes[i])}</p>" if notes else "")
        rows = (f"<tr><td>{html.escape(name)}<td>{_line(words, s[i])}" for name, s in attributions.items())
        parts.append(f"<table>{''.join(rows)}</table>")
    unfinished = Path(f"{path}.unfinished")
    try:
        unfinished.write_text("\n".join(part for part in parts if part) + "</html>\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _line(words: Sequence[str], scores: Tensor) -> str:
    scores = torch.as_tensor(scores, dtype=torch.float64)
    shares = (scores / scores.abs().max().clamp(min=1e-300)).tolist() if len(scores) else []
    return " ".join(
        f'<span style="background: rgba{(*(_FOR if share > 0 else _AGAINST), round(abs(share), 3))}" '
        f'title="{score:.4g}">{html.escape(word)}</span>'
        for word, score, share in zip(words, scores.tolist(), shares, strict=True)
    )
