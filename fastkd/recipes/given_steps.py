"""Steps of a run that another run has done: their folders are checked before any work, and copied into the run."""

import shutil
from pathlib import Path

from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from fastkd.data import Task
from fastkd.models.loading import named_if_missing
from fastkd.recipes.run_folder import DONE, is_done, mark_done
from fastkd.recipes.training import check_vocabulary

_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


def check_given(argument: str, folder: Path, run_folder: Path) -> None:
    """Raise a ValueError where `folder` is no folder, or stands in the run that it is given to."""
    if not folder.is_dir():
        raise ValueError(f"{argument}={folder} is no folder; name one that a step of another run has left")
    if folder.resolve().is_relative_to(run_folder.resolve()):
        raise ValueError(f"{argument}={folder} is part of this very run; leave it out, or name another output_dir")


def check_teacher(argument: str, folder: Path, pretrained: PreTrainedModel, task: Task, tokenizer) -> None:
    """Raise a ValueError where `folder` holds no classifier of the task's labels with the encoder of `pretrained`."""
    with named_if_missing(folder, argument):
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{argument}={folder} is not fine-tuned: it has no {', '.join(sorted(report['missing_keys']))}"
        )
    if model.config.num_labels != task.num_labels:
        raise ValueError(
            f"task={task.name} has {task.num_labels} labels, {argument}={folder} gives {model.config.num_labels}"
        )
    task.check_label_names(model.config.id2label, f"{argument}={folder}")
    check_sizes(argument, folder, model, pretrained, "the teacher")
    check_vocabulary(tokenizer, **{argument: model})


def check_encoder(argument: str, folder: Path, student: PreTrainedModel) -> None:
    """Raise a ValueError where `folder` holds no finished step, or an encoder of other sizes than the student's."""
    if not is_done(folder):
        raise ValueError(f"{argument}={folder} holds no finished step: there is no {DONE}")
    with named_if_missing(folder, argument):
        model = AutoModel.from_pretrained(folder)
    check_sizes(argument, folder, model, student, "the student")


def check_sizes(argument: str, folder: Path, given: PreTrainedModel, asked: PreTrainedModel, whose: str) -> None:
    """Raise a ValueError that names the first size of the encoders that differs."""
    sizes = [
        {name: getattr(model.config, name, None) for name in _SIZES}
        | {"vocabulary": model.get_input_embeddings().num_embeddings}
        for model in (given, asked)
    ]
    for name, found in sizes[0].items():
        if found != sizes[1][name]:
            raise ValueError(f"{argument}={folder} has {name} {found}, {whose} {sizes[1][name]}; they must be alike")


def copy_step(given: Path, folder: Path, config) -> None:
    """Leave in `folder` what the step that is given has left. Every process comes back once it is there."""
    with config.main_process_first(desc="copy of a given step"):
        if config.process_index == 0:
            print(f"{folder.name}: copied from {given}")
            shutil.copytree(given, folder, ignore=shutil.ignore_patterns("checkpoint-*", DONE), dirs_exist_ok=True)
            mark_done(folder, {"copied_from": str(given)})
