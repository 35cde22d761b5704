"""The tables of EGKD: what each branch of explanations is worth beside soft labels alone, at equal task steps.

  python -m fastkd.benchmarks.tables.egkd teacher=DIR_OR_HUB_ID data=DIR_OR_HUB_NAME [teachers={sst2: DIR, ...}]
      [epochs={mrpc: 5, ...}] [weights={gradient: 10, ...}] [bilstm.branch=gradient] [--tasks ...] [--rows ...]

Settings are those of the recipes `egkd-sst2` (3x384) and `egkd-bilstm-sst2` (bilstm), changed by the same `key=value`
words: `distil.temperature=4` in both, `bilstm.distil.learning_rate=1e-3` in one. weights: of the branches; a row has
its own, the mix has all. teachers: fine-tuned ones, in the place of fine-tuning them here. bilstm.branch: the one that
was best on held-out data.

Finished cells are kept in benchmarks/results/egkd.jsonl and not run again. The teachers are fine-tuned once (seed 0),
what a teacher gives for its task is computed once for all branches, and both are shared; the seeds cover the task
phase. Beside its score a cell records how far its explanations agree with the teacher's. `--split held-out` trains and
reads on 95 % / 5 % of train, to choose settings.
"""

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from fastkd.benchmarks.tables import glue
from fastkd.benchmarks.tables.egkd_page import BILSTM_TASKS, BRANCHES, ROWS, SHAPES, show, show_held_out
from fastkd.benchmarks.tables.glue import GlueSources, GlueTable, digest, without_length, words_of
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.recipes import EgkdConfig, EgkdRecipe, EgkdTrainer, from_settings, read_settings
from fastkd.recipes.egkd_report import explanation_report
from fastkd.recipes.egkd_teacher import teacher_results
from fastkd.recipes.run_folder import train_and_save
from fastkd.recipes.settings import check_keys

RESULTS = Path(__file__).parent.parent / "results" / "egkd.jsonl"
_WEIGHTS = {"gradient": 10.0, "perturbation": 1.0, "selection": 1.0}
_COMPARED = 400  # validation examples whose explanations are compared


@dataclasses.dataclass
class Sources:
    """What the command is given: by shape its recipe and the weights of branches, the branch of the BiLSTM, and what
    the shapes share."""

    recipes: dict[str, EgkdRecipe]
    weights: dict[str, dict[str, float]]
    branch: str
    shared: GlueSources


def sources_from(words: list[str]) -> Sources:
    """`key=value` words; one that begins with a shape and a dot holds for that shape alone.

    Raises:
        ValueError: a key that is unknown, or a value that does not fit.
    """
    recipes, weights, branch = {}, {}, BRANCHES[0]
    for shape, name in SHAPES.items():
        settings = read_settings(name, ["output_dir=runs/egkd-table", *words_of(shape, words, SHAPES)])
        settings.pop("recipe")
        teachers, epochs = settings.pop("teachers", {}), settings.pop("epochs", {})
        if shape == "bilstm":
            branch = settings.pop("branch", branch)
        own = settings.pop("weights", {})
        check_keys(own, BRANCHES, "weights")
        weights[shape] = _WEIGHTS | own
        recipes[shape] = recipe = from_settings(EgkdRecipe, settings, shape)
    if branch not in BRANCHES:
        raise ValueError(f"bilstm.branch={branch!r}; allowed are {', '.join(BRANCHES)}")
    shared = GlueSources(recipe.teacher, recipe.data, recipe.output_dir, recipe.max_length, teachers, epochs)
    return Sources(recipes, weights, branch, shared)


class Table(GlueTable):
    """Makes the cells that are missing."""

    def __init__(self, sources: Sources, cells: Cells, split: str = "validation"):
        super().__init__(sources.shared, cells, split)
        self.sources = sources

    def run(self, name: str, row: str, seed: int) -> bool:
        if row.startswith("bilstm/") and name not in BILSTM_TASKS:
            return False
        return super().run(name, row, seed)

    def settings(self, name: str, row: str, how: dict) -> dict:
        shape, _, what = row.partition("/")
        recipe = self.sources.recipes[shape]
        weights = self.sources.weights[shape]
        branches = {"plain": {}, "mix": weights}.get(what)
        if branches is None:
            branch = self.sources.branch if what == "branch" else what
            branches = {branch: weights[branch]}
        return {
            "teacher": how,
            "student": recipe.student,
            "distil": without_length(recipe.distil) | {"branches": branches},
            "epochs": self.given.epochs[name],
            "max_length": recipe.max_length,
        }

    def config(self, settings: dict, **others) -> EgkdConfig:
        length = {"max_steps": -1, "num_train_epochs": settings["epochs"], "disable_tqdm": True}
        return from_settings(EgkdConfig, settings["distil"] | length | others, "distil")

    @staticmethod
    def with_all_branches(settings: dict) -> dict:
        """Settings by which every branch explains, whatever the row's."""
        return settings | {"distil": settings["distil"] | {"branches": _WEIGHTS}}

    def results(self, name: str, settings: dict):
        """What the teacher of a task gives for its training data: for all branches, whatever the row needs of it."""
        teacher, _ = self.teacher(name)
        config = self.config(self.with_all_branches(settings), output_dir=str(self.folder))
        of = {key: settings["distil"].get(key) for key in ("gradient", "target", "pool", "mask_baseline", "selector")}
        path = self.folder / name / f"teacher-{digest(of)}.safetensors"
        return teacher_results(teacher, self.tokenizer, self.train(name), config, path)

    def train_student(self, name: str, row: str, seed: int, settings: dict, folder: Path) -> None:
        config = self.config(settings, output_dir=str(folder), seed=seed)
        teacher, _ = self.teacher(name)
        results = self.results(name, settings)
        student = self.student(row.partition("/")[0], teacher, seed)
        trainer = EgkdTrainer(
            student, config, teacher=results, processing_class=self.tokenizer, train_dataset=self.train(name)
        )
        train_and_save(trainer, folder)

    def student(self, shape: str, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
        recipe = self.sources.recipes[shape]
        if "kind" in recipe.student:  # it begins with random weights
            recipe = dataclasses.replace(recipe, student=recipe.student | {"seed": seed})
        return recipe.make_student(teacher)

    def measure(self, name: str, row: str, model: PreTrainedModel) -> dict:
        """How far the explanations of a student agree with the teacher's, by every explainer whatever its branch."""
        if row == "teacher":
            return {}
        teacher, _ = self.teacher(name)
        tokens = self.validation(name)
        settings = self.with_all_branches(self.settings(name, row, {}))
        config = self.config(settings, output_dir=str(self.folder))
        some = tokens.select(range(min(_COMPARED, len(tokens))))
        return {"consistency": explanation_report(teacher, model, self.tokenizer, some, config)}


def main() -> None:
    def table(words: list[str], cells: Cells, split: str) -> Table:
        return Table(sources_from(words), cells, split)

    glue.main(__doc__, tuple(ROWS), RESULTS, table, show, show_held_out)


if __name__ == "__main__":
    main()
