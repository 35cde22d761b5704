"""The baseline every text classifier has to beat: logistic regression on word counts."""

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from threadpoolctl import threadpool_limits

from fastkd.data.tasks import Task


def fit_bag_of_words(task: Task) -> Pipeline:
    """Logistic regression on tf-idf weighted words, classes weighted by their frequency, fitted on `task.train`.

    Raises:
        ValueError: the task is a regression.
    """
    if task.regression:
        raise ValueError(f"{task.name} is a regression; the bag of words classifies")
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000, class_weight="balanced")
    )
    with threadpool_limits(1):  # the matrices are sparse and small: more threads only wait for each other
        return model.fit(_texts(task, "train"), task.train["label"][:])


def bag_of_words_baseline(task: Task) -> np.ndarray:
    """(N,) class indices that `fit_bag_of_words` predicts for `task.validation`, to be scored by `score`."""
    return fit_bag_of_words(task).predict(_texts(task, "validation"))


def _texts(task: Task, split: str) -> list[str]:
    data = getattr(task, split)
    return [" ".join(texts) for texts in zip(*(data[column][:] for column in task.text_columns), strict=True)]
