"""Recipes: the published systems, each a dataclass of settings and a Trainer for every stage."""

from fastkd.recipes.arc import ArcRecipe
from fastkd.recipes.arc_stage_a import ArcStageAConfig, ArcStageATrainer
from fastkd.recipes.arc_stage_b import ArcStageBConfig, ArcStageBTrainer, stage_b_encoder
from fastkd.recipes.egkd import EgkdRecipe
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_task import EgkdTrainer
from fastkd.recipes.egkd_teacher import teacher_results
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.lrc_bert import LrcBertRecipe
from fastkd.recipes.lrc_bert_general import LrcBertGeneralConfig, LrcBertGeneralTrainer
from fastkd.recipes.lrc_bert_task import LrcBertConfig, LrcBertTrainer
from fastkd.recipes.settings import from_settings, read_settings, shipped_recipes
from fastkd.recipes.training import DistillationArguments, DistillationTrainer, NotFiniteError

RECIPES = {"arc": ArcRecipe, "lrc_bert": LrcBertRecipe, "egkd": EgkdRecipe}

__all__ = [
    "RECIPES",
    "ArcRecipe",
    "ArcStageAConfig",
    "ArcStageATrainer",
    "ArcStageBConfig",
    "ArcStageBTrainer",
    "DistillationArguments",
    "DistillationTrainer",
    "EgkdConfig",
    "EgkdRecipe",
    "EgkdTrainer",
    "FineTuneConfig",
    "FineTuneTrainer",
    "LrcBertConfig",
    "LrcBertGeneralConfig",
    "LrcBertGeneralTrainer",
    "LrcBertRecipe",
    "LrcBertTrainer",
    "NotFiniteError",
    "read_settings",
    "run_recipe",
    "shipped_recipes",
    "stage_b_encoder",
    "teacher_results",
]


def run_recipe(settings: dict) -> dict:
    """Run what `read_settings` gave; returns the recipe's results.

    Raises:
        ValueError: `recipe` is missing or unknown, or any setting does not fit; nothing was written by then.
    """
    settings = dict(settings)
    kind = settings.pop("recipe", None)
    if kind not in RECIPES:
        raise ValueError(f"recipe: {kind!r} is not one of {', '.join(RECIPES)}")
    return from_settings(RECIPES[kind], settings, kind).run()
