"""The demo: a small BERT trained from scratch, shrunk with ARC, and measured. Nothing is downloaded.

It proves the machinery on a task that any machine has, the docstrings of installed packages. That task is close to a
bag of words, so it says nothing about whether distillation helps: see docs/demo.md.
"""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback

from fastkd.data import (
    Task,
    chunk_corpus,
    load_docstring_task,
    task_sentences,
    train_wordpiece,
)
from fastkd.models import create_student
from fastkd.recipes.arc_stage_a import ArcStageAConfig, ArcStageATrainer
from fastkd.recipes.arc_stage_b import ArcStageBConfig, ArcStageBTrainer, stage_b_encoder
from fastkd.recipes.demo_report import LABELS_ONLY, RESULTS, STUDENT, TEACHER, check, compare, show
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.plots import plot_accuracy_latency, plot_losses, plot_replacement


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and steps; the defaults take about three minutes on two cores.

    Args:
        vocabulary, max_length: word pieces that are learned, and tokens of an example.
        hidden, heads, teacher_layers, student_layers: sizes of the models; the feed-forward block is 4 x hidden.
        relation_heads: heads into which stage A cuts the projections.
        teacher_steps, stage_a_steps, task_steps: optimizer steps. `task_steps` is stage B's, and equally that of the
            student that is trained on labels only.
        batch_size, learning_rate, dropout: of all trainings.
        latency_sentences: how many sentences of the validation split are timed, each by every model in turn.
    """

    vocabulary: int = 8000
    max_length: int = 64
    hidden: int = 128
    heads: int = 2
    teacher_layers: int = 4
    student_layers: int = 2
    relation_heads: int = 8
    teacher_steps: int = 1000
    stage_a_steps: int = 400
    task_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 5e-4
    dropout: float = 0.1
    latency_sentences: int = 300


def run_demo(out: str | Path, seed: int = 0, *, task: Task | None = None, settings: DemoSettings | None = None) -> dict:
    """Train, shrink, compare; shows a progress bar and a table, and writes models, plots and `results.json` to `out`.

    Args:
        out: folder, which must not exist, be empty, or hold an earlier demo, which is replaced once this one is done.
        seed: of every weight, batch and draw.
        task: a task of single sentences; the docstring task by default.
        settings: sizes and steps.

    Returns:
        What `results.json` holds: `models` (by name: balanced_accuracy, standard_error and agreement in [0, 1],
        parameters, megabytes of 10^6 bytes, latency_ms), `checks` (by claim: whether it holds), `passed`, and the logs.

    Raises:
        ValueError: `out` is a file or holds something else; a seed out of range. Nothing was written by then.
    """
    out, settings, started = Path(out).absolute(), settings or DemoSettings(), time.perf_counter()
    _check_out(out)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}; allowed are 0 to 2^32 - 1")
    console = Console(highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Everything is made beside `out` and takes its place at the end: a run that is stopped leaves nothing.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch, _quiet():
        folder = Path(scratch, "new")
        folder.mkdir()
        with console.status("reading the docstrings of the installed packages"):
            task = task or load_docstring_task()
            tokenizer = train_wordpiece(task.train[task.text_columns[0]], settings.vocabulary)
        models, logs = train_models(task, tokenizer, settings, seed, Path(scratch, "trainer"), console)
        with console.status("comparing"):
            figures = compare(models, task, tokenizer, folder, settings.max_length, settings.latency_sentences)
        checks = check(figures)
        results = {
            "demo": task.name,
            "passed": all(checks.values()),
            "checks": checks,
            "models": figures,
            "seed": seed,
            "settings": dataclasses.asdict(settings),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "logs": logs,
        }
        (folder / RESULTS).write_text(json.dumps(results, indent=1))
        plot_losses(logs, folder / "losses.png")
        plot_replacement(logs["stage B"], folder / "replacement.png")
        plot_accuracy_latency(figures, folder / "accuracy-latency.png")
        if out.exists():
            os.replace(out, Path(scratch, "old"))
        os.replace(folder, out)
    show(results, out, console)
    return results


def train_models(
    task: Task, tokenizer, settings: DemoSettings, seed: int, trainer_folder: Path, console: Console
) -> tuple[dict[str, torch.nn.Module], dict[str, list[dict]]]:
    """The three Transformers by name, in eval mode, and the log of each of the four trainings."""
    tokens = task.tokenize(tokenizer, settings.max_length)["train"]
    common = {
        "output_dir": str(trainer_folder),
        "seed": seed,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "logging_steps": 10,
        "save_strategy": "no",
        "disable_tqdm": True,
        # fp32 on the CPU wherever it runs, so that everybody sees the same demo.
        "use_cpu": True,
        "bf16": False,
    }
    steps = {
        "teacher": settings.teacher_steps,
        "stage A": settings.stage_a_steps,
        "stage B": settings.task_steps,
        "labels only": settings.task_steps,
    }
    with _bars(console) as progress:
        bars = {name: progress.add_task(name, total=total, loss="", start=False) for name, total in steps.items()}

        def train(name: str, trainer) -> list[dict]:
            console.print(f"\n[bold]{name}[/bold]")
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Advance(progress, bars[name]))
            trainer.train()
            trainer.model.eval()
            return trainer.state.log_history

        logs = {}
        teacher = new_teacher(task, tokenizer, settings, seed)
        config = FineTuneConfig(max_steps=steps["teacher"], **common)
        logs["teacher"] = train(
            "teacher", FineTuneTrainer(teacher, config, processing_class=tokenizer, train_dataset=tokens)
        )

        student = create_student(teacher, layers=settings.student_layers, init="spaced")
        config = ArcStageAConfig(max_steps=steps["stage A"], relation_heads=settings.relation_heads, **common)
        text = chunk_corpus(task_sentences(task), tokenizer, settings.max_length)
        logs["stage A"] = train(
            "stage A",
            ArcStageATrainer(student, config, teacher=teacher, processing_class=tokenizer, train_dataset=text),
        )

        config = ArcStageBConfig(max_steps=steps["stage B"], **common)
        encoder = stage_b_encoder(teacher, student, config, steps["stage B"])
        logs["stage B"] = train(
            "stage B", ArcStageBTrainer(encoder, config, processing_class=tokenizer, train_dataset=tokens)
        )

        labels_only = create_student(teacher, layers=settings.student_layers, init="spaced")
        config = FineTuneConfig(max_steps=steps["labels only"], **common)
        logs["labels only"] = train(
            "labels only", FineTuneTrainer(labels_only, config, processing_class=tokenizer, train_dataset=tokens)
        )
    return {TEACHER: teacher, STUDENT: student.eval(), LABELS_ONLY: labels_only}, logs


def new_teacher(task: Task, tokenizer, settings: DemoSettings, seed: int) -> BertForSequenceClassification:
    """A small BERT with random weights; the global random state stays as it is."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.teacher_layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden,
        max_position_embeddings=settings.max_length,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        id2label=dict(enumerate(task.label_names)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def _check_out(out: Path) -> None:
    """Raise a ValueError unless `out` is free or holds an earlier demo."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            earlier = "demo" in json.loads((out / RESULTS).read_text())
        except (OSError, ValueError):
            earlier = False
        if not earlier:
            raise ValueError(f"--out {out} is not empty and holds no earlier demo; name another folder")


class _Advance(TrainerCallback):
    """Moves one bar of the progress display."""

    def __init__(self, progress: Progress, bar):
        self.progress, self.bar = progress, bar

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress.start_task(self.bar)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.progress.update(self.bar, loss=f"loss {logs['loss']:.3f}")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:<12}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Only the demo's own bars: those of datasets and transformers would be drawn through them."""
    shown = datasets.are_progress_bars_disabled(), transformers.logging.is_progress_bar_enabled()
    verbosity = transformers.logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if not shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            transformers.logging.enable_progress_bar()
