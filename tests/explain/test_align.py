"""Explanations on words: a byte-level BPE teacher and a WordPiece student, both built here."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fastkd.data import train_wordpiece
from fastkd.explain import (
    Classifier,
    Fingerprint,
    GradientSettings,
    MaskPool,
    TeacherResults,
    WordAlignment,
    align,
    central_difference,
    check_tokenizers,
    compute_results,
    consistency,
    distance,
    gradient_attribution,
    masked_logits,
    normalise,
    pad_words,
    tokens_of_words,
    word_mask,
    word_scores,
)

TEXTS = ["The film isn't bad,  it's really good-natured!", "Él comió en un café naïve", "ok 🙂 then"]
NONE = -1


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 120)


@pytest.fixture(scope="module")
def bpe(train_bpe):
    return train_bpe(TEXTS, 320)


class SlowTokenizer:
    """What transformers' slow tokenizers have in common."""

    is_fast, name_or_path = False, "slow-one"

    def __len__(self):
        return 7


def _spelled(tokenizer, text, row):
    """The text that the tokens of each word cover."""
    spans = {}
    for word, span in zip(row, tokenizer([text]).encodings[0].offsets, strict=True):
        spans.setdefault(word, []).append(span)
    return [text[spans[word][0][0] : spans[word][-1][1]].strip() for word in sorted(spans) if word != NONE]


# Which tokenizers may be compared


def test_equal_tokenizers_need_no_alignment(wordpiece):
    check_tokenizers(wordpiece, wordpiece)


def test_other_vocabularies_are_refused_by_name_unless_words_are_asked_for(wordpiece, bpe):
    with pytest.raises(
        ValueError, match=r"teacher \(.*\) and of the student \(.*\) have different vocabularies.*align"
    ):
        check_tokenizers(bpe, wordpiece)
    check_tokenizers(bpe, wordpiece, "words")


def test_one_vocabulary_with_other_cuts_is_refused_too(wordpiece):
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(wordpiece.backend_tokenizer.to_str()))
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="one vocabulary and cut texts differently"):
        check_tokenizers(wordpiece, other)


def test_another_alignment_is_refused(wordpiece):
    with pytest.raises(ValueError, match="align='sentences'; allowed are null and words"):
        check_tokenizers(wordpiece, wordpiece, "sentences")


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_slow_tokenizer_is_refused_by_name(wordpiece, side):
    pair = {"teacher": wordpiece, "student": wordpiece, side: SlowTokenizer()}
    with pytest.raises(ValueError, match=rf"the {side}'s tokenizer \(slow-one, 7 tokens\) is a slow one"):
        WordAlignment.of(pair["teacher"], pair["student"], TEXTS, max_length=64)


@pytest.mark.parametrize(
    ("texts", "pairs", "max_length", "message"),
    [
        ("a film", None, 8, "texts: a list of strings is needed"),
        (["a", None], None, 8, "texts: a list of strings is needed"),
        (["a"], "b", 8, "pairs: a list of strings is needed"),
        (["a"], ["b", "c"], 8, "2 pairs for 1 texts"),
        (["a"], None, 0, "max_length=0"),
    ],
)
def test_texts_that_are_none_are_refused(wordpiece, texts, pairs, max_length, message):
    with pytest.raises(ValueError, match=message):
        WordAlignment.of(wordpiece, wordpiece, texts, pairs, max_length=max_length)


# Which word a token belongs to


def test_words_are_what_stands_between_spaces(wordpiece, bpe):
    found = WordAlignment.of(bpe, wordpiece, TEXTS, max_length=64)
    assert found.words == [[text.split()] for text in TEXTS]
    for tokenizer, rows in ((bpe, found.teacher), (wordpiece, found.student)):
        for text, row in zip(TEXTS, rows, strict=True):
            assert _spelled(tokenizer, text, row) == text.split()


def test_special_tokens_and_spaces_are_of_no_word(wordpiece, bpe):
    text = "The  film "
    found = WordAlignment.of(bpe, wordpiece, [text], max_length=64)
    for tokenizer, [row] in ((bpe, found.teacher), (wordpiece, found.student)):
        encoding = tokenizer([text]).encodings[0]
        blank = [
            which is None or not text[begin:end].strip()
            for which, (begin, end) in zip(encoding.sequence_ids, encoding.offsets, strict=True)
        ]
        assert [word == NONE for word in row] == blank and sum(blank) >= 2


def test_the_words_of_a_second_text_come_after_the_firsts(wordpiece, bpe):
    found = WordAlignment.of(bpe, wordpiece, ["ok bad"], ["bad café film"], max_length=64)
    assert found.words == [[["ok", "bad"], ["bad", "café", "film"]]]
    for rows in (found.teacher, found.student):
        assert [word for word in dict.fromkeys(rows[0]) if word != NONE] == [0, 1, 2, 3, 4]


def test_words_that_one_of_them_did_not_see_are_left_out_on_both_sides(wordpiece, bpe):
    text = "🎈 🎈 🎈 🎈 ok ok"  # four bytes of BPE each, and one unknown token of WordPiece
    seen = [WordAlignment.of(side, side, [text], max_length=12).words[0][0] for side in (bpe, wordpiece)]
    assert len(seen[0]) < len(seen[1]) == 6
    found = WordAlignment.of(bpe, wordpiece, [text], max_length=12)
    assert found.words[0] == [seen[0]]
    for rows in (found.teacher, found.student):
        assert len(rows[0]) <= 12 and set(rows[0]) - {NONE} == set(range(len(seen[0])))


def test_texts_without_words_have_none(wordpiece, bpe):
    found = WordAlignment.of(bpe, wordpiece, ["", "  "], max_length=8)
    assert found.words == [[[]], [[]]] and all(set(row) == {NONE} for row in found.teacher + found.student)
    assert WordAlignment.of(bpe, wordpiece, [], max_length=8).words == []


def test_the_digest_knows_both_sides(wordpiece, bpe):
    found = WordAlignment.of(bpe, wordpiece, TEXTS, max_length=64)
    assert found.digest == WordAlignment.of(bpe, wordpiece, TEXTS, max_length=64).digest
    assert found.digest != WordAlignment.of(bpe, bpe, TEXTS, max_length=64).digest
    assert found.digest != replace(found, teacher=found.student).digest


# Between tokens and words

WORDS = torch.tensor([[NONE, 0, 0, 1, 2, NONE], [NONE, 1, 0, NONE, NONE, NONE]])


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_lie_where_the_tokens_do(side):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = torch.tensor([[NONE, 0, 1, NONE], [NONE, 0, NONE, NONE]])
    if side == "left":
        mask, expected[1] = mask.flip(1), torch.tensor([NONE, NONE, NONE, 0])
    assert torch.equal(pad_words([[NONE, 0, 1, NONE], [NONE, 0]], mask), expected)


@pytest.mark.parametrize("rows", [[[0, 1], [0]], [[0, 1, 2]]], ids=["fewer tokens", "fewer rows"])
def test_rows_of_another_length_are_refused(rows):
    with pytest.raises(ValueError, match=r"row \d of the batch has \d tokens, its alignment \d"):
        pad_words(rows, torch.tensor([[1, 1, 1], [1, 1, 1]]))


def test_the_score_of_a_word_is_the_sum_of_its_tokens():
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 9], [9, 5, 6, 9, 9, 9]])
    expected = torch.tensor([[3.0, 3, 4], [6, 5, 0]])
    assert torch.equal(word_scores(scores, WORDS), expected)
    assert torch.equal(word_scores(torch.stack([scores, 2 * scores], 1), WORDS)[:, 1], 2 * expected)
    assert torch.equal(word_scores(scores, WORDS, 4), torch.cat([expected, torch.zeros(2, 1)], 1))


def test_tokens_of_no_word_say_nothing_not_even_nan():
    scores = torch.where(WORDS == NONE, torch.nan, torch.randn(2, 6)).requires_grad_()
    total = word_scores(scores, WORDS)
    total.square().sum().backward()
    assert total.isfinite().all() and not scores.grad[WORDS == NONE].any()


def test_word_scores_have_two_derivatives():
    scores = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def of_words(scores):
        return normalise(word_scores(scores, WORDS), "l2")

    assert torch.autograd.gradcheck(of_words, scores) and torch.autograd.gradgradcheck(of_words, scores)


def test_a_sequence_has_the_words_it_has_tokens_of():
    assert word_mask(WORDS).tolist() == [[True, True, True], [True, True, False]]
    assert word_mask(WORDS[:, :1]).shape == (2, 0) and word_mask(WORDS[:, :1], 2).tolist() == [[False] * 2] * 2


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_word_is_kept_with_all_its_tokens_and_tokens_of_no_word_always(kind):
    kept = torch.tensor([[0, 1, 0], [1, 0, 0]]).to(kind)
    expected = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1]]).to(kind)
    assert torch.equal(tokens_of_words(kept, WORDS), expected)
    assert torch.equal(tokens_of_words(torch.stack([kept, kept], 1), WORDS)[:, 1], expected)
    assert torch.equal(tokens_of_words(kept[:, :0], WORDS), torch.ones(2, 6, dtype=kind))


# Teacher and student, as the recipe uses them

PLAIN = GradientSettings("gradient_x_input", reduce="sum")
CLASSES = torch.tensor([2, 0, 1])


def _side(tokenizer, rows, seed):
    """A classifier on this tokenizer, and a batch of its tokens with their words."""
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    batch["words"] = pad_words(rows, batch["attention_mask"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), **sizes, num_labels=3, initializer_range=0.15)
    bert = BertForSequenceClassification(config).double().eval()
    return Classifier(bert, bert.bert.embeddings), batch


@pytest.fixture
def alignment(wordpiece, bpe):
    return WordAlignment.of(bpe, wordpiece, TEXTS, max_length=64)


@pytest.fixture
def teacher(bpe, alignment):
    return _side(bpe, alignment.teacher, 0)


@pytest.fixture
def student(wordpiece, alignment):
    return _side(wordpiece, alignment.student, 1)


def _of_words(side, norm="l2", **how):
    classifier, batch = side
    scores = gradient_attribution(classifier, batch, PLAIN, target=CLASSES, **how)
    return normalise(word_scores(scores, batch["words"]), norm)


def test_both_sides_explain_the_same_words(teacher, student):
    valid = word_mask(student[1]["words"])
    assert torch.equal(valid, word_mask(teacher[1]["words"])) and valid.sum(1).tolist() == [7, 6, 3]
    assert _of_words(teacher).shape == _of_words(student).shape == valid.shape
    found = consistency(_of_words(student), _of_words(teacher), valid)
    assert found.sequences == 3 and not found.undefined and abs(found.cosine) < 1


def test_a_model_explained_against_itself_through_words_is_consistent(teacher):
    scores = _of_words(teacher)
    assert consistency(scores, scores, word_mask(teacher[1]["words"])).cosine == pytest.approx(1)


def test_results_on_words_are_stored_and_read(teacher, student, bpe, alignment, tmp_path):
    classifier, batch = teacher
    pool = MaskPool(samples=8)

    def pool_logits(x):
        return masked_logits(classifier, x, tokens_of_words(pool.spread(word_mask(x["words"])), x["words"]))

    rows = {"input_ids": bpe(TEXTS)["input_ids"]}
    fingerprint = Fingerprint.of(classifier.model, bpe, rows, {"align": alignment.digest})
    computed = compute_results(
        [batch],
        fingerprint,
        per_example={"pool_logits": pool_logits},
        per_token={"gradient": lambda x: _of_words((classifier, x))},
        mask=lambda x: word_mask(x["words"]),
        dtype=torch.float64,
    )
    computed.save(tmp_path / "results.safetensors")
    stored = TeacherResults.load(tmp_path / "results.safetensors", fingerprint)
    valid = word_mask(student[1]["words"])
    given = stored.batch(torch.tensor([2, 0]), valid[[2, 0]])
    torch.testing.assert_close(given["gradient"], _of_words(teacher)[[2, 0]])
    torch.testing.assert_close(given["pool_logits"], pool_logits(batch)[[2, 0]])


def test_both_sides_lose_the_same_words_of_a_mask_pool(teacher, student):
    valid = word_mask(student[1]["words"])
    kept = MaskPool(samples=8).spread(valid)
    for classifier, batch in (teacher, student):
        tokens = tokens_of_words(kept, batch["words"])
        taken = [word_scores((~tokens[:, s]).long(), batch["words"]) > 0 for s in range(8)]
        assert torch.equal(torch.stack(taken, 1), ~kept)
        assert masked_logits(classifier, batch, tokens).shape == (3, 8, 3)


def test_on_words_too_double_backward_and_central_difference_agree(teacher, student):
    classifier, batch = student
    given, valid = _of_words(teacher), word_mask(batch["words"])

    def apart(scores):
        return distance(normalise(word_scores(scores, batch["words"], valid.shape[1]), "l2"), given, valid)

    exact = apart(gradient_attribution(classifier, batch, PLAIN, target=CLASSES, create_graph=True))
    near = central_difference(classifier, batch, PLAIN, apart, target=CLASSES)
    torch.testing.assert_close(near, exact)
    weight = classifier.model.classifier.weight
    [wanted], [found] = (torch.autograd.grad(loss, weight, retain_graph=True) for loss in (exact, near))
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3 * float(wanted.abs().max()))


# The data whose tokens are aligned


def test_texts_are_encoded_some_at_a_time(wordpiece, bpe, monkeypatch):
    pairs = TEXTS[::-1]
    whole = WordAlignment.of(bpe, wordpiece, TEXTS, pairs, max_length=64)
    monkeypatch.setattr(align, "_AT_ONCE", 2)
    assert WordAlignment.of(bpe, wordpiece, TEXTS, pairs, max_length=64).digest == whole.digest


@pytest.fixture
def data(bpe):
    """The teacher's tokens of the texts."""
    return Dataset.from_dict(dict(bpe(TEXTS, truncation=True, max_length=64)))


def test_data_gets_a_column_of_words(alignment, data):
    found = alignment.with_words("teacher", data)
    assert found["words"][:] == alignment.teacher and "words" not in data.column_names


def test_other_data_than_the_alignments_is_refused(alignment, data, bpe):
    cut = Dataset.from_dict(dict(bpe(TEXTS, truncation=True, max_length=12)))
    other = Dataset.from_dict({"input_ids": [ids[::-1] for ids in data["input_ids"]]})
    for wrong, message in (
        (data.select([0, 1]), "the teacher's data has 2 examples, the alignment is of 3"),
        (cut, r"example 0 of the teacher's data has 12 tokens, its alignment \d+: it was cut to another max_length"),
        (other, "the teacher's data are not the tokens that are aligned"),
    ):
        with pytest.raises(ValueError, match=message):
            alignment.with_words("teacher", wrong)


def test_the_digest_knows_the_texts(wordpiece, bpe):
    one, other = (WordAlignment.of(bpe, wordpiece, [text], max_length=8) for text in ("!", ","))
    assert (one.teacher, one.student) == (other.teacher, other.student) and one.digest != other.digest
