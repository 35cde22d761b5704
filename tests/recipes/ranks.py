"""Tiny runs of both stages and of the whole recipe, alone or as the ranks of torchrun: see test_two_processes.py.

  torchrun --nproc-per-node 2 ranks.py FOLDER

FOLDER holds a teacher with its tokenizer, the tokenized task, windows of text, and the settings of a recipe. Every rank
leaves its parameters and logs there.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastkd
from fastkd.recipes import (
    ArcStageAConfig,
    ArcStageATrainer,
    ArcStageBConfig,
    ArcStageBTrainer,
    run_recipe,
    stage_b_encoder,
    task_recipe,
)


def make_trainer(stage: str, folder: Path, batch: int, dropout: float = 0.0, **changes):
    """A trainer of "a" or "b" on what lies in `folder`, with `batch` sequences per process."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher", **rates)
    student = fastkd.create_student(teacher, layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    settings = {"bf16": False, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    settings |= {"optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": batch, "max_steps": 8} | changes
    data = DatasetDict.load_from_disk(folder / "data")
    if stage == "a":
        config = ArcStageAConfig(relation_heads=8, **settings)
        return ArcStageATrainer(
            student, config, teacher=teacher, processing_class=tokenizer, train_dataset=data["windows"]
        )
    config = ArcStageBConfig(soft_weight=0.5, **settings)
    encoder = stage_b_encoder(teacher, student, config, config.max_steps)
    return ArcStageBTrainer(encoder, config, processing_class=tokenizer, train_dataset=data["train"])


def losses(trainer) -> dict[int, dict[str, float]]:
    """The loss and every term of each step."""
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("loss")}
        for line in trainer.state.log_history
        if "loss" in line
    }


def of_a_given_teacher(settings: dict, rank: int) -> dict:
    """The recipe again, its teacher taken from the first run, in processes of which one is late."""
    finished = Path(settings["output_dir"])
    slow = task_recipe.is_done

    def is_done(folder: Path) -> bool:
        time.sleep(rank)
        return slow(folder)

    task_recipe.is_done = is_done
    given = {"finetuned_teacher": str(finished / "teacher"), "output_dir": f"{finished}-given"}
    return run_recipe(settings | given)


def main(folder: Path) -> None:
    found = {}
    for stage in "ab":
        for name, batch, accumulated in ((stage, 16, 1), (f"{stage}-accumulated", 8, 2)):
            cut = {"gradient_accumulation_steps": accumulated, "output_dir": str(folder / name)}
            trainer = make_trainer(stage, folder, batch, **cut)
            trainer.train()
            rank = trainer.args.process_index
            torch.save(trainer.model.state_dict(), folder / f"{name}-{rank}.pt")
            found[name] = losses(trainer)

        # Into the second epoch, with dropout: 330 sequences make eleven steps.
        long = {"dropout": 0.1, "max_steps": 15, "output_dir": str(folder / f"{stage}-long")}
        whole = make_trainer(stage, folder, 16, save_strategy="steps", save_steps=13, save_total_limit=None, **long)
        whole.train()
        resumed = make_trainer(stage, folder, 16, **long)
        resumed.train(resume_from_checkpoint=str(folder / f"{stage}-long" / "checkpoint-13"))
        found[f"{stage}-long"] = losses(whole)
        found[f"{stage}-resumed"] = losses(resumed)
    settings = json.loads((folder / "recipe.json").read_text())
    found["results"] = run_recipe(settings)
    found["given"] = of_a_given_teacher(settings, rank)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()  # its threads would end an interpreter that exits by abort()
