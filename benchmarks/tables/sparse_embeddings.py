"""The tables of sparse-coded embeddings: score against bytes, for the method and every baseline, after fine-tuning.

  python -m fastkd.benchmarks.tables.sparse_embeddings teacher=DIR_OR_HUB_ID data=DIR_OR_HUB_NAME
      [text=DIR] [student=DIR] [japanese=DIR] [sst2=DIR] [--rows ...]

The teacher is fine-tuned once per task (seed 0), compressed with no further training, and read on the validation split.
student: a fine-tuned student of SST-2, for the rows `arc`. text: English text, for `general`. japanese: Japanese text,
for `japanese`. sst2: the teacher fine-tuned on SST-2 before, in the place of fine-tuning it here. Finished cells are
kept in benchmarks/results/sparse_embeddings.jsonl and not run again; `--show` prints the tables of what is there.
"""

import argparse
import copy
import dataclasses
import tempfile
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from fastkd.benchmarks.tables.japanese_embeddings import compare, make_encoder
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.benchmarks.tables.sparse_embeddings_page import (
    GRID_ATOMS,
    GRID_KEPT,
    RATIOS,
    SUBJECTS,
    encoded,
    plot_scores,
    show,
)
from fastkd.benchmarks.tables.stored_embeddings import METHODS, candidates, disk_bytes, store
from fastkd.data import Task, load_corpus, load_task
from fastkd.data.metrics import score
from fastkd.embeddings import SparseCode, compress_embeddings, count_tokens, load_counts, save_counts
from fastkd.embeddings.baselines import StoredTable
from fastkd.embeddings.budget import reconstruction_error
from fastkd.recipes import FineTuneConfig, FineTuneTrainer, from_settings, read_settings
from fastkd.recipes.run_folder import is_done, load, train_and_save
from fastkd.recipes.task_recipe import with_head

RESULTS = Path(__file__).parent.parent / "results" / "sparse_embeddings.jsonl"
ROWS = (*SUBJECTS, "grid", "general", "japanese")
_NEEDED = {"arc": "student", "general": "text", "japanese": "japanese"}  # by the rows, of what the command is given
_MAX_LENGTH = 128
_HELD_OUT = 500  # examples at most: distances between logits need no more


@dataclasses.dataclass
class Sources:
    """What the command is given. epochs: passes of fine-tuning over CoLA, MRPC and STS-B; SST-2 has the steps of the
    recipe `arc-sst2`. japanese_steps: of training the Japanese encoder."""

    teacher: str
    data: str | None = None
    text: str | None = None
    student: str | None = None
    japanese: str | None = None
    sst2: str | None = None
    epochs: int = 3
    japanese_steps: int = 500
    output_dir: str = "runs/sparse-embeddings"


class Subject:
    """A fine-tuned model that is compressed, the examples it is read on, and how often tokens occur in its task.

    Tokens are counted on the 95 % of train that choices are not made on, so that held-out examples hold rare tokens as
    new text does.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer, task: Task):
        self.name, self.model, self.tokenizer, self.task = name, model.eval(), tokenizer, task
        held_out = task.hold_out()
        self.counts = self.count(held_out.train)
        self.counts_of_validation = self.count(task.validation)
        few = held_out.validation.select(range(min(_HELD_OUT, len(held_out.validation))))
        # Held-out examples in the place of train, which is not read here.
        splits = dataclasses.replace(task, train=few, extra={}).tokenize(tokenizer, _MAX_LENGTH)
        self.held_out, self.validation = _by_length(splits["train"]), _by_length(splits["validation"])

    def count(self, dataset: Dataset) -> Tensor:
        return count_tokens(
            dataset,
            self.tokenizer,
            text_columns=self.task.text_columns,
            max_length=_MAX_LENGTH,
            num_embeddings=self.model.get_input_embeddings().num_embeddings,
        )

    @property
    def table(self) -> Tensor:
        """(V, D)."""
        return self.model.get_input_embeddings().weight.detach()

    @cached_property
    def held_out_logits(self) -> np.ndarray:
        """Of the dense model."""
        return logits(self.model, self.tokenizer, self.held_out)

    def store(self, method: str, setting: dict, budget: int, counts: Tensor | None = None):
        return store(
            method,
            setting,
            self.table,
            self.counts if counts is None else counts,
            budget,
            special_ids=self.tokenizer.all_special_ids,
            unknown_id=self.tokenizer.unk_token_id,
        )

    def candidates(self, method: str, budget: int) -> list[dict]:
        return candidates(method, *self.table.shape, budget, len(set(self.tokenizer.all_special_ids)))

    def with_table(self, stored: SparseCode | StoredTable) -> PreTrainedModel:
        """A copy of the model that looks up in `stored`."""
        if isinstance(stored, SparseCode):
            return compress_embeddings(self.model, stored)
        compressed = copy.deepcopy(self.model)
        compressed.get_input_embeddings().weight.data.copy_(stored.dense())
        return compressed


def logits(model: PreTrainedModel, tokenizer, examples: Dataset) -> np.ndarray:
    """(examples, labels) in fp32."""
    # A Trainer makes its folder, though nothing is written to it here.
    config = FineTuneConfig(output_dir=tempfile.gettempdir(), bf16=False, disable_tqdm=True)
    return FineTuneTrainer(model, config, processing_class=tokenizer).predict(examples).predictions


def _by_length(examples: Dataset) -> Dataset:
    """Examples of similar length side by side: batches then hold little padding."""
    return examples.select(np.argsort(examples["length"][:], kind="stable"))


class Table:
    """Makes the cells that are missing."""

    def __init__(self, sources: Sources, cells: Cells):
        self.sources, self.cells, self.folder = sources, cells, Path(sources.output_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(sources.teacher)
        self._subjects: dict[str, Subject] = {}
        self._codes: dict[str, SparseCode | StoredTable] = {}

    def finetuned(self, task: Task) -> tuple[PreTrainedModel, dict | str]:
        """The teacher fine-tuned on a task, and how it was."""
        if task.name == "sst2" and self.sources.sst2:
            return load(self.sources.sst2), "given"
        settings = dict(read_settings("arc-sst2", [])["finetune"])
        if task.name != "sst2":
            settings |= {"max_steps": -1, "num_train_epochs": self.sources.epochs}
        folder = self.folder / f"teacher-{task.name}"
        if not is_done(folder):
            trainer = FineTuneTrainer(
                with_head(self.sources.teacher, task),
                FineTuneConfig(output_dir=str(folder), seed=0, disable_tqdm=True, **settings),
                processing_class=self.tokenizer,
                train_dataset=task.tokenize(self.tokenizer, _MAX_LENGTH)["train"],
            )
            train_and_save(trainer, folder)
        return load(folder), settings

    def subject(self, name: str) -> Subject:
        """Loaded or fine-tuned on first use; its dense cell is added."""
        if name not in self._subjects:
            task = load_task("sst2" if name == "arc" else name, self.sources.data)
            model, how = (load(self.sources.student), "given") if name == "arc" else self.finetuned(task)
            subject = self._subjects[name] = Subject(name, model, self.tokenizer, task)
            settings = {"finetune": how, "max_length": _MAX_LENGTH}
            if not self.cells.has(f"{name}/dense", 0, "validation", settings):
                found = logits(subject.model, subject.tokenizer, subject.validation)
                self.add(
                    subject,
                    f"{name}/dense",
                    settings,
                    found,
                    bytes=subject.table.nbytes,
                    table=list(subject.table.shape),
                    special=len(set(subject.tokenizer.all_special_ids)),
                    metric=task.metrics[0],
                    labels=encoded(np.array(subject.validation["labels"][:])),
                )
        return self._subjects[name]

    def add(self, subject: Subject, row: str, settings: dict, found: np.ndarray, **record) -> None:
        task = subject.task
        predictions = found[:, 0].astype(float) if task.regression else found.argmax(1)
        scores = score(task.metrics, predictions, np.array(subject.validation["labels"][:]))
        self.cells.add(
            row,
            0,
            "validation",
            score=scores[task.metrics[0]],
            scores=scores,
            predictions=encoded(predictions),
            settings=settings,
            **record,
        )

    def read(self, subject: Subject, row: str, settings: dict, stored, start: float, **record) -> None:
        """Add the cell of `subject` with its table stored so."""
        found = logits(subject.with_table(stored), subject.tokenizer, subject.validation)
        if isinstance(stored, SparseCode):
            coded = stored.arrays.slot.long() >= stored.num_kept
            tokens = subject.counts_of_validation
            record["rare_share"] = float(tokens[coded].sum() / tokens.sum())
        self.add(
            subject,
            row,
            settings,
            found,
            bytes=stored.nbytes,
            disk_bytes=disk_bytes(stored),
            error_in_validation=reconstruction_error(subject.table, stored, subject.counts_of_validation),
            seconds=round(time.perf_counter() - start),
            **record,
        )

    def budget(self, subject: Subject, ratio: float) -> int:
        return int(subject.table.nbytes / ratio)

    def chosen(self, subject: Subject, method: str, ratio: float) -> dict | None:
        """The setting that leaves the logits on held-out data nearest to the dense model's (mean squared difference).

        A sparse code's k is chosen for each subject. What the other methods have to choose is chosen once, on SST-2,
        for all subjects whose table has the same shape.
        """
        if method == "random":
            return self.chosen(subject, "sparse", ratio)
        budget = self.budget(subject, ratio)
        tried = subject.candidates(method, budget)
        if len(tried) < 2:
            return tried[0] if tried else None
        judge = self.subject("sst2") if method != "sparse" else subject
        judge = judge if judge.table.shape == subject.table.shape else subject
        row = f"{judge.name}/{method}/{ratio}"
        for setting in tried:
            settings = {"budget": budget, "setting": setting}
            if not self.cells.has(row, 0, "held-out", settings):
                start = time.perf_counter()
                stored = self._codes[f"{row}{setting}"] = judge.store(method, setting, budget)
                found = logits(judge.with_table(stored), judge.tokenizer, judge.held_out)
                self.cells.add(
                    row,
                    0,
                    "held-out",
                    distance=float(np.square(found - judge.held_out_logits).mean()),
                    bytes=stored.nbytes,
                    examples=len(found),
                    seconds=round(time.perf_counter() - start),
                    settings=settings,
                )
        read = [cell for cell in self.cells.find(row, "held-out") if cell["settings"]["setting"] in tried]
        return min(read, key=lambda cell: cell["distance"])["settings"]["setting"]

    def add_scores(self, name: str) -> None:
        """All methods at all budgets, and the sparse codes of 10 and 30 % kept."""
        subject = self.subject(name)
        for keep in (0.1, 0.3):
            self.add_kept(name, keep, 8)
        for ratio in RATIOS:
            budget = self.budget(subject, ratio)
            for method in METHODS:
                row, settings = f"{name}/{method}/{ratio}", {"budget": budget, "choice": "held-out logits"}
                if self.cells.has(row, 0, "validation", settings):
                    continue
                start = time.perf_counter()
                setting = self.chosen(subject, method, ratio)
                if setting is not None:
                    stored = self._codes.pop(f"{row}{setting}", None) or subject.store(method, setting, budget)
                    self.read(subject, row, settings, stored, start, chosen=setting)
            self._codes.clear()

    def add_kept(self, name: str, keep: float, atoms: int, counted: str = "task") -> None:
        subject = self.subject(name)
        row = f"{name}/kept {keep}/{atoms}" + ("" if counted == "task" else f"/{counted}")
        setting = {"keep": keep, "atoms": atoms, "rows": "float16", "weights": "float16"}
        settings = {"setting": setting, "counted": counted}
        if not self.cells.has(row, 0, "validation", settings):
            start = time.perf_counter()
            counts = subject.counts if counted == "task" else self.counts_of_text(subject)
            self.read(subject, row, settings, subject.store("sparse", setting, 0, counts), start)

    def counts_of_text(self, subject: Subject) -> Tensor:
        """Counted once, and kept in the folder."""
        path, rows = self.folder / "counts-text.safetensors", len(subject.table)
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            counts = count_tokens(
                load_corpus(self.sources.text), self.tokenizer, max_length=_MAX_LENGTH, num_embeddings=rows
            )
            save_counts(path, counts, self.tokenizer)
        return load_counts(path, self.tokenizer, num_embeddings=rows)

    def add_japanese(self) -> None:
        steps = self.sources.japanese_steps
        encoder = make_encoder(self.sources.japanese, self.folder / "japanese", steps=steps)
        special = {"special_ids": encoder.tokenizer.all_special_ids, "unknown_id": encoder.tokenizer.unk_token_id}
        for method, keep in (("sparse", 0.1), ("random", 0.1), ("sparse", 0.3), ("sparse", 0.5)):
            row, setting = f"japanese/{method}/{keep}", {"keep": keep, "atoms": 8, "rows": "float16"}
            settings = {"setting": setting, "steps": steps}
            if not self.cells.has(row, 0, "validation", settings):
                start = time.perf_counter()
                code = store(method, setting, encoder.table, encoder.counts, 0, **special)
                self.cells.add(
                    row,
                    0,
                    "validation",
                    **compare(encoder, code),
                    bytes=code.nbytes,
                    dense_bytes=encoder.table.nbytes,
                    table=list(encoder.table.shape),
                    error_of_coded_rows=float(code.error.mean()),
                    error_in_text=reconstruction_error(encoder.table, code, encoder.counts),
                    seconds=round(time.perf_counter() - start),
                    settings=settings,
                )

    def run(self, row: str) -> None:
        match row:
            case "grid":
                for keep in GRID_KEPT:
                    for atoms in GRID_ATOMS:
                        self.add_kept("sst2", keep, atoms)
            case "general":
                for name in SUBJECTS:
                    if name != "arc":
                        self.add_kept(name, 0.1, 8, "general text")
            case "japanese":
                self.add_japanese()
            case _:
                self.add_scores(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument(
        "--rows", help=f"comma-separated, of {','.join(ROWS)}; by default all that what is given allows"
    )
    parser.add_argument("--show", action="store_true", help="print the tables of the finished cells and run nothing")
    options = parser.parse_intermixed_args()
    cells = Cells(RESULTS)
    if not options.show:
        words = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in options.settings)}
        sources = from_settings(Sources, words, "sparse_embeddings")
        allowed = [row for row in ROWS if row not in _NEEDED or getattr(sources, _NEEDED[row])]
        rows = options.rows.split(",") if options.rows else allowed
        for row in rows:
            if row not in allowed:
                needs = f" needs {_NEEDED[row]}=DIR" if row in ROWS else f"; allowed are {', '.join(ROWS)}"
                parser.error(f"--rows {row}{needs}")
        table = Table(sources, cells)
        for row in rows:
            table.run(row)
    plot_scores(cells, RESULTS.with_suffix(".png"))
    print(show(cells))


if __name__ == "__main__":
    main()
