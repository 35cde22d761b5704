"""Students on four tasks of GLUE at equal task steps: what the tables of LRC-BERT and EGKD have in common.

A row is `TASK/ROW` in the cells. The teacher of a task is fine-tuned once (seed 0) and shared; the seeds cover the
students' task phase. `--split held-out` trains and reads on 95 % / 5 % of train, to choose settings.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModel, PreTrainedModel

from fastkd.benchmarks.tables import sparse_embeddings
from fastkd.benchmarks.tables.glue_page import LENGTHS, TASKS
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.benchmarks.tables.sparse_embeddings import logits
from fastkd.benchmarks.tables.sparse_embeddings_page import encoded
from fastkd.data import Task, load_task
from fastkd.data.metrics import score
from fastkd.explain.fingerprint import of_weights
from fastkd.models.loading import load_tokenizer
from fastkd.recipes.run_folder import DONE, load
from fastkd.recipes.settings import check_keys

EPOCHS = 3
_SST2_EXAMPLES = 16_000  # of 67,349


@dataclasses.dataclass
class GlueSources:
    """Where the teacher and the data are; by task the folder of its fine-tuned teacher and the epochs.

    Raises:
        ValueError: a task that is none of the four.
    """

    teacher: str
    data: str | None
    output_dir: str
    max_length: int
    teachers: dict[str, str]
    epochs: dict[str, int]

    def __post_init__(self):
        check_keys(self.teachers, tuple(TASKS), "teachers")
        check_keys(self.epochs, tuple(TASKS), "epochs")
        self.epochs = dict.fromkeys(TASKS, EPOCHS) | self.epochs


class GlueTable(ABC):
    """Makes the cells that are missing."""

    def __init__(self, given: GlueSources, cells: Cells, split: str = "validation"):
        self.given, self.cells, self.split = given, cells, split
        self.folder = Path(given.output_dir) / split
        self.tokenizer = load_tokenizer(given.teacher, "teacher")
        self.pretrained = short(of_weights(AutoModel.from_pretrained(given.teacher)))
        self._tasks: dict[str, Task] = {}
        self._train: dict[str, Dataset] = {}
        self._teachers: dict[str, tuple[PreTrainedModel, dict]] = {}

    @abstractmethod
    def settings(self, name: str, row: str, how: dict) -> dict:
        """Everything that a cell depends on, but for its seed and the data. `how`: the teacher was made."""

    @abstractmethod
    def train_student(self, name: str, row: str, seed: int, settings: dict, folder: Path) -> None:
        """Train the model of a cell and leave it in the folder."""

    def measure(self, name: str, row: str, model: PreTrainedModel) -> dict:
        """What else a cell records of its model."""
        return {}

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            task = load_task(name, self.given.data)
            self._tasks[name] = task if self.split == "validation" else task.hold_out()
        return self._tasks[name]

    def teacher(self, name: str) -> tuple[PreTrainedModel, dict]:
        """The fine-tuned teacher of a task and how it was made; its cell is added."""
        if name not in self._teachers:
            folder = self.given.teachers.get(name)
            # On held-out data a teacher that was trained on it is no judge.
            fits = folder and self.split == "validation"
            made = (load(folder), {"given": short(of_weights(folder))}) if fits else self._finetuned(self.task(name))
            model, how = self._teachers[name] = made
            settings, labels = {"finetune": how}, np.array(self.task(name).validation["label"][:])
            if not self.cells.has(f"{name}/teacher", 0, self.split, settings):
                self.add(name, "teacher", 0, settings, model, labels=encoded(labels))
        return self._teachers[name]

    def _finetuned(self, task: Task) -> tuple[PreTrainedModel, dict]:
        """As the tables of sparse embeddings make theirs."""
        given = sparse_embeddings.Sources(teacher=self.given.teacher, data=self.given.data, output_dir=str(self.folder))
        return sparse_embeddings.Table(given, self.cells).finetuned(task)

    def train(self, name: str) -> Dataset:
        """What the students of a task are trained on; of SST-2 a fixed part, the same for every row and seed."""
        if name not in self._train:
            task = self.task(name)
            if name == "sst2" and len(task.train) > _SST2_EXAMPLES:
                chosen = np.random.default_rng(0).permutation(len(task.train))[:_SST2_EXAMPLES]
                task = dataclasses.replace(task, train=task.train.select(np.sort(chosen)))
            self._train[name] = task.tokenize(self.tokenizer, self.given.max_length)["train"]
        return self._train[name]

    def validation(self, name: str) -> Dataset:
        return self.task(name).tokenize(self.tokenizer, self.given.max_length)["validation"]

    def run(self, name: str, row: str, seed: int) -> bool:
        """Make a cell; false where it was there."""
        _, how = self.teacher(name)
        settings = self.settings(name, row, how)
        if self.cells.has(f"{name}/{row}", seed, self.split, settings):
            return False
        start = time.perf_counter()
        folder = self.folder / name / f"{row.replace('/', '-')}-{seed}-{digest(settings)}"
        self.train_student(name, row, seed, settings, folder)
        took = {"seconds": round(time.perf_counter() - start), "ms_per_step": _ms_per_step(folder)}
        self.add(name, row, seed, settings, load(folder), **took)
        return True

    def add(self, name: str, row: str, seed: int, settings: dict, model: PreTrainedModel, **record) -> None:
        task, tokens = self.task(name), self.validation(name)
        found = logits(model, self.tokenizer, tokens)
        predictions = found[:, 0].astype(float) if task.regression else found.argmax(1)
        scores = score(task.metrics, predictions, np.array(tokens["labels"][:]))
        record |= {"metric": task.metrics[0], "score": scores[task.metrics[0]], "scores": scores}
        record |= self.measure(name, row, model)
        self.cells.add(f"{name}/{row}", seed, self.split, predictions=encoded(predictions), settings=settings, **record)


def _ms_per_step(folder: Path) -> float:
    """Of the training that left its model in the folder, by the clock: one that was paused reads more, one that was
    resumed less."""
    last = json.loads((folder / DONE).read_text())["log"][-1]
    return round(1e3 * last["train_runtime"] / last["step"], 1)


def words_of(shape: str, words: list[str], shapes: Iterable[str]) -> list[str]:
    """The `key=value` words that hold for a shape: its own, which begin with its name and a dot, and those of all."""
    others = tuple(f"{other}." for other in shapes if other != shape)
    return [word.removeprefix(f"{shape}.") for word in words if not word.startswith(others)]


def short(digest: str) -> str:
    """As much of a digest as tells two things in one table apart."""
    return digest[:12]


def without_length(section: dict) -> dict:
    """The length of a run is that of all rows of its task."""
    return {key: value for key, value in section.items() if key not in LENGTHS}


def digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def main(
    description: str,
    rows: Sequence[str],
    results: Path,
    table: Callable[[list[str], Cells, str], GlueTable],
    show: Callable[[Cells], str],
    show_held_out: Callable[[Cells], str],
) -> None:
    """The command of a table. `table`: from `key=value` words, the cells and the split."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see above; output_dir=DIR holds the models")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated, of: %(default)s")
    parser.add_argument("--rows", default=",".join(rows), help="comma-separated, of: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (%(default)s)")
    parser.add_argument(
        "--split",
        choices=("validation", "held-out"),
        default="validation",
        help="what is read: the official validation split, or 5 %% of train, to choose settings (%(default)s)",
    )
    parser.add_argument("--results", type=Path, default=results, help="file of the finished cells (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print the tables of the finished cells and run nothing")
    options = parser.parse_intermixed_args()
    cells = Cells(options.results)

    def tables_so_far() -> str:
        return show(cells) if options.split == "validation" else show_held_out(cells)

    if not options.show:
        tasks, asked = options.tasks.split(","), options.rows.split(",")
        for given, allowed in ((tasks, TASKS), (asked, rows)):
            if strange := [name for name in given if name not in allowed]:
                parser.error(f"unknown {', '.join(strange)}; allowed are {', '.join(allowed)}")
        if not all(seed.isdigit() for seed in options.seeds.split(",")):
            parser.error(f"--seeds {options.seeds}: whole numbers, separated by commas, are needed")
        try:
            filled = table(options.settings, cells, options.split)
        except ValueError as error:
            parser.error(str(error))
        for name in tasks:
            for seed in map(int, options.seeds.split(",")):
                for row in asked:
                    if filled.run(name, row, seed):
                        print(tables_so_far(), flush=True)
    print(tables_so_far())
