import pytest
from datasets import Dataset, IterableDataset
from transformers import BertJapaneseTokenizer

from fastkd.data import Task, chunk_corpus, load_corpus, task_sentences

TEXTS = ["the cat sat", "", "a dog ran", "  \n", "it was late"]
KEPT = ["the cat sat", "a dog ran", "it was late"]


def write(path, texts=TEXTS, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_dict({"id": list(range(len(texts))), column: texts})
    match path.suffix:
        case ".parquet":
            data.to_parquet(path)
        case ".jsonl":
            data.to_json(path)
        case ".txt":
            path.write_text("\n".join(text.strip() for text in texts))
    return path


def texts_of(corpus):
    return [row["text"] for row in corpus]


def from_texts(*texts):
    return Dataset.from_dict({"text": list(texts)})


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_every_format_gives_its_texts_without_blank_lines(tmp_path, kind, streaming):
    corpus = load_corpus(write(tmp_path / f"some.{kind}"), streaming=streaming)
    assert isinstance(corpus, IterableDataset) == streaming
    assert corpus.column_names == ["text"] and texts_of(corpus) == KEPT


def test_another_text_column_is_renamed(tmp_path):
    corpus = load_corpus(write(tmp_path / "some.parquet", column="body"), text_column="body")
    assert corpus.column_names == ["text"] and texts_of(corpus) == KEPT


def test_a_folder_is_read_with_its_sub_folders_but_not_its_evaluation_splits(tmp_path):
    for name in ("train.parquet", "more/part-0.jsonl", "validation.parquet", "more/test-00000-of-00001.parquet"):
        write(tmp_path / name, [name])
    assert sorted(texts_of(load_corpus(tmp_path))) == ["more/part-0.jsonl", "train.parquet"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_mixes_files_and_a_tasks_own_sentences(tmp_path, streaming):
    data = Dataset.from_dict({"sentence": ["own sentence"], "label": [0]})
    task = Task("sst2", data, data, ("sentence",), ("negative", "positive"), ("accuracy",))
    corpus = load_corpus([write(tmp_path / "a.parquet"), str(write(tmp_path / "b.txt")), task_sentences(task)],
                         streaming=streaming)  # fmt: skip
    assert isinstance(corpus, IterableDataset) == streaming
    assert texts_of(corpus) == [*KEPT, *KEPT, "own sentence"]


def test_a_loaded_data_set_keeps_its_own_text_column(tmp_path):
    path = write(tmp_path / "some.parquet", column="body")
    assert texts_of(load_corpus([path, from_texts("the cat")], text_column="body")) == [*KEPT, "the cat"]


def test_a_hub_name_may_carry_a_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        return from_texts("the cat")

    monkeypatch.setattr("fastkd.data.corpora.load_dataset", load_dataset)
    assert texts_of(load_corpus("wikimedia/wikipedia:20231101.ja")) == ["the cat"]
    load_corpus("someone/corpus")
    assert asked == [("wikimedia/wikipedia", "20231101.ja", "train"), ("someone/corpus", None, "train")]


def test_task_sentences_are_the_distinct_ones_of_both_columns_of_train():
    train = Dataset.from_dict({"sentence1": ["a", "b", "a"], "sentence2": ["c", " ", "b"], "label": [0, 1, 0]})
    validation = Dataset.from_dict({"sentence1": ["unseen"], "sentence2": ["unseen"], "label": [0]})
    task = Task("rte", train, validation, ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",))
    assert texts_of(task_sentences(task)) == ["a", "b", "c"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_text_column_names_those_there(tmp_path, streaming):
    path = write(tmp_path / "some.parquet", column="body")
    with pytest.raises(ValueError, match=r"some.parquet has no column 'text' \(text_column\); it has 'id', 'body'"):
        load_corpus(path, streaming=streaming)


def test_a_text_column_of_numbers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="column 'id' holds int, not text"):
        load_corpus(write(tmp_path / "some.parquet"), text_column="id")


def test_blank_text_only_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds blank text only"):
        load_corpus(write(tmp_path / "some.parquet", ["", " "]))


def test_a_folder_of_evaluation_splits_says_how_to_read_them(tmp_path):
    write(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"only evaluation splits \(test.parquet\), which are read if named as files"):
        load_corpus(tmp_path)


def test_a_folder_without_text_lists_the_formats(tmp_path):
    with pytest.raises(ValueError, match=r"no file that ends in .parquet, .txt"):
        load_corpus(tmp_path)


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "some.pdf").write_text("text")
    with pytest.raises(ValueError, match=r"some.pdf is no corpus; it must end in .parquet"):
        load_corpus(tmp_path / "some.pdf")


def test_a_name_that_is_neither_here_nor_on_the_hub_is_named(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("fastkd.data.corpora.load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"texts/wiki is neither a file or folder here nor .* no route"):
        load_corpus("texts/wiki")


def test_an_empty_list_is_an_error():
    with pytest.raises(ValueError, match="empty list"):
        load_corpus([])


# ---------------------------------------------------------------- windows of tokens


def test_a_long_text_becomes_consecutive_windows_that_lose_nothing(tokenizer):
    text = "the cat sat on a mat and the dog ran to its house"
    windows = chunk_corpus(from_texts(text), tokenizer, max_length=6, min_tail=1)
    assert windows["length"][:] == [6, 6, 6, 3]
    bodies = [token for ids in windows["input_ids"] for token in ids[1:-1]]
    assert bodies == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_window_has_the_special_tokens_and_a_full_mask(tokenizer):
    for row in chunk_corpus(from_texts("the cat sat on a mat and the dog ran"), tokenizer, max_length=6):
        assert (row["input_ids"][0], row["input_ids"][-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert row["attention_mask"] == [1] * row["length"] == [1] * len(row["input_ids"])


def test_short_texts_stay_examples_of_their_own(tokenizer):
    windows = chunk_corpus(from_texts("the cat", "a dog ran", "mat"), tokenizer, max_length=16)
    assert windows["length"][:] == [4, 5, 3]


def test_a_short_tail_is_thrown_away_but_a_short_text_is_not(tokenizer):
    windows = chunk_corpus(from_texts("the cat sat on a mat", "the cat"), tokenizer, max_length=6, min_tail=3)
    assert windows["length"][:] == [6, 4]


def test_full_windows_are_kept_however_long_a_tail_must_be(tokenizer):
    windows = chunk_corpus(from_texts("the cat sat on a mat and the dog ran"), tokenizer, max_length=6, min_tail=8)
    assert windows["length"][:] == [6, 6]


def test_a_text_without_tokens_gives_no_window(tokenizer):
    assert chunk_corpus(from_texts("\u200b\x00", "the cat"), tokenizer, max_length=6)["length"][:] == [4]


def test_streaming_gives_the_same_windows(tokenizer):
    corpus = from_texts("the cat sat on a mat and the dog ran", "a dog")
    lazy = chunk_corpus(corpus.to_iterable_dataset(), tokenizer, max_length=6)
    assert isinstance(lazy, IterableDataset)
    assert list(lazy) == list(chunk_corpus(corpus, tokenizer, max_length=6))


def test_python_tokenizers_give_the_same_windows(tokenizer, tmp_path):
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    slow = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", do_lower_case=True)
    assert not slow.is_fast
    corpus = from_texts("the cat sat on a mat and the dog ran", "a dog")
    ids = [chunk_corpus(corpus, each, max_length=6, min_tail=2)["input_ids"][:] for each in (tokenizer, slow)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("length", "message"), [(2, "at least 3"), (513, "at most 512")])
def test_a_window_the_model_cannot_have_is_an_error(tokenizer, length, message):
    with pytest.raises(ValueError, match=f"max_length={length}.*{message}"):
        chunk_corpus(from_texts("the cat"), tokenizer, max_length=length)
