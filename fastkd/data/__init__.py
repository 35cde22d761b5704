"""Data: GLUE and JGLUE tasks, plain text corpora, the embedded docstring task, and their metrics."""

from fastkd.data.corpora import chunk_corpus, load_corpus, task_sentences
from fastkd.data.metrics import METRICS, score
from fastkd.data.tasks import TASKS, Task, load_task

__all__ = ["METRICS", "TASKS", "Task", "chunk_corpus", "load_corpus", "load_task", "score", "task_sentences"]
