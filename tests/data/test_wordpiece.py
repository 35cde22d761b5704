import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from fastkd.data import train_wordpiece

TEXTS = ["The cat sat on the mat.", "A dog runs; dogs ran!", "It was late, and the house was red."] * 2


def test_it_encodes_like_bert(tokenizer):
    encoded = tokenizer("the cat", "a dog")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.pad_token_id == 0


def test_text_survives_encoding_and_decoding(tokenizer):
    assert tokenizer.decode(tokenizer("The big dog ran")["input_ids"], skip_special_tokens=True) == "the big dog ran"


def test_only_the_special_tokens_are_special():
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert all(not token.startswith("##") for token in tokenizer.get_added_vocab())


def test_the_vocabulary_is_no_larger_than_asked():
    assert len(train_wordpiece(TEXTS, vocab_size=60)) == 60


def test_a_word_of_known_characters_is_never_unknown():
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    assert tokenizer.unk_token_id not in tokenizer("cats hound")["input_ids"]


def test_case_is_kept_on_demand():
    tokenizer = train_wordpiece(TEXTS, vocab_size=100, lowercase=False)
    assert tokenizer.decode(tokenizer("The cat")["input_ids"], skip_special_tokens=True) == "The cat"


def test_it_saves_and_loads(tmp_path):
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("the cat", "a dog") == tokenizer("the cat", "a dog")
    assert loaded.model_max_length == tokenizer.model_max_length == 512


def test_another_process_learns_the_same_ids():
    code = (
        f"from fastkd.data import train_wordpiece; print(sorted(train_wordpiece({TEXTS!r}, 100).get_vocab().items()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(sorted(train_wordpiece(TEXTS, 100).get_vocab().items()))


def test_a_vocabulary_below_the_alphabet_is_an_error():
    with pytest.raises(ValueError, match=r"vocab_size=20 is too small: special tokens and characters alone are \d\d"):
        train_wordpiece(TEXTS, vocab_size=20)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        train_wordpiece(["", " "])
