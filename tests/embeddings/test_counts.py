"""Token counts: what the model reads and nothing else, added up over files, refused with another tokenizer."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from fastkd.data import train_wordpiece
from fastkd.embeddings import continuations, count_tokens, load_counts, save_counts

WORDS = "the cat sat on a mat and the dog ran to its big red house when it was late".split()


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 3, vocab_size=200)


@pytest.fixture
def sentences():
    return Dataset.from_dict(
        {"text": [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 9]) for i in range(50)], "label": [i % 2 for i in range(50)]}
    )


def by_definition(tokenizer, texts, **options):
    counted = Counter(token for text in texts for token in tokenizer(*text, **options)["input_ids"])
    return torch.tensor([counted[token] for token in range(len(tokenizer))])


def test_every_token_of_every_text_is_counted(tokenizer, sentences):
    counts = count_tokens(sentences, tokenizer)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, by_definition(tokenizer, [(text,) for text in sentences["text"]]))


def test_padding_is_not_counted(tokenizer, sentences):
    assert count_tokens(sentences, tokenizer)[tokenizer.pad_token_id] == 0
    tokenizer(sentences["text"][:2], padding=True)  # which a fast tokenizer remembers
    assert count_tokens(sentences, tokenizer)[tokenizer.pad_token_id] == 0


def test_texts_are_cut_as_the_model_has_them(tokenizer, sentences):
    counts = count_tokens(sentences, tokenizer, max_length=5)
    expected = by_definition(tokenizer, [(text,) for text in sentences["text"]], truncation=True, max_length=5)
    assert torch.equal(counts, expected)
    assert counts.sum() < count_tokens(sentences, tokenizer).sum()


def test_a_pair_is_read_as_one_sequence(tokenizer, sentences):
    pairs = sentences.add_column("other", list(reversed(sentences["text"][:])))
    counts = count_tokens(pairs, tokenizer, max_length=8)
    texts = list(zip(pairs["text"], pairs["other"], strict=True))
    assert torch.equal(counts, by_definition(tokenizer, texts, truncation=True, max_length=8))
    assert counts[tokenizer.sep_token_id] == 2 * len(pairs)


def test_only_the_columns_asked_for_are_read(tokenizer, sentences):
    two = sentences.add_column("other", ["dog"] * 50)
    assert torch.equal(count_tokens(two, tokenizer, text_columns=["text"]), count_tokens(sentences, tokenizer))


def test_a_stream_counts_like_a_data_set(tokenizer, sentences):
    stream = sentences.to_iterable_dataset(num_shards=3)
    assert torch.equal(count_tokens(stream, tokenizer), count_tokens(sentences, tokenizer))


def test_data_sets_of_several_batches_are_counted_to_the_end(tokenizer, sentences, monkeypatch):
    whole = count_tokens(sentences, tokenizer)
    monkeypatch.setattr("fastkd.embeddings.counts._TEXTS_AT_ONCE", 7)
    assert torch.equal(count_tokens(sentences, tokenizer), whole)


def test_a_table_may_have_more_rows_than_the_tokenizer_has_tokens(tokenizer, sentences):
    counts = count_tokens(sentences, tokenizer, num_embeddings=len(tokenizer) + 5)
    assert len(counts) == len(tokenizer) + 5 and not counts[-5:].any()


def test_saved_counts_come_back(tokenizer, sentences, tmp_path):
    counts = count_tokens(sentences, tokenizer)
    save_counts(tmp_path / "counts", counts, tokenizer)
    tokenizer(["cat"], truncation=True, max_length=7)  # a fast tokenizer remembers it, and stays the same tokenizer
    assert torch.equal(load_counts(tmp_path / "counts", tokenizer), counts)


def test_counts_of_several_files_are_added(tokenizer, sentences, tmp_path):
    for name, part in (("first", sentences.select(range(20))), ("second", sentences.select(range(20, 50)))):
        save_counts(tmp_path / name, count_tokens(part, tokenizer), tokenizer)
    merged = load_counts([tmp_path / "first", tmp_path / "second"], tokenizer)
    assert torch.equal(merged, count_tokens(sentences, tokenizer))


def test_counts_of_another_tokenizer_are_refused(tokenizer, sentences, tmp_path):
    save_counts(tmp_path / "counts", count_tokens(sentences, tokenizer), tokenizer)
    other = train_wordpiece([" ".join(WORDS)] * 3, vocab_size=200, lowercase=False)
    with pytest.raises(ValueError, match="counts was counted with another tokenizer"):
        load_counts(tmp_path / "counts", other)


def test_counts_of_another_length_are_refused(tokenizer, sentences, tmp_path):
    save_counts(tmp_path / "counts", count_tokens(sentences, tokenizer), tokenizer)
    with pytest.raises(ValueError, match=rf"\({len(tokenizer) + 8},\) int64 is needed"):
        load_counts(tmp_path / "counts", tokenizer, num_embeddings=len(tokenizer) + 8)
    with pytest.raises(ValueError, match=r"counts has shape \(3,\)"):
        save_counts(tmp_path / "short", torch.ones(3), tokenizer)


def test_files_that_hold_no_counts_are_refused(tokenizer, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model")
    (tmp_path / "text").write_text("not counts")
    with pytest.raises(ValueError, match="model holds no token counts"):
        load_counts(tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match="text is no safetensors file"):
        load_counts(tmp_path / "text", tokenizer)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_counts(tmp_path / "absent", tokenizer)
    with pytest.raises(ValueError, match="no file of counts"):
        load_counts([], tokenizer)


def test_pieces_inside_words_are_told_from_their_beginnings(tokenizer):
    marked = continuations(tokenizer, num_embeddings=len(tokenizer) + 3)
    vocabulary = tokenizer.get_vocab()
    assert marked[vocabulary["##a"]] and not marked[vocabulary["a"]]
    assert not marked[-3:].any()
    with pytest.raises(ValueError, match=r"no token of this .* begins with prefix='▁'"):
        continuations(tokenizer, "▁")


BAD = {
    "an absent column": ({"text_columns": ["sentence"]}, "the columns of text are text"),
    "a column of numbers": ({"text_columns": ["label"]}, r"text_columns=\['label'\]"),
    "a name instead of a list": ({"text_columns": "text"}, "text_columns='text'"),
    "no column": ({"text_columns": []}, r"text_columns=\[\]: one column of text is needed, or two"),
    "a length beyond the model's": ({"max_length": 513}, "max_length=513; allowed are 1 to 512"),
    "a table that is too small": ({"num_embeddings": 3}, "num_embeddings=3, but the tokenizer has"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tokenizer, sentences, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        count_tokens(sentences, tokenizer, **options)


def test_rows_without_text_and_empty_data_sets_are_refused(tokenizer):
    with pytest.raises(ValueError, match="row 1 has no text"):
        count_tokens(Dataset.from_dict({"text": ["cat", None]}), tokenizer)
    with pytest.raises(ValueError, match="the data set is empty"):
        count_tokens(Dataset.from_dict({"text": []}), tokenizer)
