"""How far teacher and student agree in what they look at: figures on the evaluation split, and a page of sentences."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastkd.explain import (
    Classifier,
    ShownExample,
    WordAlignment,
    by_chance,
    consistency,
    explanation_of_logits,
    masked_logits,
    side_by_side,
    spelled,
)
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_teacher import batches_of, classifier_of
from fastkd.recipes.egkd_units import units_of

_SHOWN = 12  # examples
_FIGURES = {"cosine": "cosine", "spearman": "Spearman", "overlap": "overlap of the top tokens"}


@dataclass
class _Explained:
    """What was found of each example, in the order of the data.

    Attributes:
        ids: (L,) each, the teacher's tokens. words: (U,) each, what is compared: some of these tokens, or its words.
        logits: by model, (C,) each. scores: by kind and model, (U,) each, 0 where nothing is compared.
    """

    ids: list[Tensor] = field(default_factory=list)
    words: list[Tensor] = field(default_factory=list)
    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    scores: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)


def explanation_report(
    teacher,
    student,
    tokenizer,
    data,
    args: EgkdConfig,
    page: str | Path | None = None,
    task: str | None = None,
    *,
    student_reads: tuple | None = None,
    alignment: WordAlignment | None = None,
) -> dict[str, dict]:
    """How alike teacher and student explain, by the explainer: {"gradient": ..}, and {"perturbation": ..} beside it
    where that branch weighs something. Each is a `fastkd.explain.Consistency` as a dict, "cosine", "spearman",
    "overlap", "sequences" and "undefined", and beside these "by_chance", a dict of the first three as unrelated
    explanations would have them (`fastkd.explain.by_chance`). Compared are the scores that the teacher's prediction has
    from tokens that are neither special nor padding, or from words.

    teacher, student: models with heads. data: a split from `Task.tokenize`.
    page: where a few examples are shown with the gradient scores of both. task: its name, for the page's heading.
    student_reads: the student's tokenizer and its split, where they are not the teacher's; other tokens need an
        `alignment`.
    alignment: of the split, to compare words; None compares tokens.

    Raises ValueError for a model that offers no embeddings, an alignment of other data, a class that the teacher
    predicts and the student has not (on the CPU), and scores that are NaN or infinite: before a page is written.
    """
    models = {"teacher": teacher, "student": student}
    reads = {"teacher": (tokenizer, data), "student": student_reads or (tokenizer, data)}
    if alignment is not None:
        reads = {name: (own, alignment.with_words(name, split)) for name, (own, split) in reads.items()}
    classifiers = {name: classifier_of(model.eval().to(args.device), reads[name][0]) for name, model in models.items()}
    order = batches_of(data, tokenizer, args).order
    batches = {name: batches_of(split, own, args, order) for name, (own, split) in reads.items()}
    kinds = ["gradient", *(["perturbation"] if "perturbation" in args.explaining else [])]
    found = _explain(classifiers, kinds, batches, args)
    report = {kind: _compared(scores, found.words) for kind, scores in found.scores.items()}
    if page is not None:
        explainer = args.explainer
        about = {name: _described(model) for name, model in models.items()}
        score = "output" if teacher.config.num_labels == 1 else explainer.score
        how = f"{explainer.method} of the {score}".replace("_", " ")
        about["explained"] = f"what the teacher predicts, by {how}"
        about |= {f"{kind} explanations agree": agreement(figures) for kind, figures in report.items()}
        title = "Explanations of teacher and student" + (f": {task}" if task else "")
        examples = []
        for i in range(min(_SHOWN, len(found.ids))):
            if alignment is None:
                texts = _spelled(found.ids[i], found.words[i], tokenizer)
            else:
                texts = [[f" {word}" for word in text] for text in alignment.words[i]]
            examples.append(_shown(i, texts, found, data, teacher.config))
        side_by_side(page, examples, title=title, about=about)
    return report


def agreement(figures: Mapping) -> str:
    """One explainer's part of the report, in words."""
    each = [
        f"{title} {figures[name]:.3f} (by chance {figures['by_chance'][name]:.3f})" for name, title in _FIGURES.items()
    ]
    return f"{', '.join(each)}; {figures['sequences']} examples, {figures['undefined']} of them without an order"


def _explain(
    classifiers: dict[str, Classifier], kinds: Sequence[str], batches: dict[str, batches_of], args: EgkdConfig
) -> _Explained:
    found = _Explained(
        logits={name: [] for name in classifiers}, scores={kind: {name: [] for name in classifiers} for kind in kinds}
    )
    for both in zip(*batches.values(), strict=True):
        inputs = dict(zip(batches, both, strict=True))
        maskable = units_of(inputs["teacher"]).maskable(inputs["teacher"], classifiers["teacher"].special_ids)
        found.ids += inputs["teacher"]["input_ids"].cpu().unbind()
        found.words += maskable.cpu().unbind()
        with torch.no_grad():
            logits = {name: classifier.logits(inputs[name]) for name, classifier in classifiers.items()}
            classes = logits["teacher"].argmax(1)
            for name, classifier in classifiers.items():
                found.logits[name] += logits[name].float().cpu().unbind()
                for kind in kinds:
                    scores = _attribution(kind, classifier, inputs[name], args, classes).masked_fill(~maskable, 0)
                    found.scores[kind][name] += scores.float().cpu().unbind()
    places = torch.tensor(batches["teacher"].order).argsort().tolist()

    def sort(rows):
        return (
            {name: sort(part) for name, part in rows.items()} if isinstance(rows, dict) else [rows[i] for i in places]
        )

    return _Explained(*(sort(getattr(found, part.name)) for part in dataclasses.fields(found)))


def _attribution(kind: str, classifier: Classifier, inputs: dict, args: EgkdConfig, classes: Tensor) -> Tensor:
    units = units_of(inputs)
    if kind == "gradient":
        return units.attribution(classifier, inputs, args.explainer, target=classes)
    maskable = units.maskable(inputs, classifier.special_ids)
    kept = units.over_tokens(args.mask_pool.spread(maskable))
    logits = masked_logits(classifier, inputs, kept, baseline=args.mask_baseline)
    return explanation_of_logits(logits, args.mask_pool, maskable, target=classes)


def _compared(scores: dict[str, list[Tensor]], words: list[Tensor]) -> dict:
    student, teacher, mask = (_padded(rows) for rows in (scores["student"], scores["teacher"], words))
    unrelated = dataclasses.asdict(by_chance(teacher, mask))
    alike = dataclasses.asdict(consistency(student, teacher, mask))
    return alike | {"by_chance": {name: unrelated[name] for name in _FIGURES}}


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _spelled(ids: Tensor, words: Tensor, tokenizer) -> list[list[str]]:
    """The tokens (L,) that are compared, of each text."""
    places = words.nonzero()[:, 0]
    # Between the texts of a pair stand special tokens.
    begins = [0, *(n for n in range(1, len(places)) if places[n] - places[n - 1] > 1), len(places)]
    return [spelled(tokenizer, ids[places[one:other]].tolist()) for one, other in itertools.pairwise(begins)]


def _shown(i: int, texts: list[list[str]], found: _Explained, data, config) -> ShownExample:
    """Example i of the data for the page."""
    words = found.words[i]
    scores = {name: rows[i][words] for name, rows in found.scores["gradient"].items()}
    figures = consistency(scores["student"][None], scores["teacher"][None], words[words][None])
    return ShownExample(
        texts,
        scores,
        f"label {_named(data['labels'][i], config)}" if "labels" in data.column_names else "",
        {name: f"predicts {_prediction(rows[i], config)}" for name, rows in found.logits.items()},
        {title: f"{getattr(figures, name):.2f}" for name, title in _FIGURES.items()},
    )


def _named(label: float, config) -> str:
    """A label as people know it, or the value of a regression."""
    return f"{label:.2f}" if config.num_labels == 1 else str(config.id2label[label])


def _prediction(logits: Tensor, config) -> str:
    if config.num_labels == 1:
        return _named(logits.item(), config)
    share, label = logits.softmax(0).max(0)
    return f"{_named(int(label), config)}, {share:.0%}"


def _described(model) -> str:
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.name_or_path or 'a model'} ({type(model).__name__}, {size / 1e6:.1f} million parameters)"
