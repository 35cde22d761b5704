"""The demo: a small BERT trained from scratch, shrunk with ARC, and measured. Nothing is downloaded.

It proves the machinery on a task that any machine has, the docstrings of installed packages. That task is close to a
bag of words, so it says nothing about whether distillation helps: see docs/demo.md.
"""

import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import joblib
import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback

from fastkd.data import (
    Task,
    chunk_corpus,
    fit_bag_of_words,
    load_docstring_task,
    score,
    task_sentences,
    train_wordpiece,
)
from fastkd.models import create_student
from fastkd.recipes.arc_stage_a import ArcStageAConfig, ArcStageATrainer
from fastkd.recipes.arc_stage_b import ArcStageBConfig, ArcStageBTrainer, stage_b_encoder
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.plots import plot_accuracy_latency, plot_losses, plot_replacement

TEACHER, STUDENT, LABELS_ONLY, BAG_OF_WORDS = "teacher", "ARC student", "student on labels", "bag of words"
_RESULTS = "results.json"

NOTE = (
    "The docstring task is close to a bag of words: logistic regression on word counts and Transformers of 1, 2 and 4 "
    "layers reach about the same accuracy. So nothing here shows that distillation helps, and the demo does not claim "
    "it. It shows that the machinery works: a smaller and faster student that is as good as its teacher and agrees "
    "with it."
)


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and steps; the defaults take about five minutes on two cores.

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
            figures = compare(models, task, tokenizer, settings, folder)
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
        (folder / _RESULTS).write_text(json.dumps(results, indent=1))
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


def compare(
    models: dict[str, torch.nn.Module], task: Task, tokenizer, settings: DemoSettings, folder: Path
) -> dict[str, dict[str, float]]:
    """Save the Transformers and a bag of words below `folder` and measure all of them on the validation split."""
    bag = fit_bag_of_words(task)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    sizes[BAG_OF_WORDS] = bag[-1].coef_.size + bag[-1].intercept_.size
    megabytes = {}
    for name, model in models.items():
        place = folder / name.replace(" ", "-").lower()
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        megabytes[name] = sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e6
    joblib.dump(bag, folder / "bag-of-words.joblib")
    megabytes[BAG_OF_WORDS] = (folder / "bag-of-words.joblib").stat().st_size / 1e6

    def classifier(model) -> Callable[[list[str]], np.ndarray]:
        @torch.inference_mode()
        def classify(sentences: list[str]) -> np.ndarray:
            inputs = tokenizer(
                sentences, truncation=True, max_length=settings.max_length, padding=True, return_tensors="pt"
            )
            return model(**inputs).logits.argmax(-1).numpy()

        return classify

    classify = {name: classifier(model) for name, model in models.items()} | {BAG_OF_WORDS: bag.predict}
    sentences, labels = task.validation[task.text_columns[0]][:], np.array(task.validation["label"])
    predictions = {name: in_batches(function, sentences) for name, function in classify.items()}
    latency = latencies(classify, sentences[:: max(1, len(sentences) // settings.latency_sentences)])
    return {
        name: {
            "balanced_accuracy": score(["balanced_accuracy"], predicted, labels)["balanced_accuracy"],
            "standard_error": standard_error(predicted, labels),
            "agreement": float((predicted == predictions[TEACHER]).mean()),
            "parameters": sizes[name],
            "megabytes": megabytes[name],
            "latency_ms": latency[name],
        }
        for name, predicted in predictions.items()
    }


def in_batches(classify: Callable[[list[str]], np.ndarray], sentences: list[str], size: int = 64) -> np.ndarray:
    """(N,) class indices; batches hold sentences of similar length, so that little is padded."""
    order = np.argsort([len(sentence) for sentence in sentences], kind="stable")
    parts = [classify([sentences[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]
    predictions = np.empty(len(order), dtype=np.int64)
    predictions[order] = np.concatenate(parts)
    return predictions


def standard_error(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Of the balanced accuracy, the mean of each class's recall, by the binomial distribution."""
    classes = np.unique(labels)
    recalls = [(predictions[labels == c] == c).mean() for c in classes]
    counts = [(labels == c).sum() for c in classes]
    return float(np.sqrt(sum(r * (1 - r) / n for r, n in zip(recalls, counts, strict=True))) / len(classes))


def latencies(classify: dict[str, Callable[[list[str]], np.ndarray]], sentences: list[str]) -> dict[str, float]:
    """Median milliseconds from one sentence to its class on one thread, the tokenizer's included.

    The models take turns on each sentence, so that whatever else the machine does meets all of them alike; in a new
    order each time, or a busy scheduler, whose slices are about as long as a turn, would always meet the same one.
    """
    times = {name: [] for name in classify}
    order, shuffle = list(classify), random.Random(0).shuffle
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for warm_up in (True, False):
            for sentence in sentences[:20] if warm_up else sentences:
                shuffle(order)
                for name in order:
                    start = time.perf_counter()
                    classify[name]([sentence])
                    if not warm_up:
                        times[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: 1000 * statistics.median(each) for name, each in times.items()}


def check(figures: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What the demo proves, by claim."""
    teacher, student, bag = figures[TEACHER], figures[STUDENT], figures[BAG_OF_WORDS]
    share = student["balanced_accuracy"] / teacher["balanced_accuracy"]
    return {
        # Without this one a teacher that learned nothing would be matched by any student.
        f"the teacher learned the task: {teacher['balanced_accuracy']:.1%} balanced accuracy, at least 90 % of the "
        f"bag of words' {bag['balanced_accuracy']:.1%}": teacher["balanced_accuracy"] >= 0.9 * bag["balanced_accuracy"],
        f"the ARC student keeps {share:.1%} of the teacher's accuracy, at least 97 %": share >= 0.97,
        f"it is faster: {student['latency_ms']:.2f} ms against {teacher['latency_ms']:.2f} ms": student["latency_ms"]
        < teacher["latency_ms"],
        f"it agrees with the teacher on {student['agreement']:.1%} of the sentences, at least 80 %": student[
            "agreement"
        ]
        >= 0.8,
    }


def show(results: dict, out: Path, console: Console) -> None:
    """The table, the claims, and what they do not say."""
    table = Table(box=box.SIMPLE)
    table.add_column(no_wrap=True)
    for column in ("balanced\naccuracy %", "agrees with\nteacher %", "parameters", "MB on\ndisk", "latency\np50 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, figures in results["models"].items():
        table.add_row(
            name,
            f"{100 * figures['balanced_accuracy']:.1f} ± {100 * figures['standard_error']:.1f}",
            f"{100 * figures['agreement']:.1f}",
            f"{figures['parameters']:,}",
            f"{figures['megabytes']:.1f}",
            f"{figures['latency_ms']:.2f}",
        )
    console.print(table)
    console.print(
        "Accuracy on modules that were held out, ± one standard error. Latency from one sentence to its class, "
        "tokenizer included, on one thread.\n"
    )
    console.print(NOTE, end="\n\n")
    for claim, holds in results["checks"].items():
        console.print(f"[green]holds[/green]  {claim}" if holds else f"[bold red]FAILS[/bold red]  {claim}")
    minutes, seconds = divmod(round(results["seconds"]), 60)
    console.print(f"\nTook {minutes} min {seconds} s. Models, plots and {_RESULTS} are in {out}")


def _check_out(out: Path) -> None:
    """Raise a ValueError unless `out` is free or holds an earlier demo."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            earlier = "demo" in json.loads((out / _RESULTS).read_text())
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
