"""How far teacher and student agree: figures over words, their level by chance, and the page."""

import html
import re

import pytest
import torch
from datasets import Dataset

import fastkd
from fastkd.explain import WordAlignment, by_chance, consistency, gradient_attribution
from fastkd.recipes import EgkdConfig
from fastkd.recipes.egkd_report import agreement, explanation_report
from fastkd.recipes.egkd_teacher import classifier_of

TEXTS = ["the film was superb and charming", "a boring plot", "good"]
SECONDS = ["it was a great scene", "dreadful story with a clumsy actor", "fine music"]


@pytest.fixture
def config(settings):
    return EgkdConfig(**settings(pool={"samples": 4}, branches={"gradient": 1.0, "perturbation": 1.0}))


@pytest.fixture
def report(make_teacher, tokenizer, config, tmp_path):
    """report(labels, pairs=.., ..): the figures, and the page's text without tags, a line for each block."""

    def make(labels, pairs=None, data=None, on_words=False, **changes):
        teacher = make_teacher(dropout=0.0, **changes)
        if data is None:
            encoded = dict(tokenizer(TEXTS, pairs, truncation=True, max_length=32))
            data = Dataset.from_dict(encoded | {"labels": labels})
        student = fastkd.create_student(teacher, layers=2)
        page = tmp_path / "explanations.html"
        words = WordAlignment.of(tokenizer, tokenizer, TEXTS, pairs, max_length=32) if on_words else None
        found = explanation_report(teacher, student, tokenizer, data, config, page, "mrpc", alignment=words)
        blocks = re.split(r"</(?:p|h1|h2|dd|dt|small|th|td)>|<small>", page.read_text().partition("<body>")[2])
        lines = [html.unescape(re.sub("<[^>]*>", "", block)).strip() for block in blocks]
        return found, [line for line in lines if line]

    return make


def test_words_alone_are_compared(report, make_teacher, tokenizer, config):
    """The figures are those of scores without special tokens and padding, and the level by chance is of the same."""
    found, _ = report([0, 1, 0])
    models = [make_teacher(dropout=0.0), fastkd.create_student(make_teacher(dropout=0.0), layers=2)]
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    classes = models[0](**inputs).logits.argmax(1)
    teacher, student = (
        gradient_attribution(classifier_of(model.eval(), tokenizer), inputs, config.explainer, target=classes)
        for model in models
    )
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])
    words = (inputs["input_ids"][..., None] != special).all(-1)
    expected, chance = consistency(student, teacher, words), by_chance(teacher, words)
    figures = found["gradient"]
    for name in ("cosine", "spearman", "overlap"):
        assert figures[name] == pytest.approx(getattr(expected, name), abs=1e-5)
        assert figures["by_chance"][name] == pytest.approx(getattr(chance, name), abs=1e-5)
    assert figures["sequences"] == 3 and set(found) == {"gradient", "perturbation"}


def test_the_page_names_task_models_and_figures(report):
    found, lines = report([0, 1, 0])
    assert lines[0] == "Explanations of teacher and student: mrpc"
    assert lines[1] == "teacher" and "BertForSequenceClassification" in lines[2] and lines[3] == "student"
    assert "what the teacher predicts, by gradient x input of the log probability" in lines
    for kind, figures in found.items():
        assert lines[lines.index(f"{kind} explanations agree") + 1] == agreement(figures)
        assert f"cosine {figures['cosine']:.3f} (by chance {figures['by_chance']['cosine']:.3f})" in agreement(figures)


def test_each_text_stands_with_its_label_the_predictions_and_its_figures(report):
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    _, lines = report([0, 1, 0], **names)
    assert [line for line in lines if re.match(r"\d: ", line)] == [
        "1: label negative",
        "2: label positive",
        "3: label negative",
    ]
    assert sum(bool(re.fullmatch(r"predicts (negative|positive), \d+%", line)) for line in lines) == 6
    assert lines.count("the film was superb and charming") == 2  # a row of each model
    assert lines.count("cosine") == lines.count("Spearman") == 3


@pytest.mark.parametrize("on_words", [False, True], ids=["tokens", "words"])
def test_the_texts_of_a_pair_stand_apart(report, on_words):
    _, lines = report([0, 1, 0], pairs=SECONDS, on_words=on_words)
    for text in (*TEXTS, *SECONDS):
        assert lines.count(text) == 2, text


def test_a_regression_shows_its_values(report):
    _, lines = report([0.5, 4.25, 3.0], num_labels=1, problem_type="regression")
    assert {"1: label 0.50", "2: label 4.25", "3: label 3.00"} <= set(lines)
    assert sum(bool(re.fullmatch(r"predicts -?\d\.\d\d", line)) for line in lines) == 6


def test_rows_belong_to_the_examples_in_the_order_of_the_data(report, tokens):
    """Batches are grouped by length."""
    _, lines = report(None, data=tokens["validation"])
    shown = [line.split(": ")[1] for line in lines if re.match(r"\d+: ", line)]
    assert shown == [f"label LABEL_{label}" for label in tokens["validation"]["labels"][:12]]
