"""GLUE's and JGLUE's sentence tasks as one small object: texts, labels, official metrics.

`load_task` reads a task from the hub or from a folder and checks every label before any work starts.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Value
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fastkd.data.metrics import score
from fastkd.data.sources import read_splits


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Sentences (or pairs) with labels, and how they are scored.

    Attributes:
        name: the task's name, e.g. `"sst2"`.
        train, validation: the text columns (string) and `label` (int64 class index; float32 for a regression), beside
            whatever other columns the source has.
        text_columns: one column, or two for a pair.
        label_names: in the order of the class indices; empty for a regression.
        metrics: names of the official metrics, the primary one first.
        extra: further labelled splits, e.g. MNLI's `validation_mismatched`.
        group_column: a column whose value says what an example was taken from; `hold_out` never splits such a group.
    """

    name: str
    train: Dataset
    validation: Dataset
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    extra: Mapping[str, Dataset] = dataclasses.field(default_factory=dict)
    group_column: str | None = None

    @property
    def regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    def check_label_names(self, id2label: Mapping[int, str], whose: str) -> None:
        """Raise a ValueError unless a head's labels are the task's, in their order. Names such as LABEL_0, which
        transformers gives where nobody has, pass for any."""
        named = [str(id2label[label]).lower() for label in range(len(id2label))]
        if self.regression or all(re.fullmatch(r"(label_)?\d+", name) for name in named):
            return
        wanted = ", ".join(self.label_names)
        if sorted(named) != sorted(self.label_names):
            raise ValueError(f"task={self.name} has the labels {wanted}, {whose} {', '.join(named)}")
        if named != list(self.label_names):
            raise ValueError(f"task={self.name} orders its labels {wanted}, {whose} {', '.join(named)}")

    def compute_metrics(self, eval_pred) -> dict[str, float]:
        """`Trainer(compute_metrics=task.compute_metrics)`: logits (N, num_labels), labels (N,) to named metrics.

        Raises:
            ValueError: logits of another width, or NaN among them.
        """
        logits, labels = eval_pred.predictions, eval_pred.label_ids
        if isinstance(logits, tuple):  # a model that also returns hidden states puts the logits first
            logits = logits[0]
        logits = np.asarray(logits).reshape(len(labels), -1)
        if logits.shape[1] != self.num_labels:
            raise ValueError(
                f"the model gives {logits.shape[1]} logits per example, {self.name} has {self.num_labels} labels"
            )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise ValueError(f"the logits of {len(bad)} of {len(labels)} examples are NaN or infinite, first {bad[0]}")
        return score(self.metrics, logits[:, 0] if self.regression else logits.argmax(1), labels)

    def tokenize(self, tokenizer, max_length: int = 128) -> DatasetDict:
        """Every split as `input_ids`, `attention_mask`, `token_type_ids` if the model has them, `labels`, `length`.

        Nothing is padded: `DataCollatorWithPadding` pads each batch to its own longest example, and `length` (in
        tokens) lets the Trainer group examples by length. Longer examples are cut to `max_length` tokens.

        Raises:
            ValueError: `max_length` is longer than the model's, or has no room for text.
        """
        check_max_length(max_length, tokenizer, pair=len(self.text_columns) == 2)
        columns = self.text_columns  # not self: datasets hashes what `encode` refers to, and would hash every split

        def encode(batch):
            texts = [batch[column] for column in columns]
            encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
            return {**encoded, "labels": batch["label"], "length": [len(ids) for ids in encoded["input_ids"]]}

        splits = {"train": self.train, "validation": self.validation, **self.extra}
        return DatasetDict(
            {
                name: split.map(
                    encode, batched=True, remove_columns=split.column_names, desc=f"tokenize {self.name} {name}"
                )
                for name, split in splits.items()
            }
        )

    def hold_out(self, fraction: float = 0.05, seed: int = 0) -> "Task":
        """This task with `fraction` of `train` as its validation split: choices are made there, so that the official
        validation split is read once, at the end.

        Examples that share a sentence (up to case and spaces) or their origin stay on one side, else the held-out
        score would reward memory. A group of such examples larger than a quarter of the held-out part stays in
        training, else it would make up most of it; so the part may be slightly smaller than asked. `extra` is left
        out.

        Raises:
            ValueError: `fraction` outside (0, 1), or a split that would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction}; it must lie between 0 and 1")
        target = round(fraction * len(self.train))
        groups = self._groups()
        sizes = np.bincount(groups)
        held, room = np.zeros(len(sizes), dtype=bool), target
        for group in np.random.default_rng(seed).permutation(len(sizes)):
            if sizes[group] <= min(room, max(1, target // 4)):
                held[group] = True
                room -= sizes[group]
        chosen = held[groups]
        if not chosen.any():
            raise ValueError(
                f"{fraction:g} of {len(self.train)} {self.name} examples is {target}: too few to hold out any group "
                "of examples that share a sentence"
            )
        return dataclasses.replace(
            self,
            train=self.train.select(np.flatnonzero(~chosen)),
            validation=self.train.select(np.flatnonzero(chosen)),
            extra={},
        )

    def _groups(self) -> np.ndarray:
        """(N,) group of each training example: connected components of "has a sentence (or its origin) in common"."""
        rows = len(self.train)
        ids: dict[str | tuple, int] = {}
        shared = [
            [ids.setdefault(" ".join(text.split()).lower(), len(ids)) for text in self.train[column][:]]
            for column in self.text_columns
        ]
        if self.group_column:
            shared.append([ids.setdefault(("origin", value), len(ids)) for value in self.train[self.group_column][:]])
        ends = (np.tile(np.arange(rows), len(shared)), rows + np.ravel(shared))
        graph = coo_array((np.ones(len(ends[0])), ends), shape=(rows + len(ids),) * 2)
        _, groups = connected_components(graph, directed=False)
        return np.unique(groups[:rows], return_inverse=True)[1]


def check_max_length(max_length: int, tokenizer, *, pair: bool = False) -> None:
    """Raise a ValueError unless `max_length` tokens leave room for text and the tokenizer's model takes them."""
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if max_length < least:
        raise ValueError(f"max_length={max_length} leaves no room for text; it must be at least {least}")
    if max_length > tokenizer.model_max_length:
        raise ValueError(f"max_length={max_length}, but the model takes at most {tokenizer.model_max_length} tokens")


@dataclasses.dataclass(frozen=True)
class _Spec:
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    config: str  # the name of the configuration on the hub
    hub: str = "nyu-mll/glue"


_PAIR = ("sentence1", "sentence2")
_JGLUE = "shunk031/JGLUE"
_SIMILARITY = (0.0, 5.0)  # both regressions score similarity from 0 to 5

TASKS = {
    "cola": _Spec(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"), "cola"),
    "sst2": _Spec(("sentence",), ("negative", "positive"), ("accuracy",), "sst2"),
    "mrpc": _Spec(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "mrpc"),
    "stsb": _Spec(_PAIR, (), ("pearson", "spearman"), "stsb"),
    "qqp": _Spec(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "qqp"),
    "mnli": _Spec(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), "mnli"),
    "qnli": _Spec(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",), "qnli"),
    "rte": _Spec(_PAIR, ("entailment", "not_entailment"), ("accuracy",), "rte"),
    "wnli": _Spec(_PAIR, ("not_entailment", "entailment"), ("accuracy",), "wnli"),
    "marc_ja": _Spec(("sentence",), ("positive", "negative"), ("accuracy",), "MARC-ja", _JGLUE),
    "jcola": _Spec(("sentence",), ("unacceptable", "acceptable"), ("accuracy", "matthews"), "JCoLA", _JGLUE),
    "jsts": _Spec(_PAIR, (), ("pearson", "spearman"), "JSTS", _JGLUE),
    "jnli": _Spec(_PAIR, ("entailment", "contradiction", "neutral"), ("accuracy",), "JNLI", _JGLUE),
}


def load_task(name: str, source: str | Path | None = None) -> Task:
    """One of GLUE's nine tasks, or of JGLUE's classification and similarity tasks.

    Args:
        name: a key of `TASKS`: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; marc_ja, jcola, jsts, jnli.
        source: None for the usual hub data set (`nyu-mll/glue`, `shunk031/JGLUE`), the id of another with the same
            configurations, or a folder with `train` and `validation` (or `dev`) as parquet, TSV, CSV, JSON or JSON
            lines with the same columns; also a folder that holds such a folder named after the task.

    Raises:
        ValueError: an unknown task, a missing folder, file or column, an empty split, a label outside the range.
        ConnectionError: the hub was asked and cannot be reached.
    """
    spec = TASKS.get(name)
    if spec is None:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), TASKS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown task {name!r}{hint}; known tasks are {', '.join(TASKS)}")
    splits = read_splits(name, source, spec.hub, spec.config)
    checked = {split: _checked(data, spec, f"{name} {split}") for split, data in splits.items()}
    train, validation = checked.pop("train"), checked.pop("validation")
    return Task(name, train, validation, spec.text_columns, spec.label_names, spec.metrics, checked)


def _checked(data: Dataset, spec: _Spec, where: str) -> Dataset:
    """`data` with string texts and numeric labels, or a ValueError that names the first thing that is wrong."""
    needed = (*spec.text_columns, "label")
    missing = [column for column in needed if column not in data.column_names]
    if missing:
        raise ValueError(
            f"{where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(data.column_names)}, needed are {', '.join(needed)}"
        )
    if not len(data):
        raise ValueError(f"{where} is empty")
    for column in spec.text_columns:
        for row, text in enumerate(data[column][:]):
            if text is None:
                raise ValueError(f"{where}: row {row} has no {column}")
        data = data.cast_column(column, Value("string"))
    label_type, values = data.features["label"], data["label"][:]
    if hasattr(label_type, "int2str"):  # a hub data set may number the classes in another order
        values = [label_type.int2str(value) if value in range(len(label_type.names)) else value for value in values]
    labels = [_label(value, spec.label_names, f"{where}: row {row}") for row, value in enumerate(values)]
    dtype = np.int64 if spec.label_names else np.float32
    return data.remove_columns("label").add_column("label", np.array(labels, dtype=dtype))


def _label(value, names: tuple[str, ...], where: str) -> int | float:
    """The class index of an index, a name, or an index written as text; for a regression the score."""
    try:
        if value in names:
            return names.index(value)
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not names:
        low, high = _SIMILARITY
        if low <= number <= high:
            return number
        raise ValueError(f"{where} has the label {value!r}; allowed are scores from {low:g} to {high:g}")
    if number in range(len(names)):
        return int(number)
    hint = "; -1 stands for the hidden labels of GLUE's test splits" if number == -1 else ""
    allowed = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
    raise ValueError(f"{where} has the label {value!r}; allowed are {allowed}{hint}")
