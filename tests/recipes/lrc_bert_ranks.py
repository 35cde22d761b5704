"""Tiny runs of LRC-BERT's trainers, alone or as the ranks of torchrun: see test_lrc_bert_two_processes.py.

  torchrun --nproc-per-node 2 lrc_bert_ranks.py FOLDER

FOLDER holds a teacher with its tokenizer and the tokenized task. Every rank leaves its parameters and losses there.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_from_disk
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastkd
from fastkd.recipes import FineTuneConfig, FineTuneTrainer, LrcBertConfig, LrcBertTrainer

RUNS = ("cls", "token", "finetune")  # LRC-BERT by what it compares, and fine-tuning


def make_trainer(run: str, folder: Path, batch: int, dropout: float = 0.0, **changes):
    """Six steps, of LRC-BERT three in either stage, from perturbed embeddings, `batch` sequences per process."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher", **rates)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    settings = {"bf16": False, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": batch, "max_steps": 6}
    student = fastkd.create_student(teacher, layers=2, hidden=24, heads=4, init="random")
    data = {"processing_class": tokenizer, "train_dataset": load_from_disk(str(folder / "data"))}
    if run == "finetune":
        return FineTuneTrainer(student, FineTuneConfig(perturbation="embedding", **settings | changes), **data)
    config = LrcBertConfig(**{**settings, "pooling": run, "contrast_only": 0.5, **changes})
    return LrcBertTrainer(student, config, teacher=teacher, **data)


def losses(trainer) -> dict[int, dict[str, float]]:
    """The loss and every term of each step."""
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("loss")}
        for line in trainer.state.log_history
        if "loss" in line
    }


def main(folder: Path) -> None:
    found = {}
    for run in RUNS:
        trainer = make_trainer(run, folder, 16, output_dir=str(folder / run))
        trainer.train()
        rank = trainer.args.process_index
        torch.save(trainer.model.state_dict(), folder / f"{run}-{rank}.pt")
        found[run] = losses(trainer)

    # With dropout, from a checkpoint of the first stage.
    kept = {"dropout": 0.1, "optim": "adamw_torch_fused", "learning_rate": 1e-3, "output_dir": str(folder / "long")}
    whole = make_trainer("mean", folder, 16, save_strategy="steps", save_steps=2, save_total_limit=None, **kept)
    whole.train()
    resumed = make_trainer("mean", folder, 16, **kept)
    resumed.train(resume_from_checkpoint=str(folder / "long" / "checkpoint-2"))
    found |= {"whole": losses(whole), "resumed": losses(resumed)}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()  # its threads would end an interpreter that exits by abort()
