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

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path

from datasets import concatenate_datasets

from fastkd.benchmarks.tables import glue
from fastkd.benchmarks.tables.glue import GlueSources, GlueTable, digest, short, without_length, words_of
from fastkd.benchmarks.tables.glue_page import TASKS
from fastkd.benchmarks.tables.lrc_bert_page import CHANGES, ROWS, SHAPES, show, show_held_out
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.data import chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.data.corpora import Corpus
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
from fastkd.recipes.run_folder import is_done, train_and_save
from fastkd.recipes.task_recipe import with_head

RESULTS = Path(__file__).parent.parent / "results" / "lrc_bert.jsonl"


@dataclasses.dataclass
class Sources:
    """What the command is given: by shape its recipe and what soft labels alone change of it, and what both share."""

    recipes: dict[str, LrcBertRecipe]
    plain: dict[str, dict]
    shared: GlueSources


def sources_from(words: list[str]) -> Sources:
    """`key=value` words; one that begins with a shape and a dot holds for that shape alone.

    Raises:
        ValueError: a key that is unknown, or a value that does not fit.
    """
    recipes, plain = {}, {}
    for shape, name in SHAPES.items():
        own = words_of(shape, words, SHAPES)
        settings = read_settings(name, ["output_dir=runs/lrc-bert-table", *own])
        settings.pop("recipe")
        teachers, epochs = settings.pop("teachers", {}), settings.pop("epochs", {})
        plain[shape] = settings.pop("plain", {})
        recipes[shape] = recipe = from_settings(LrcBertRecipe, settings, shape)
    shared = GlueSources(recipe.teacher, recipe.data, recipe.output_dir, recipe.max_length, teachers, epochs)
    return Sources(recipes, plain, shared)


class Table(GlueTable):
    """Makes the cells that are missing."""

    def __init__(self, sources: Sources, cells: Cells, split: str = "validation"):
        super().__init__(sources.shared, cells, split)
        self.sources = sources

    @cached_property
    def text(self) -> Corpus:
        """The corpus and the sentences of all four tasks. They have no labels, so one general distillation serves the
        choices on held-out data and the table."""
        sentences = [task_sentences(load_task(name, self.given.data)) for name in TASKS]
        return load_corpus([*next(iter(self.sources.recipes.values())).corpus, concatenate_datasets(sentences)])

    def general_settings(self, shape: str) -> dict:
        recipe = self.sources.recipes[shape]
        matched = {"layer_pairs": recipe.layer_pairs, "pooling": recipe.pooling}
        text = hashlib.sha256("\n".join(self.text["text"][:]).encode()).hexdigest()
        general = {"seed": recipe.seed} | recipe.general | matched
        return {"pretrained": self.pretrained, "text": short(text), "student": recipe.student, "general": general}

    def general(self, shape: str) -> Path:
        """The student of a shape after the general distillation, with its maps."""
        recipe = self.sources.recipes[shape]
        folder = self.folder.parent / f"general-{shape}-{digest(self.general_settings(shape))}"
        if not is_done(folder):
            config = dataclasses.replace(recipe.configs()["general"], output_dir=str(folder))
            text = chunk_corpus(self.text, self.tokenizer, config.max_length)
            train_and_save(recipe.general_trainer(config, self.tokenizer, text), folder)
        return folder

    def settings(self, name: str, row: str, how: dict) -> dict:
        shape, _, what = row.partition("/")
        recipe = self.sources.recipes[shape]
        steps = {"epochs": self.given.epochs[name], "max_length": recipe.max_length}
        if what == "finetuned":
            own = {"student": recipe.student, "finetune": without_length(recipe.finetune)}
            return {"pretrained": self.pretrained, **own, **steps}
        own = self.sources.plain[shape] if what == "plain" else {}
        distil = (
            without_length(recipe.distil)
            | CHANGES[what]
            | own
            | {"layer_pairs": recipe.layer_pairs, "pooling": recipe.pooling}
        )
        return {"teacher": how, **self.general_settings(shape), "distil": distil, **steps}

    def train_student(self, name: str, row: str, seed: int, settings: dict, folder: Path) -> None:
        shape, _, what = row.partition("/")
        recipe, task = self.sources.recipes[shape], self.task(name)
        shared = {"output_dir": str(folder), "seed": seed, "disable_tqdm": True}
        length = {"max_steps": -1, "num_train_epochs": settings["epochs"]}
        data = {"processing_class": self.tokenizer, "train_dataset": self.train(name)}
        if what == "finetuned":
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


def main() -> None:
    def table(words: list[str], cells: Cells, split: str) -> Table:
        return Table(sources_from(words), cells, split)

    glue.main(__doc__, tuple(ROWS), RESULTS, table, show, show_held_out)


if __name__ == "__main__":
    main()
