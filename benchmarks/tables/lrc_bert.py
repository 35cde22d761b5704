"""The tables of LRC-BERT: what it and each of its parts are worth on four tasks of GLUE, at equal task steps.

  python -m fastkd.benchmarks.tables.lrc_bert teacher=DIR_OR_HUB_ID data=DIR_OR_HUB_NAME corpus=[DIR]
      [teachers={sst2: DIR, ...}] [epochs={mrpc: 5, ...}] [plain={learning_rate: 1e-4}] [--tasks ...] [--rows ...]

Settings are those of the recipes `lrc-bert-sst2` (3x384) and `lrc-bert-4x312-sst2` (4x312), changed by the same
`key=value` words: `distil.temperature=2` in both, `4x312.distil.learning_rate=2e-4` in one. teachers: fine-tuned ones,
in the place of fine-tuning them here. plain: settings of the rows of soft labels alone, in the place of `distil`'s, so
that the baseline can have the choices that suit it.

Finished cells are kept in benchmarks/results/lrc_bert.jsonl and not run again. The teachers are fine-tuned once (seed
0), the general distillation is run once for each shape, and both are shared; the seeds cover the task phase.
`--split held-out` trains and reads on 95 % / 5 % of train, to choose settings.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedModel

from fastkd.benchmarks.tables import sparse_embeddings
from fastkd.benchmarks.tables.lrc_bert_page import CHANGES, ROWS, SHAPES, TASKS, show, show_held_out
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.benchmarks.tables.sparse_embeddings import logits
from fastkd.benchmarks.tables.sparse_embeddings_page import encoded
from fastkd.data import Task, chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.data.metrics import score
from fastkd.models import create_student
from fastkd.recipes import (
    FineTuneConfig,
    FineTuneTrainer,
    LrcBertConfig,
    LrcBertRecipe,
    LrcBertTrainer,
    from_settings,
    read_settings,
)
from fastkd.recipes.arc import is_done, load, train_and_save, with_head
from fastkd.recipes.settings import check_keys

RESULTS = Path(__file__).parent.parent / "results" / "lrc_bert.jsonl"
EPOCHS = {"sst2": 3, "mrpc": 5, "stsb": 3, "cola": 3}
_SST2_EXAMPLES = 16_000  # of 67,349


@dataclasses.dataclass
class Sources:
    """What the command is given: by shape its recipe and what soft labels alone change of it; by task the folder of its
    fine-tuned teacher and the epochs."""

    recipes: dict[str, LrcBertRecipe]
    plain: dict[str, dict]
    teachers: dict[str, str]
    epochs: dict[str, int]

    @property
    def shared(self) -> LrcBertRecipe:
        """For what both shapes have in common."""
        return next(iter(self.recipes.values()))


def sources_from(words: list[str]) -> Sources:
    """`key=value` words; one that begins with a shape and a dot holds for that shape alone.

    Raises:
        ValueError: a key that is unknown, or a value that does not fit.
    """
    recipes, plain = {}, {}
    for shape, name in SHAPES.items():
        own = [word.removeprefix(f"{shape}.") for word in words if not word.startswith(tuple(_others(shape)))]
        settings = read_settings(name, ["output_dir=runs/lrc-bert-table", *own])
        settings.pop("recipe")
        teachers, epochs = settings.pop("teachers", {}), settings.pop("epochs", {})
        plain[shape] = settings.pop("plain", {})
        check_keys(teachers, tuple(TASKS), "teachers")
        check_keys(epochs, tuple(TASKS), "epochs")
        recipes[shape] = from_settings(LrcBertRecipe, settings, shape)
    return Sources(recipes, plain, teachers, EPOCHS | epochs)


def _others(shape: str) -> list[str]:
    return [f"{other}." for other in SHAPES if other != shape]


class Table:
    """Makes the cells that are missing."""

    def __init__(self, sources: Sources, cells: Cells, split: str = "validation"):
        self.sources, self.cells, self.split = sources, cells, split
        self.folder = Path(sources.shared.output_dir) / split
        self.tokenizer = AutoTokenizer.from_pretrained(sources.shared.teacher)
        self._tasks: dict[str, Task] = {}
        self._train: dict[str, Dataset] = {}
        self._teachers: dict[str, tuple[PreTrainedModel, dict | str]] = {}

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            task = load_task(name, self.sources.shared.data)
            self._tasks[name] = task if self.split == "validation" else task.hold_out()
        return self._tasks[name]

    def teacher(self, name: str) -> tuple[PreTrainedModel, dict | str]:
        """The fine-tuned teacher of a task and how it was made; its cell is added."""
        if name not in self._teachers:
            given = self.sources.teachers.get(name)
            # On held-out data a teacher that was trained on it is no judge.
            fits = given and self.split == "validation"
            model, how = self._teachers[name] = (load(given), "given") if fits else self._finetuned(self.task(name))
            settings, labels = {"finetune": how}, np.array(self.task(name).validation["label"][:])
            if not self.cells.has(f"{name}/teacher", 0, self.split, settings):
                self.add(f"{name}/teacher", 0, settings, model, labels=encoded(labels))
        return self._teachers[name]

    def _finetuned(self, task: Task) -> tuple[PreTrainedModel, dict]:
        """As the tables of sparse embeddings make theirs."""
        shared = self.sources.shared
        given = sparse_embeddings.Sources(teacher=shared.teacher, data=shared.data, output_dir=str(self.folder))
        return sparse_embeddings.Table(given, self.cells).finetuned(task)

    def train(self, name: str) -> Dataset:
        """What the students of a task are trained on; of SST-2 a fixed part, the same for every row and seed."""
        if name not in self._train:
            task = self.task(name)
            if name == "sst2" and len(task.train) > _SST2_EXAMPLES:
                chosen = np.random.default_rng(0).permutation(len(task.train))[:_SST2_EXAMPLES]
                task = dataclasses.replace(task, train=task.train.select(np.sort(chosen)))
            self._train[name] = task.tokenize(self.tokenizer, self.sources.shared.max_length)["train"]
        return self._train[name]

    def general(self, shape: str) -> Path:
        """The student of a shape, distilled on the corpus and the sentences of all four tasks, with its maps. It sees
        no labels, so one serves the choices on held-out data and the table."""
        recipe = self.sources.recipes[shape]
        folder = self.folder.parent / f"general-{shape}-{_digest(_general_settings(recipe))}"
        if not is_done(folder):
            config = dataclasses.replace(recipe.configs()["general"], output_dir=str(folder))
            tasks = [load_task(name, recipe.data) for name in TASKS]
            sentences = concatenate_datasets([task_sentences(task) for task in tasks])
            text = chunk_corpus(load_corpus([*recipe.corpus, sentences]), self.tokenizer, config.max_length)
            train_and_save(recipe.general_trainer(config, self.tokenizer, text), folder)
        return folder

    def settings(self, name: str, shape: str, row: str, how: dict | str) -> dict:
        """Everything that a cell depends on, but for its seed and the data."""
        recipe = self.sources.recipes[shape]
        steps = {"epochs": self.sources.epochs[name], "max_length": recipe.max_length}
        if row == "finetuned":
            return {"student": recipe.student, "finetune": _without_length(recipe.finetune), **steps}
        own = self.sources.plain[shape] if row == "plain" else {}
        distil = (
            _without_length(recipe.distil)
            | CHANGES[row]
            | own
            | {"layer_pairs": recipe.layer_pairs, "pooling": recipe.pooling}
        )
        return {"teacher": how, **_general_settings(recipe), "distil": distil, **steps}

    def model(self, name: str, shape: str, row: str, seed: int, settings: dict) -> PreTrainedModel:
        """Train the model of a cell."""
        recipe, task = self.sources.recipes[shape], self.task(name)
        folder = self.folder / name / f"{shape}-{row}-{seed}-{_digest(settings)}"
        shared = {"output_dir": str(folder), "seed": seed, "disable_tqdm": True}
        length = {"max_steps": -1, "num_train_epochs": settings["epochs"]}
        data = {"processing_class": self.tokenizer, "train_dataset": self.train(name)}
        if row == "finetuned":
            config = FineTuneConfig(**settings["finetune"] | shared | length)
            student = create_student(with_head(recipe.teacher, task, seed), **settings["student"])
            trainer = FineTuneTrainer(student, config, **data)
        else:
            config = from_settings(LrcBertConfig, settings["distil"] | shared | length, "distil")
            general = self.general(shape)
            student = with_head(general, task, seed)
            projections = general if config.contrast_weight else None
            teacher, _ = self.teacher(name)
            trainer = LrcBertTrainer(student, config, teacher=teacher, projections=projections, **data)
        train_and_save(trainer, folder)
        return load(folder)

    def run(self, name: str, row: str, seed: int) -> bool:
        """Make a cell; false where it was there."""
        _, how = self.teacher(name)
        shape, _, what = row.partition("/")
        settings = self.settings(name, shape, what, how)
        if self.cells.has(f"{name}/{row}", seed, self.split, settings):
            return False
        start = time.perf_counter()
        model = self.model(name, shape, what, seed, settings)
        self.add(f"{name}/{row}", seed, settings, model, seconds=round(time.perf_counter() - start))
        return True

    def add(self, row: str, seed: int, settings: dict, model: PreTrainedModel, **record) -> None:
        task = self.task(row.partition("/")[0])
        tokens = task.tokenize(self.tokenizer, self.sources.shared.max_length)["validation"]
        found = logits(model, self.tokenizer, tokens)
        predictions = found[:, 0].astype(float) if task.regression else found.argmax(1)
        scores = score(task.metrics, predictions, np.array(tokens["labels"][:]))
        record |= {"metric": task.metrics[0], "score": scores[task.metrics[0]], "scores": scores}
        self.cells.add(row, seed, self.split, predictions=encoded(predictions), settings=settings, **record)


def _general_settings(recipe: LrcBertRecipe) -> dict:
    matched = {"layer_pairs": recipe.layer_pairs, "pooling": recipe.pooling}
    return {"student": recipe.student, "general": recipe.general | matched}


def _without_length(section: dict) -> dict:
    """The length of a run is that of all rows of its task."""
    return {key: value for key, value in section.items() if key not in ("max_steps", "num_train_epochs")}


def _digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated, of: %(default)s")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, of: %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--split", choices=("validation", "held-out"), default="validation")
    parser.add_argument("--show", action="store_true", help="print the tables of the finished cells and run nothing")
    options = parser.parse_intermixed_args()
    cells = Cells(RESULTS)

    def tables_so_far() -> str:
        return show(cells) if options.split == "validation" else show_held_out(cells)

    if not options.show:
        tasks, rows = options.tasks.split(","), options.rows.split(",")
        for given, allowed in ((tasks, TASKS), (rows, ROWS)):
            if strange := [name for name in given if name not in allowed]:
                parser.error(f"unknown {', '.join(strange)}; allowed are {', '.join(allowed)}")
        table = Table(sources_from(options.settings), cells, options.split)
        for name in tasks:
            for seed in map(int, options.seeds.split(",")):
                for row in rows:
                    if table.run(name, row, seed):
                        print(tables_so_far(), flush=True)
    print(tables_so_far())


if __name__ == "__main__":
    main()
