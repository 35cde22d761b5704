"""A report's accuracy: which task fits an artifact, and what its outputs are worth."""

from collections.abc import Sequence

import numpy as np
from transformers import EvalPrediction

from fastkd.data import Task
from fastkd.edge.artifact import Artifact
from fastkd.edge.measure_statistics import difference
from fastkd.edge.report_schema import Accuracy, Row


def check_task(artifact: Artifact, task: Task) -> None:
    """Raise a ValueError unless the artifact's outputs are what the task's labels ask for, in their order."""
    kind, config = artifact.task, artifact.config()
    wanted = "regression" if task.regression else "sequence-classification"
    if kind == "sentence-embedding" or config.num_labels != task.num_labels:
        gives = "sentence embeddings" if kind == "sentence-embedding" else f"{config.num_labels} outputs"
        raise ValueError(f"task={task.name} has {task.num_labels} labels; {artifact.path} gives {gives}")
    if kind != wanted:
        raise ValueError(f"task={task.name} is a {wanted}; {artifact.path} is a model for {kind}")
    task.check_label_names(config.id2label, str(artifact.path))


def fill_accuracy(rows: Sequence[Row], outputs: dict[str, np.ndarray | str], task: Task) -> None:
    """The rows' accuracy, by their outputs (N, labels) on the validation split, or the reason for having none."""
    labels = np.asarray(task.validation["label"])
    for row in rows:
        row.accuracy = _scored(outputs.get(row.name, "not run"), labels, task)
    by_name = {row.name: row for row in rows}

    def against(row: Row, other: Row | None):
        if other is None or other is row or row.metric is None or other.metric is None:
            return None
        right = ()
        if task.metrics[0] == "accuracy":
            right = [outputs[each.name].argmax(1) == labels for each in (row, other)]
        return difference(row.metric, other.metric, *right)

    for row in rows:
        row.accuracy.against_teacher = against(row, rows[0])
        row.accuracy.against_fp32 = against(row, by_name.get(row.fp32))


def _scored(outputs: np.ndarray | str, labels: np.ndarray, task: Task) -> Accuracy:
    if isinstance(outputs, str):
        return Accuracy(failed=outputs)
    try:
        metrics = task.compute_metrics(EvalPrediction(predictions=outputs, label_ids=labels))
    except ValueError as error:
        return Accuracy(failed=str(error))
    return Accuracy(metrics, len(labels))
