"""The README's table: what each part of ARC is worth on SST-2, at equal task steps.

  python -m fastkd.benchmarks.tables.arc_sst2 teacher=DIR_OR_HUB_ID data=DIR_OR_HUB_NAME corpus=[DIR] [--rows ...]

Settings are those of the recipe `arc-sst2`, changed by the same `key=value` words. Finished cells are kept in
benchmarks/results/arc_sst2.jsonl and not run again; the teacher and stage A are trained once (seed 0) and shared, the
seeds cover the task phase. `--split held-out` trains and reads on 95 % / 5 % of train, to choose settings: give each
trial an `output_dir=` of its own.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from fastkd.benchmarks.tables.protocol import Cells, mean_and_error, paired_interval, share_recovered
from fastkd.data import chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.models import create_student
from fastkd.recipes import (
    ArcRecipe,
    ArcStageATrainer,
    ArcStageBConfig,
    ArcStageBTrainer,
    FineTuneConfig,
    FineTuneTrainer,
    from_settings,
    read_settings,
    stage_b_encoder,
)
from fastkd.recipes.run_folder import is_done, load, train_and_save
from fastkd.recipes.task_recipe import total_steps, with_head

# Each row, and the sections of the recipe that it depends on.
ROWS = {
    "teacher": ("teacher, fine-tuned", ("finetune",)),
    "truncated_first": ("student truncated to the first layers, fine-tuned", ("finetune", "student")),
    "truncated_spaced": ("student truncated to evenly spaced layers, fine-tuned", ("finetune", "student")),
    "truncated_soft": (
        "truncated to the first layers, fine-tuned with soft labels",
        ("finetune", "student", "stage_b"),
    ),
    "theseus": ("replacement only (Theseus)", ("finetune", "student", "stage_b")),
    "stage_a": ("stage A, then plain fine-tuning", ("finetune", "student", "stage_a")),
    "arc": ("ARC: stage A, then replacement", ("finetune", "student", "stage_a", "stage_b")),
    "arc_soft": ("ARC with soft labels in stage B", ("finetune", "student", "stage_a", "stage_b")),
}
RESULTS = Path(__file__).parent.parent / "results" / "arc_sst2.jsonl"


class Table:
    """The models of the table, each made from the recipe's settings."""

    def __init__(self, recipe: ArcRecipe, split: str, folder: Path):
        self.recipe, self.folder, self.split = recipe, folder / split, split
        task = load_task(recipe.task, recipe.data)
        self.task = task if split == "validation" else task.hold_out()
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
        self.tokens = self.task.tokenize(self.tokenizer, recipe.max_length)
        self.configs = recipe.configs()

    def pretrained(self, seed: int = 0):
        return with_head(self.recipe.teacher, self.task, seed)

    def teacher(self):
        if not is_done(self.folder / "teacher"):
            self.finetuned(self.pretrained(), self.configs["finetune"], self.folder / "teacher")
        return load(self.folder / "teacher")

    def stage_a_student(self):
        folder = self.folder / "stage_a"
        if not is_done(folder):
            teacher, config = self.pretrained(), self.configs["stage_a"]
            text = chunk_corpus(
                load_corpus([*self.recipe.corpus, task_sentences(self.task)]), self.tokenizer, config.max_length
            )
            student = create_student(teacher, **self.recipe.student)
            trainer = ArcStageATrainer(
                student,
                dataclasses.replace(config, output_dir=str(folder)),
                teacher=teacher,
                processing_class=self.tokenizer,
                train_dataset=text,
            )
            train_and_save(trainer, folder)
        return load(folder)

    def finetuned(self, model, config, folder: Path):
        config = dataclasses.replace(config, output_dir=str(folder))
        trainer = FineTuneTrainer(model, config, processing_class=self.tokenizer, train_dataset=self.tokens["train"])
        train_and_save(trainer, folder)
        return load(folder)

    def replaced(self, student, config: ArcStageBConfig, folder: Path):
        config = dataclasses.replace(config, output_dir=str(folder))
        encoder = stage_b_encoder(self.teacher(), student, config, total_steps(config, self.tokens["train"]))
        trainer = ArcStageBTrainer(encoder, config, processing_class=self.tokenizer, train_dataset=self.tokens["train"])
        train_and_save(trainer, folder)
        return load(folder)

    def model(self, row: str, seed: int):
        """Train the model of a cell."""
        folder = self.folder / f"{row}-{seed}"
        plain: FineTuneConfig = dataclasses.replace(self.configs["finetune"], seed=seed)
        stage_b: ArcStageBConfig = dataclasses.replace(self.configs["stage_b"], seed=seed, soft_weight=0.0)
        soft = dataclasses.replace(stage_b, soft_weight=0.5)
        shape = {k: v for k, v in self.recipe.student.items() if k != "init"}
        match row:
            case "teacher":
                return self.teacher()
            case "truncated_first" | "truncated_spaced":
                student = create_student(self.pretrained(seed), init=row.removeprefix("truncated_"), **shape)
                return self.finetuned(student, plain, folder)
            case "truncated_soft":  # a rate of 1 from the start: the student alone, with the predecessor's soft labels
                student = create_student(self.pretrained(), init="first", **shape)
                return self.replaced(student, dataclasses.replace(soft, reach=0.0, train_head=True), folder)
            case "theseus":
                return self.replaced(create_student(self.teacher(), init="first", **shape), stage_b, folder)
            case "stage_a":
                return self.finetuned(self.stage_a_student(), plain, folder)
            case "arc":
                return self.replaced(self.stage_a_student(), stage_b, folder)
            case "arc_soft":
                return self.replaced(self.stage_a_student(), soft, folder)
        raise ValueError(f"no row {row!r}; allowed are {', '.join(ROWS)}")

    def read(self, model) -> dict:
        """Accuracy on the split, and example by example."""
        config = FineTuneConfig(output_dir=str(self.folder), bf16=False, disable_tqdm=True)
        trainer = FineTuneTrainer(model, config, processing_class=self.tokenizer)
        found = trainer.predict(self.tokens["validation"])
        correct = found.predictions.argmax(1) == found.label_ids
        return {"score": float(correct.mean()), "correct": "".join("01"[int(c)] for c in correct)}


def show(cells: Cells) -> str:
    """The table as Markdown: mean and standard error over seeds, and the share of the gap that each row recovers."""
    lines = ["| model | validation accuracy | gap recovered | 95 % interval | seeds |", "|---|---|---|---|---|"]
    teacher = cells.find("teacher", "validation")
    baselines = [found for row in ("truncated_first", "truncated_spaced") if (found := cells.find(row, "validation"))]
    baseline = max(baselines, key=lambda found: mean_and_error(found)[0], default=[])
    for row, (name, _) in ROWS.items():
        found = cells.find(row, "validation")
        if not found:
            lines.append(f"| {name} | not run | | | |")
            continue
        mean, error = mean_and_error(found)
        score = f"{mean:.1f}" + ("" if np.isnan(error) else f" ± {error:.1f}")
        recovered = interval = ""
        if row not in ("teacher", "truncated_first", "truncated_spaced") and teacher and baseline:
            share, low, high = paired_interval([found, baseline, teacher], share_recovered)
            recovered, interval = f"{100 * share:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %"
        seeds = ", ".join(str(c["seed"]) for c in found)
        lines.append(f"| {name} | {score} | {recovered} | {interval} | {seeds} |")
    return "\n".join(lines)


def show_held_out(cells: Cells) -> str:
    """Every cell read on held-out data, with the settings in which it differs from the recipe as it is shipped."""
    shipped = read_settings("arc-sst2", [])
    lines = ["| model | settings that differ from the recipe | held-out accuracy | seed |", "|---|---|---|---|"]
    for row, (name, _) in ROWS.items():
        for cell in cells.find(row, "held-out"):
            differ = [
                f"{section}.{key}={value}"
                for section, values in cell["settings"].items()
                for key, value in values.items()
                if shipped[section].get(key) != value
            ]
            lines.append(f"| {name} | {' '.join(differ)} | {100 * cell['score']:.2f} | {cell['seed']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, of: %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--split", choices=("validation", "held-out"), default="validation")
    parser.add_argument("--show", action="store_true", help="print the table of the finished cells and run nothing")
    options = parser.parse_intermixed_args()
    cells = Cells(RESULTS)

    def table_so_far() -> str:
        return show(cells) if options.split == "validation" else show_held_out(cells)

    if not options.show:
        settings = read_settings("arc-sst2", ["output_dir=runs/arc-sst2-table", *options.settings])
        settings.pop("recipe")
        table = Table(from_settings(ArcRecipe, settings, "arc"), options.split, Path(settings["output_dir"]))
        for row in options.rows.split(","):
            # The teacher and the data everybody keeps in a place of their own: not part of the record.
            record = {section: settings.get(section) for section in ROWS[row][1]}
            for seed in [0] if row == "teacher" else map(int, options.seeds.split(",")):
                if not cells.has(row, seed, options.split, record):
                    start = time.perf_counter()
                    model = table.model(row, seed)
                    cells.add(
                        row,
                        seed,
                        options.split,
                        **table.read(model),
                        seconds=round(time.perf_counter() - start),
                        settings=record,
                    )
                    print(table_so_far(), flush=True)
    print(table_so_far())


if __name__ == "__main__":
    main()
