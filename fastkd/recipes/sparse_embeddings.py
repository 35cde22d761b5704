"""From a model in a folder to a compressed one in another: count, fit (or choose among many fits), write, report."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.data import Task, load_corpus, load_task
from fastkd.data.tasks import check_max_length
from fastkd.embeddings.budget import (
    Candidate,
    best_within,
    plot_front,
    reconstruction_error,
    smallest_above,
    sweep,
)
from fastkd.embeddings.code import SparseCode
from fastkd.embeddings.compress import compress_embeddings, densify
from fastkd.embeddings.counts import count_tokens, load_counts, save_counts
from fastkd.embeddings.fit import check_settings, check_table
from fastkd.embeddings.input_embedding import input_embedding
from fastkd.embeddings.methods import METHODS, setting, settings_to_try
from fastkd.models.loading import load_model, load_tokenizer
from fastkd.recipes.output_folder import check_out, check_place, whole_folder
from fastkd.recipes.sparse_embeddings_checkpoint import (
    bytes_on_disk,
    copy_sentence_files,
    narrow,
    narrowed,
    round_table,
    save_narrowed,
    stored_dtype,
    weight_files,
)
from fastkd.recipes.sparse_embeddings_report import bytes_of, figures, show, show_densified, show_front
from fastkd.recipes.task_recipe import evaluate
from fastkd.recipes.training import check_vocabulary

FORMATS = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_HELD_OUT = 0.05


@dataclass
class CompressEmbeddings:
    """Settings of a compression; `run()` does it. Nothing is written before everything was checked.

    Args:
        model: folder or hub id of the model, with any task head; only read.
        out: folder of the compressed model and its tokenizer.
        text: corpora (see `load_corpus`) over which token frequencies are counted; `text_column` is their column.
        task, data: a task of `fastkd.data.load_task` on which codes are scored, by 5 % held out of its train split,
            never on its validation split. The rest of train counts as text, unless `counts` is given.
        max_length: tokens of a text that count, as the model is given them.
        counts, save_counts: file of counts made before; file to keep these in.
        method: "sparse"; "residual", sparse with a quantised residual per rare row; "pq", product quantisation.
        keep, atoms: share of rows kept whole, and atoms of every other (0.1 and 8).
        rows, weights: "fp32", "fp16" or "int8" for kept rows and for atom weights (fp16 for "sparse", else int8).
        budget: largest size of the table, in bytes or such as "12MB"; the best of many settings is chosen.
        max_drop: points (hundredths) that `task`'s metric may lose; the smallest of many settings is chosen.
        overwrite: replace what stands in `out`.
    """

    model: str
    out: str
    text: list[str]
    text_column: str = "text"
    task: str | None = None
    data: str | None = None
    max_length: int = 128
    counts: str | None = None
    save_counts: str | None = None
    method: str = "sparse"
    keep: float | None = None
    atoms: int | None = None
    rows: str | None = None
    weights: str | None = None
    budget: str | int | None = None
    max_drop: float | None = None
    overwrite: bool = False

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("rows", (None, *FORMATS)), ("weights", (None, *FORMATS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are {', '.join(filter(None, allowed))}")
        if self.budget is not None:
            self.budget = parse_bytes(self.budget)
        if self.budget is not None and self.max_drop is not None:
            raise ValueError("budget and max_drop: give one of them, what may be used or what may be lost")
        if self.chooses and (self.keep is not None or self.atoms is not None):
            raise ValueError("keep and atoms are chosen where budget or max_drop is given; leave them out")
        if self.max_drop is not None and self.task is None:
            raise ValueError("max_drop: the drop of what? Name a task (--eval) to score codes on")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError(f"max_drop={self.max_drop}; points that may be lost are needed, 0 or more")
        if not (self.text or self.task or self.counts):
            raise ValueError(
                "no text: token frequencies need a corpus (--text), a task (--eval) or saved counts (--counts)"
            )
        if self.counts is not None and not Path(self.counts).expanduser().is_file():
            raise ValueError(f"counts={self.counts} is no file")
        keep = 0.1 if self.keep is None else self.keep
        if not 0 < keep < 1:
            raise ValueError(f"keep={keep}; the share of rows kept whole lies between 0 and 1, where 1 codes nothing")
        check_out(self.out, self.overwrite, self.model)
        if self.save_counts is not None:
            self._check_save_counts()

    @property
    def chooses(self) -> bool:
        return self.budget is not None or self.max_drop is not None

    def run(self) -> dict:
        """Do it; prints and returns the figures of `figures`, with the scores of dense and compressed model."""
        model, tokenizer = load_model(self.model), load_tokenizer(self.model)
        files = weight_files(self.model)
        loaded, stored = model.dtype, stored_dtype(files)
        dense = input_embedding(model)
        check_vocabulary(tokenizer, model=model)
        check_max_length(self.max_length, tokenizer)
        table = dense.weight.detach()  # on the CPU, where scoring may take the model elsewhere
        special_ids = tokenizer.all_special_ids
        settings = self._settings(table, special_ids)
        task = self._task(model)
        counts = self._counts(tokenizer, task, dense.num_embeddings)
        score = None if task is None else scorer(task, tokenizer, self.max_length)

        device = "cuda" if torch.cuda.is_available() else "cpu"

        def fit(**setting) -> SparseCode:
            return SparseCode.fit(table.to(device), counts.to(device), special_ids=special_ids, **setting).to("cpu")

        def quality(code: SparseCode) -> float:
            if score is None:
                return -reconstruction_error(table, code, counts)
            return score(compress_embeddings(model, code))

        original = Candidate({}, narrowed(table, stored).nbytes, 0.0 if score is None else score(model))
        if self.chooses:
            candidates = sweep(settings, fit, quality)
            chosen = self._chosen(candidates, original)
            code = fit(**chosen.setting)
        else:
            code = fit(**settings[0])
        compressed = compress_embeddings(model, code)
        scores = {}
        if score is not None:
            scores = {"metric": task.metrics[0], "score_before": original.quality, "score_after": score(compressed)}
        found = figures(narrow(model, stored), narrow(compressed, stored), code, counts) | scores

        with whole_folder(self.out) as folder:
            found["file_bytes_before"] = bytes_on_disk(files)
            found["file_bytes_after"] = save_narrowed(compressed, folder, loaded)
            tokenizer.save_pretrained(folder)
            copy_sentence_files(self.model, folder)
            if self.chooses:
                rows = [asdict(each) | {"chosen": each is chosen} for each in candidates]
                (folder / "sweep.json").write_text(json.dumps({"dense": asdict(original), "codes": rows}, indent=1))
                label = f"{task.metrics[0]}, held out" if task else "minus relative error over the text"
                plot_front(candidates, chosen, folder / "sweep.png", label=label, dense=original)
        if self.chooses:
            show_front(candidates, chosen, task and task.metrics[0])
        show(found, self.out)
        return found

    def _check_save_counts(self) -> None:
        file, out = (Path(path).expanduser().resolve() for path in (self.save_counts, self.out))
        if file.is_dir():
            raise ValueError(f"save_counts={self.save_counts} is a folder; name a file")
        if out in (file, *file.parents):
            raise ValueError(f"save_counts={self.save_counts} lies in out={self.out}, which is written as a whole")
        check_place("save_counts", self.save_counts)

    def _settings(self, table: Tensor, special_ids: list[int]) -> list[dict]:
        """What is fitted, one setting or all to choose from; a ValueError where the table has no room for it."""
        check_table(table)
        if self.chooses:
            special = len(set(special_ids))
            return settings_to_try(self.method, *table.shape, special, **self._formats(), nbytes=self.budget)
        given = {name: value for name in ("keep", "atoms") if (value := getattr(self, name)) is not None}
        one = setting(self.method, table.shape[1], **given, **self._formats())
        check_settings(*table.shape, special_ids, **one)
        return [one]

    def _formats(self) -> dict[str, str]:
        return {name: FORMATS[given] for name in ("rows", "weights") if (given := getattr(self, name)) is not None}

    def _task(self, model: PreTrainedModel) -> Task | None:
        if self.task is None:
            return None
        task = load_task(self.task, self.data)
        check_labels(model, task)
        return task.hold_out(_HELD_OUT)

    def _counts(self, tokenizer, task: Task | None, vocabulary: int) -> Tensor:
        """(V,) how often each token occurs: by the saved counts, in the text, in the task unless counts are given."""
        counted = []
        if self.counts is not None:
            counted.append(load_counts(Path(self.counts).expanduser(), tokenizer, num_embeddings=vocabulary))
        count = partial(count_tokens, tokenizer=tokenizer, max_length=self.max_length, num_embeddings=vocabulary)
        if self.text:
            counted.append(count(load_corpus(self.text, text_column=self.text_column)))
        if task is not None and self.counts is None:
            counted.append(count(task.train, text_columns=task.text_columns))
        counts = sum(counted)
        if self.save_counts is not None:
            file = Path(self.save_counts).expanduser()
            file.parent.mkdir(parents=True, exist_ok=True)
            save_counts(file, counts, tokenizer)
        return counts

    def _chosen(self, candidates: list[Candidate], original: Candidate) -> Candidate:
        if self.budget is not None:
            return best_within(candidates, self.budget)
        return smallest_above(candidates, original.quality - self.max_drop / 100)


def parse_bytes(size: str | int) -> int:
    """12MB is 12,000,000 bytes, 12MiB 12,582,912. Raises ValueError on what is no size above 0."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if unit is None or float(found[1]) * unit < 1:
        raise ValueError(f"budget={size!r}: bytes are needed, such as 12MB, 800kB or 12582912")
    return int(float(found[1]) * unit)


def check_labels(model: PreTrainedModel, task: Task) -> None:
    """Raise a ValueError unless the model's head gives what the task's labels ask for, in their order."""
    kind, labels = type(model).__name__, model.config.num_labels
    if not kind.endswith("ForSequenceClassification"):
        raise ValueError(f"task={task.name} scores a sequence classifier; the model is a {kind}")
    if labels != task.num_labels:
        raise ValueError(f"task={task.name} has {task.num_labels} labels, the model's head gives {labels}")
    task.check_label_names(model.config.id2label, "the model's head")


def scorer(task: Task, tokenizer, max_length: int) -> Callable[[PreTrainedModel], float]:
    """A function from a model to the task's first metric on its validation split, here what was held out of train."""
    tokens = task.tokenize(tokenizer, max_length)
    return lambda model: evaluate(model, task, tokens, tokenizer)[task.metrics[0]]


def densify_folder(model: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write the compressed model in a folder or on the hub as an ordinary checkpoint to `out`, with its tokenizer, in
    the format in which it is stored: the table, which is a sum of stored rows, is rounded to it.

    Raises ValueError, before anything is written, on a model that is not compressed, or an `out` that holds something.
    """
    check_out(out, overwrite, model)
    compressed, tokenizer = load_model(model), load_tokenizer(model)
    files = weight_files(model)
    loaded, stored = compressed.dtype, stored_dtype(files)
    dense = densify(compressed)
    round_table(dense, stored)
    before, after = (bytes_of(narrow(each, stored)) for each in (compressed, dense))
    with whole_folder(out) as folder:
        written = save_narrowed(dense, folder, loaded)
        tokenizer.save_pretrained(folder)
        copy_sentence_files(model, folder)
    show_densified(before, after, bytes_on_disk(files), written, out)
