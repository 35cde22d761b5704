"""Tiny runs of EGKD's trainer, alone or as the ranks of torchrun: see test_egkd_two_processes.py.

  torchrun --nproc-per-node 2 egkd_ranks.py FOLDER

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
from fastkd.recipes import EgkdConfig, EgkdTrainer, NotFiniteError, egkd_branches, teacher_results

_ALL = {"gradient": 1e3, "perturbation": 1.0, "selection": 1.0}
RUNS = {
    "central": {"branches": {"gradient": 1e3}, "second_order": "central_difference"},
    "exact": {"branches": {"gradient": 1e3}, "second_order": "exact", "explain_every": 2},
    "all": {"branches": _ALL, "masks": 2, "explain_share": 0.5},
    "accumulated": {"branches": _ALL, "second_order": "central_difference", "gradient_accumulation_steps": 2},
}


def make_trainer(run: str, folder: Path, batch: int, dropout: float = 0.0, **changes):
    """Five steps with `batch` sequences per process, from results that are stored in `folder`."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    student = AutoModelForSequenceClassification.from_pretrained(folder / "teacher", **rates)
    tokenizer, data = AutoTokenizer.from_pretrained(folder / "teacher"), load_from_disk(str(folder / "data"))
    settings = {"bf16": False, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": batch, "max_steps": 5}
    settings |= {"explain_after": 0.2, "pool": {"samples": 6}, "selector": {"epochs": 1}, "output_dir": str(folder)}
    config = EgkdConfig(**{**settings, **RUNS[run], **changes})
    everything = EgkdConfig(**{**settings, "branches": _ALL})
    with config.main_process_first():
        results = teacher_results(folder / "teacher", tokenizer, data, everything, folder / "results.safetensors")
    student = fastkd.create_student(student, layers=2)
    return EgkdTrainer(student, config, teacher=results, processing_class=tokenizer, train_dataset=data)


def losses(trainer) -> dict[int, dict[str, float]]:
    """The loss and every term of each step."""
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("loss")}
        for line in trainer.state.log_history
        if "loss" in line
    }


def overflowing_once(explain, model):
    """`explain`, during whose second call the input of the model's head is infinite, and so is what autograd keeps of
    it."""
    calls = iter(range(10**6))

    def overflowing(*args, **kwargs):
        if next(calls) != 1:
            return explain(*args, **kwargs)
        hook = model.classifier.register_forward_pre_hook(lambda _, given: (given[0] * torch.inf,))
        try:
            return explain(*args, **kwargs)
        finally:
            hook.remove()

    return overflowing


def overflow(rank: int, trainer) -> str:
    """Trains with one overflow under masks, on the second rank alone. What stopped the run, or nothing."""
    original = egkd_branches.masked_logits
    if rank == 1:
        egkd_branches.masked_logits = overflowing_once(original, trainer.model)
    try:
        trainer.train()
    except NotFiniteError as error:
        return str(error)
    finally:
        egkd_branches.masked_logits = original
    return ""


def main(folder: Path) -> None:
    found = {}
    for run, settings in RUNS.items():
        batch = 16 // settings.get("gradient_accumulation_steps", 1)
        trainer = make_trainer(run, folder, batch, output_dir=str(folder / run))
        trainer.train()
        rank = trainer.args.process_index
        torch.save(trainer.model.state_dict(), folder / f"{run}-{rank}.pt")
        found[run] = losses(trainer)

    masked = {"output_dir": str(folder / "overflow"), "branches": {"perturbation": 1.0}}
    counting, stopping = (make_trainer("all", folder, 16, max_skipped=rows, **masked) for rows in (2, 1))
    found["overflow"] = [overflow(rank, trainer) for trainer in (counting, stopping)]
    torch.save(counting.model.state_dict(), folder / f"overflow-{rank}.pt")
    lines = [line for line in counting.state.log_history if "explanations_skipped" in line]
    found["skipped"] = [line["explanations_skipped"] for line in lines]

    # With dropout, from a checkpoint before the branches begin.
    kept = {"dropout": 0.1, "optim": "adamw_torch_fused", "learning_rate": 1e-3, "output_dir": str(folder / "long")}
    kept |= {"explain_after": 0.6}
    whole = make_trainer("all", folder, 16, save_strategy="steps", save_steps=2, save_total_limit=None, **kept)
    whole.train()
    resumed = make_trainer("all", folder, 16, **kept)
    resumed.train(resume_from_checkpoint=str(folder / "long" / "checkpoint-2"))
    found |= {"whole": losses(whole), "resumed": losses(resumed)}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()  # its threads would end an interpreter that exits by abort()
