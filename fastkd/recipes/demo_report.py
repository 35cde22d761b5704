"""What the demo compares, claims and shows: accuracy, agreement, size and latency of its four models."""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastkd.data import Task, fit_bag_of_words, score

TEACHER, STUDENT, LABELS_ONLY, BAG_OF_WORDS = "teacher", "ARC student", "student on labels", "bag of words"
RESULTS = "results.json"

NOTE = (
    "The docstring task is close to a bag of words: logistic regression on word counts and Transformers of 1, 2 and 4 "
    "layers reach about the same accuracy. So nothing here shows that distillation helps, and the demo does not claim "
    "it. It shows that the machinery works: a smaller and faster student that is as good as its teacher and agrees "
    "with it."
)


def compare(
    models: dict[str, torch.nn.Module], task: Task, tokenizer, folder: Path, max_length: int, timed: int
) -> dict[str, dict[str, float]]:
    """Save the Transformers and a bag of words below `folder` and measure all of them on the validation split,
    latency on about `timed` of its sentences."""
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
            inputs = tokenizer(sentences, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            return model(**inputs).logits.argmax(-1).numpy()

        return classify

    classify = {name: classifier(model) for name, model in models.items()} | {BAG_OF_WORDS: bag.predict}
    sentences, labels = task.validation[task.text_columns[0]][:], np.array(task.validation["label"])
    predictions = {name: in_batches(function, sentences) for name, function in classify.items()}
    latency = latencies(classify, sentences[:: max(1, len(sentences) // timed)])
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
    console.print(f"\nTook {minutes} min {seconds} s. Models, plots and {RESULTS} are in {out}")
