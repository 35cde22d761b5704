import pytest
from datasets import Dataset

from fastkd.data import Task, bag_of_words_baseline


def task(columns, labels, label_names):
    data = Dataset.from_dict({**columns, "label": labels})
    return Task("some", data, data, tuple(columns), label_names, ("accuracy",))


def test_it_learns_words_that_tell_the_classes_apart():
    texts = ["good film", "bad film", "good book", "bad book"] * 2
    assert bag_of_words_baseline(task({"sentence": texts}, [1, 0] * 4, ("bad", "good"))).tolist() == [1, 0] * 4


def test_it_reads_both_texts_of_a_pair():
    pair = {"sentence1": ["film", "film"] * 4, "sentence2": ["good", "bad"] * 4}
    assert bag_of_words_baseline(task(pair, [1, 0] * 4, ("bad", "good"))).tolist() == [1, 0] * 4


def test_a_regression_is_an_error():
    with pytest.raises(ValueError, match="some is a regression"):
        bag_of_words_baseline(task({"sentence": ["a b"]}, [0.5], ()))
