"""A page with two attributions of the same examples."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastkd.data import train_wordpiece
from fastkd.explain import ShownExample, side_by_side, spelled

PAIR = ShownExample(
    texts=[[" good", " <script>alert('x')</script>"], [" film", "s", "&amp;"]],
    scores={
        "teacher": torch.tensor([0.5, 1.0, -0.25, 0.0, 0.0]),
        "student & co": torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]),
    },
    label="<equivalent>",
    predictions={"teacher": "equivalent, 97%", "student & co": "not_equivalent, 51%"},
    figures={"cosine": "0.93"},
)
ALONE = ShownExample([[" bad"]], {"teacher": torch.tensor([-2.0]), "student & co": torch.tensor([0.0])})
_VOID = {"meta"}


class Reader(HTMLParser):
    """Tags, the texts of elements by tag, and whether all that is opened is closed again in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.spans = [], [], {}, []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "span":
            self.spans.append(dict(attributes))
        if tag not in _VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


def _read(folder, *examples, **how):
    side_by_side(folder / "page.html", examples, **how)
    reader = Reader()
    reader.feed((folder / "page.html").read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def test_every_example_stands_there_once_for_each_attribution_as_text(tmp_path):
    page = _read(tmp_path, PAIR, ALONE)
    assert "script" not in page.tags and page.tags.count("table") == page.tags.count("section") == 2
    assert page.tags.count("tr") == 4 and len(page.spans) == 2 * (5 + 1)
    assert page.texts["h2"] == ["1: <equivalent>", "2"]


def test_the_texts_of_a_pair_stand_apart_and_the_pieces_of_a_word_together(tmp_path):
    texts = [text for text in _read(tmp_path, PAIR).texts["p"] if "script" in text or "film" in text]
    assert texts == ["good <script>alert('x')</script>", "films&amp;"] * 2


def test_predictions_stand_with_their_model_and_figures_at_the_side(tmp_path):
    page = _read(tmp_path, PAIR)
    assert page.texts["th"] == ["teacherequivalent, 97%", "student & conot_equivalent, 51%"]
    assert (page.texts["dt"], page.texts["dd"]) == (["cosine"], ["0.93"])


def test_the_heading_says_what_is_compared(tmp_path):
    page = _read(tmp_path, ALONE, title="Explanations: sst2 <>", about={"teacher": "bert & more", "student": "small"})
    assert page.texts["title"] == page.texts["h1"] == ["Explanations: sst2 <>"]
    assert page.texts["dt"] == ["teacher", "student"] and page.texts["dd"] == ["bert & more", "small"]


def test_colour_is_the_share_of_the_largest_score_and_its_sign(tmp_path):
    spans = _read(tmp_path, PAIR).spans[:5]
    assert [span["class"] for span in spans] == ["for", "for", "against", "for", "for"]
    assert [span["style"] for span in spans] == [f"--share: {s}" for s in ("0.500", "1.000", "0.250", "0.000", "0.000")]
    assert [span["title"] for span in spans] == ["0.5", "1", "-0.25", "0", "0"]


def test_the_legend_knows_whether_scores_have_a_sign(tmp_path):
    lengths = replace(ALONE, scores={name: scores.abs() for name, scores in ALONE.scores.items()})
    assert "speaks against it" in " ".join(_read(tmp_path, ALONE).texts["i"])
    assert _read(tmp_path, lengths).texts["i"] == ["matters to what is explained"]


def test_the_page_is_one_file_for_light_and_dark_screens(tmp_path):
    page = _read(tmp_path, PAIR)
    assert "prefers-color-scheme: dark" in page.texts["style"][0]
    assert not {"link", "img", "script"} & set(page.tags)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_an_example_without_tokens_is_a_row_without_tokens(tmp_path):
    assert not _read(tmp_path, ShownExample([[]], {"teacher": torch.zeros(0)})).spans


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"teacher": torch.ones(4)}}, "teacher, example 1: 4 scores for 5 tokens"),
        ({"scores": {"teacher": torch.full((5,), torch.nan)}}, "teacher, example 1: scores are NaN"),
        ({"texts": ["good film"]}, "example 1: texts=.*; a list of tokens for each text is needed"),
    ],
)
def test_what_does_not_fit_writes_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        side_by_side(tmp_path / "page.html", [ALONE, replace(PAIR, **change)])
    assert not list(tmp_path.iterdir())


# Tokens as text

TEXT = "the unfilmable film, isn't it"


def _byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _sentence_pieces():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator([TEXT] * 9, trainers.UnigramTrainer(vocab_size=40, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [_byte_level, _sentence_pieces])
def test_marks_of_spaces_are_spaces(make):
    tokenizer = make()
    pieces = spelled(tokenizer, tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert "".join(pieces).strip() == TEXT and len(pieces) > len(TEXT.split())


def test_the_pieces_of_a_word_are_spelled_without_their_marks():
    tokenizer = train_wordpiece([TEXT], 32)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert any(token.startswith("##") for token in tokenizer.convert_ids_to_tokens(ids))
    pieces = spelled(tokenizer, ids)
    assert "".join("".join(pieces).split()) == TEXT.replace(" ", "")
    assert "".join(pieces).split()[:2] == ["the", "unfilmable"]
