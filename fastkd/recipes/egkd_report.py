"""How far teacher and student agree in what they look at: figures on the evaluation split, and a page of sentences."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fastkd.explain import consistency, gradient_attribution, linear_explanation, side_by_side
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_teacher import batches_of, classifier_of

_SHOWN = 12  # sentences


def explanation_report(
    teacher, student, tokenizer, data, args: EgkdConfig, page: str | Path | None = None
) -> dict[str, dict[str, float]]:
    """`Consistency` of teacher and student by the explainer it is of: "gradient", and "perturbation" where that branch
    weighs something. Compared are the scores that the teacher's prediction has from tokens that are neither special nor
    padding.

    teacher, student: models with heads. data: a split from `Task.tokenize`.
    page: where a few sentences are shown with the gradient scores of both.
    """
    models = {"teacher": teacher, "student": student}
    models = {name: classifier_of(model.eval().to(args.device), tokenizer) for name, model in models.items()}
    kinds = ["gradient", *(["perturbation"] if "perturbation" in args.explaining else [])]
    found = {kind: {name: [] for name in models} for kind in kinds}
    words, ids = [], []
    batches = batches_of(data, tokenizer, args)
    for inputs in batches:
        maskable = models["teacher"].maskable(inputs)
        words += maskable.cpu().unbind()
        ids += inputs["input_ids"].cpu().unbind()
        with torch.no_grad():
            classes = models["teacher"].logits(inputs).argmax(1)
            for kind in kinds:
                for name, model in models.items():
                    scores = _explain(kind, model, inputs, args, classes).masked_fill(~maskable, 0)
                    found[kind][name] += scores.float().cpu().unbind()
    mask = _padded(words)
    report = {
        kind: dataclasses.asdict(consistency(_padded(scores["student"]), _padded(scores["teacher"]), mask))
        for kind, scores in found.items()
    }
    if page is not None:
        shown = torch.tensor(batches.order).argsort()[:_SHOWN].tolist()  # the first of the data
        side_by_side(
            page,
            [tokenizer.convert_ids_to_tokens(ids[i][words[i]].tolist()) for i in shown],
            {name: [scores[i][words[i]] for i in shown] for name, scores in found["gradient"].items()},
        )
    return report


def _explain(kind: str, model, inputs: dict, args: EgkdConfig, classes: Tensor) -> Tensor:
    if kind == "gradient":
        return gradient_attribution(model, inputs, args.explainer, target=classes)
    return linear_explanation(model, inputs, args.mask_pool, target=classes, baseline=args.mask_baseline)


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
