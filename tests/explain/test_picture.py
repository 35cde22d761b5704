"""A page with two attributions of the same sentences."""

from html.parser import HTMLParser

import pytest
import torch

from fastkd.explain import side_by_side

TOKENS = [["[CLS]", "<script>alert('x')</script>", "good", "&amp;"], ["bad"]]
SCORES = {
    "teacher": [torch.tensor([0.0, 0.5, 1.0, -0.25]), torch.tensor([-2.0])],
    "student & co": [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0])],
}


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.styles = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "span":
            self.styles.append(dict(attributes)["style"])

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def _read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_every_token_stands_there_once_for_each_attribution_as_text(tmp_path):
    side_by_side(tmp_path / "page.html", TOKENS, SCORES, notes=["label: <1>", "label: 0"])
    page = _read(tmp_path / "page.html")
    assert "script" not in page.tags
    for word in (*TOKENS[0], *TOKENS[1]):
        assert page.texts.count(word) == 2
    assert page.texts.count("student & co") == 2 and "label: <1>" in page.texts


def test_colour_is_the_share_of_the_largest_score_and_its_sign(tmp_path):
    side_by_side(tmp_path / "page.html", TOKENS[:1], {"teacher": SCORES["teacher"][:1]})
    assert _read(tmp_path / "page.html").styles == [
        "background: rgba(67, 147, 195, 0.0)",
        "background: rgba(214, 96, 77, 0.5)",
        "background: rgba(214, 96, 77, 1.0)",
        "background: rgba(67, 147, 195, 0.25)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": SCORES["teacher"][:1]}, "attributions of 1 sentences, 2 are given"),
        ({"teacher": [torch.ones(3), torch.ones(1)]}, "sentence 0: 3 scores for 4 tokens"),
        ({"teacher": [torch.full((4,), torch.nan), torch.ones(1)]}, "sentence 0: scores are NaN"),
    ],
)
def test_bad_scores_write_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        side_by_side(tmp_path / "page.html", TOKENS, change)
    assert not list(tmp_path.iterdir())


def test_notes_belong_to_sentences(tmp_path):
    with pytest.raises(ValueError, match="1 notes for 2 sentences"):
        side_by_side(tmp_path / "page.html", TOKENS, SCORES, notes=["one"])
