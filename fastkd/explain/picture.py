"""A page with examples whose tokens are coloured by two attributions, one above the other."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastkd.whole_file import whole_file

_STYLE = """
:root { color-scheme: light dark; --ink: #111; --paper: #fff; --soft: #595959; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #161616; --soft: #aaa; --line: #444 } }
body { font: 15px/1.8 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.4em } h2 { font-size: 1em; margin: 0 }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 0 1em }
dt, small { color: var(--soft) } dd { margin: 0 }
section { border-top: 1px solid var(--line); padding: .8em 0 }
.example { display: flex; flex-wrap: wrap; gap: 0 2em; align-items: start }
table { border-collapse: collapse; flex: 1 1 30em }
th, td { padding: .2em .6em .2em 0; text-align: left; vertical-align: top; font-weight: normal }
th { white-space: nowrap; width: 9em } small { display: block; line-height: 1.2 }
td p { margin: 0 } td p + p { border-top: 1px dashed var(--line) }
.for, .against { border-radius: 3px; padding: .1em 0 }
i { font-style: normal }
.for { background: rgb(214 96 77 / calc(.75 * var(--share))) }
.against { background: rgb(67 147 195 / calc(.75 * var(--share))) }
"""
_SIGNED = "speaks for what is explained", "speaks against it"
_UNSIGNED = "matters to what is explained"
_STRENGTH = "The stronger the colour, the nearer to the largest score of the example; point at a token to read its own."


@dataclass(frozen=True)
class ShownExample:
    """What the page shows of an example.

    Attributes:
        texts: one text, or the two of a pair, each its tokens as `spelled` gives them.
        scores: {"teacher": (n,), "student": (n,)}: a score for each token of all texts.
        label: what stands above it.
        predictions: {"teacher": "positive", ...}, what each of them predicts; may be left out.
        figures: {"cosine": "0.93", ...}, what stands at its side; may be left out.
    """

    texts: Sequence[Sequence[str]]
    scores: Mapping[str, Tensor]
    label: str = ""
    predictions: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)


def spelled(tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as it stands in a text, with a space before it where a word begins: WordPiece's ## is gone, and so are
    the marks by which byte-level BPE and SentencePiece write spaces. A part of a character is shown as �."""
    before = "a"  # the first token of a text would lose its space, or keep its ##
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return [tokenizer.convert_tokens_to_string([before, token])[len(before) :] for token in tokens]


def side_by_side(
    path: str | Path,
    examples: Sequence[ShownExample],
    *,
    title: str = "Attributions",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write an HTML page, one file, whole or not at all: each example once for every attribution, red for tokens that
    speak for the class and blue for those against it, as strong as their share of the example's largest score.

    Args:
        path: of the page; a file of that name is replaced.
        examples: all text in them is escaped.
        title: its heading.
        about: {"teacher": ..., "explained": ...}, lines below the heading.

    Raises ValueError, before anything is written, where numbers of tokens and scores differ or scores are NaN or
    infinite.
    """
    for i, example in enumerate(examples):
        _check(i, example)
    signed = any((torch.as_tensor(scores) < 0).any() for example in examples for scores in example.scores.values())
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        _listed(about or {}),
        _legend(signed),
        *(_section(i, example) for i, example in enumerate(examples, 1)),
        "</body></html>",
    ]
    with whole_file(path) as unfinished:
        unfinished.write_text("\n".join(line for line in lines if line) + "\n", encoding="utf-8")


def _check(i: int, example: ShownExample) -> None:
    if isinstance(example.texts, str) or any(isinstance(text, str) for text in example.texts):
        raise ValueError(f"example {i}: texts={example.texts!r}; a list of tokens for each text is needed")
    tokens = sum(map(len, example.texts))
    for name, scores in example.scores.items():
        if len(scores) != tokens:
            raise ValueError(f"{name}, example {i}: {len(scores)} scores for {tokens} tokens")
        if not torch.as_tensor(scores).isfinite().all():
            raise ValueError(f"{name}, example {i}: scores are NaN or infinite")


def _section(number: int, example: ShownExample) -> str:
    rows = []
    for name, scores in example.scores.items():
        predicted = example.predictions.get(name)
        said = f"<small>{html.escape(predicted)}</small>" if predicted else ""
        rows.append(f'<tr><th scope="row">{html.escape(name)}{said}</th><td>{_texts(example.texts, scores)}</td></tr>')
    label = f": {html.escape(example.label)}" if example.label else ""
    table = f"<table><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>{number}{label}</h2><div class="example">{table}{_listed(example.figures)}</div></section>'


def _texts(texts: Sequence[Sequence[str]], scores: Tensor) -> str:
    scores = torch.as_tensor(scores, dtype=torch.float64)
    largest = scores.abs().max().clamp(min=1e-300) if len(scores) else 1
    shares = (scores.abs() / largest).tolist()
    tokens = zip(scores.tolist(), shares, strict=True)
    return "".join(f"<p>{''.join(_token(piece, *next(tokens)) for piece in text).strip()}</p>" for text in texts)


def _token(piece: str, score: float, share: float) -> str:
    """Its space stands before its colour, so that the pieces of a word are one."""
    text = piece.lstrip(" ")
    space = " " if len(text) < len(piece) else ""
    kind = "against" if score < 0 else "for"
    return f'{space}<span class="{kind}" style="--share: {share:.3f}" title="{score:.4g}">{html.escape(text)}</span>'


def _legend(signed: bool) -> str:
    kinds = zip(("for", "against"), _SIGNED if signed else (_UNSIGNED,), strict=False)
    marks = ", ".join(f'<i class="{kind}" style="--share: 1">{meaning}</i>' for kind, meaning in kinds)
    return f"<p>{marks}. {_STRENGTH}</p>"


def _listed(lines: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(text))}</dd>" for name, text in lines.items())
    return f"<dl>{items}</dl>" if items else ""
