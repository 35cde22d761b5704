"""A tiny BERT with random weights, a tokenizer made on the spot, and a task it can learn in seconds."""

import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import fastkd
from fastkd.data import chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.data.wordpiece import train_wordpiece
from fastkd.recipes import (
    ArcStageAConfig,
    ArcStageATrainer,
    ArcStageBConfig,
    ArcStageBTrainer,
    EgkdConfig,
    EgkdTrainer,
    FineTuneConfig,
    FineTuneTrainer,
    stage_b_encoder,
    teacher_results,
)


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection():
    """Every Trainer.train begins with a full collection, which walks through all of torch and transformers."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def run_two_ranks():
    """Runs `script FOLDER` in two processes over gloo."""

    def run(script: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        ranks = subprocess.run(
            [*command, str(script), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ranks.returncode == 0, ranks.stderr[-3000:]

    return run


_GOOD = "good fine great lovely superb charming".split()
_BAD = "bad awful poor boring dreadful clumsy".split()
_OTHER = "the a film plot it was is and of with actor story scene music very quite in on this that".split()


def _sentences(count: int, seed: int) -> pd.DataFrame:
    """Sentences of 3 to 13 words; the label says which of two kinds of words stands in them."""
    draw = random.Random(seed)
    rows = []
    for row in range(count):
        words = draw.choices(_OTHER, k=draw.randint(2, 12))
        words.insert(draw.randrange(len(words) + 1), draw.choice((_BAD, _GOOD)[row % 2]))
        rows.append((" ".join(words), row % 2))
    return pd.DataFrame(rows, columns=["sentence", "label"])


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """SST-2's columns and split names. 330 sentences to train on make ten batches of 32 and a short one."""
    folder = tmp_path_factory.mktemp("data")
    _sentences(330, seed=0).to_parquet(folder / "train.parquet")
    _sentences(96, seed=1).to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="session")
def task(data_folder):
    return load_task("sst2", data_folder)


@pytest.fixture(scope="session")
def tokenizer(task):
    return train_wordpiece(task.train["sentence"], vocab_size=120, max_length=32)


@pytest.fixture(scope="session")
def tokens(task, tokenizer):
    return task.tokenize(tokenizer, max_length=32)


@pytest.fixture(scope="session")
def windows(task, tokenizer):
    """Stage A's text."""
    return chunk_corpus(load_corpus(task_sentences(task)), tokenizer, 32)


@pytest.fixture(scope="session")
def make_teacher(tokenizer):
    """make_teacher(layers=4, dropout=0.1): a BERT of width 32 with two classes, always of the same weights."""

    def make(layers=4, dropout=0.1, **changes):
        config = BertConfig(
            **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
            | {"num_hidden_layers": layers, "max_position_embeddings": 32, "num_labels": 2}
            | {"initializer_range": 0.05}  # the usual 0.02 makes all relations nearly alike at this width
            | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
            | changes
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return BertForSequenceClassification(config).eval()

    return make


@pytest.fixture(scope="session")
def teacher_folder(make_teacher, tokenizer, tmp_path_factory):
    """A pretrained encoder as a user would have it on disk: without a head for the task."""
    folder = tmp_path_factory.mktemp("teacher")
    make_teacher().bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """settings(...): what all tiny runs have in common; fp32, so that results compare on every machine."""

    def make(**changes):
        folder = changes.pop("output_dir", None) or tmp_path_factory.mktemp("run")
        return {
            "output_dir": str(folder),
            "bf16": False,
            "max_steps": 12,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 2e-3,
            "warmup_steps": 0,
            "disable_tqdm": True,
        } | changes

    return make


@pytest.fixture(scope="session")
def make_finetune(make_teacher, tokenizer, tokens, settings):
    """make_finetune(max_steps=..): the trainer of a fresh teacher."""

    def make(dropout=0.1, callbacks=None, **changes):
        return FineTuneTrainer(
            make_teacher(dropout=dropout),
            FineTuneConfig(**settings(**changes)),
            processing_class=tokenizer,
            train_dataset=tokens["train"],
            eval_dataset=tokens["validation"],
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="session")
def make_stage_a(make_teacher, tokenizer, windows, settings):
    """make_stage_a(layers=2, ..): the trainer of a student that starts from the teacher's first layers."""

    def make(dropout=0.1, student=None, teacher=None, callbacks=None, **changes):
        teacher = teacher or make_teacher(dropout=dropout)
        return ArcStageATrainer(
            student or fastkd.create_student(teacher, layers=2),
            ArcStageAConfig(**settings(**{"relation_heads": 8, "per_device_train_batch_size": 32} | changes)),
            teacher=teacher,
            processing_class=tokenizer,
            train_dataset=windows,
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="session")
def make_stage_b(make_teacher, tokenizer, tokens, settings):
    """make_stage_b(predecessor=.., ..): the trainer of a 2-layer student inside its 4-layer predecessor."""

    def make(dropout=0.1, predecessor=None, student=None, callbacks=None, **changes):
        predecessor = predecessor or make_teacher(dropout=dropout)
        student = student or fastkd.create_student(predecessor, layers=2)
        config = ArcStageBConfig(**settings(**changes))
        return ArcStageBTrainer(
            stage_b_encoder(predecessor, student, config, config.max_steps),
            config,
            processing_class=tokenizer,
            train_dataset=tokens["train"],
            eval_dataset=tokens["validation"],
            callbacks=callbacks,
        )

    return make


_BRANCHES = {"gradient": 10.0, "perturbation": 0.5, "selection": 0.5}


@pytest.fixture(scope="session")
def make_egkd(make_teacher, tokenizer, tokens, settings, tmp_path_factory):
    """make_egkd(branches=.., stored=.., ..): the trainer of a student of two layers, with all branches from the first
    step on. What is stored of the usual teacher serves all runs."""
    file = tmp_path_factory.mktemp("results") / "results.safetensors"

    def make(dropout=0.1, teacher=None, student=None, data=None, stored=True, branches=_BRANCHES, **changes):
        sections = {"pool": {"samples": 6}, "selector": {"epochs": 1, "hidden": 8}}
        config = EgkdConfig(**settings(**{"branches": branches, "explain_after": 0.0, **sections, **changes}))
        usual = teacher is None and data is None and not changes.keys() & {"gradient", "target"}
        given, data = teacher or make_teacher(dropout=0.0), data or tokens["train"]
        if stored:
            path = file if usual else tmp_path_factory.mktemp("results") / "results.safetensors"
            everything = settings(branches=_BRANCHES, use_cpu=config.use_cpu, **sections)
            given = teacher_results(given, tokenizer, data, EgkdConfig(**everything) if usual else config, path)
        return EgkdTrainer(
            student or fastkd.create_student(make_teacher(dropout=dropout), layers=2),
            config,
            teacher=given,
            processing_class=tokenizer,
            train_dataset=data,
            eval_dataset=tokens["validation"],
        )

    return make


def losses(trainer) -> dict[int, float]:
    """The loss of every step that was logged, unrounded."""
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


def checkpoint(trainer, step: int) -> str:
    return str(Path(trainer.args.output_dir, f"checkpoint-{step}"))


@pytest.fixture(scope="session")
def assert_resumes_exactly():
    """Train `make(..)` to its end, then again from checkpoints in both epochs and at the border between them."""

    def check(make):
        kept = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
        whole = make(max_steps=15, **kept)
        whole.train()
        assert len(losses(whole)) == 15
        for step in (4, 11, 13):
            resumed = make(max_steps=15)
            resumed.train(resume_from_checkpoint=checkpoint(whole, step))
            assert {s: v for s, v in losses(resumed).items() if s > step} == {
                s: v for s, v in losses(whole).items() if s > step
            }, f"resumed from step {step}"
            for name, tensor in whole.model.state_dict().items():
                assert torch.equal(resumed.model.state_dict()[name], tensor), f"{name}, resumed from step {step}"

    return check


@pytest.fixture(scope="session")
def assert_accumulation_changes_nothing():
    """4 x 8 against 1 x 32 over an epoch and its short last batch, with sequences of unequal length."""

    def check(make, atol=1e-6):
        # Plain SGD, so that a difference in a gradient is a difference in a parameter.
        same = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 12, "dropout": 0.0}
        start = {name: tensor.clone() for name, tensor in make(**same).model.state_dict().items()}
        once, accumulated = (
            make(per_device_train_batch_size=32 // n, gradient_accumulation_steps=n, **same) for n in (1, 4)
        )
        for trainer in (once, accumulated):
            trainer.train()
        moved = 0.0
        for name, tensor in once.model.state_dict().items():
            torch.testing.assert_close(accumulated.model.state_dict()[name], tensor, atol=atol, rtol=0, msg=name)
            moved = max(moved, (tensor - start[name]).abs().max().item())
        assert moved > 1e-3
        for step, loss in losses(once).items():
            assert losses(accumulated)[step] == pytest.approx(loss, abs=atol)

    return check


@pytest.fixture(scope="session")
def recipe_settings(teacher_folder, data_folder):
    """recipe_settings(output_dir=.., stage_a={..}): the settings of a whole ARC run of a few steps."""

    def make(output_dir, **changes):
        step = {"bf16": False, "learning_rate": 2e-3, "logging_steps": 5, "save_steps": 4, "disable_tqdm": True}
        sections = {
            "finetune": step | {"max_steps": 12},
            "stage_a": step | {"max_steps": 12, "relation_heads": 8, "max_length": 32},
            "stage_b": step | {"max_steps": 12},
            "student": {"layers": 2, "init": "first"},
        }
        for name, section in sections.items():
            if isinstance(changes.get(name), dict):
                changes[name] = section | changes[name]
        return {
            "recipe": "arc",
            "teacher": str(teacher_folder),
            "task": "sst2",
            "data": str(data_folder),
            "output_dir": str(output_dir),
            "max_length": 32,
            **sections,
            **changes,
        }

    return make
