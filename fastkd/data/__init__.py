"""Data: GLUE and JGLUE tasks, plain text corpora, the embedded docstring task, and their metrics."""

from fastkd.data.bag_of_words import bag_of_words_baseline, fit_bag_of_words
from fastkd.data.corpora import chunk_corpus, load_corpus, task_sentences
from fastkd.data.docstrings import load_docstring_task
from fastkd.data.metrics import METRICS, score
from fastkd.data.tasks import TASKS, Task, load_task
from fastkd.data.wordpiece import train_wordpiece

__all__ = [
    "METRICS",
    "TASKS",
    "Task",
    "bag_of_words_baseline",
    "chunk_corpus",
    "fit_bag_of_words",
    "load_corpus",
    "load_docstring_task",
    "load_task",
    "score",
    "task_sentences",
    "train_wordpiece",
]
