"""The finished cells of LRC-BERT as Markdown tables: scores, and which difference is one."""

from collections.abc import Sequence

import numpy as np

from fastkd.benchmarks.tables.protocol import Cells, interval, mean_and_error, paired_difference
from fastkd.benchmarks.tables.sparse_embeddings_page import NOT_RUN, decoded
from fastkd.recipes import read_settings

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA"}
AVERAGED = ("sst2", "mrpc", "stsb")  # of CoLA the teacher knows too little
SHAPES = {"3x384": "lrc-bert-sst2", "4x312": "lrc-bert-4x312-sst2"}  # and the recipe that each is made by
ROWS = {
    "3x384/finetuned": "3 x 384, first layers, fine-tuned without distillation",
    "3x384/plain": "3 x 384, soft labels",
    "3x384/lrc_bert": "3 x 384, LRC-BERT",
    "3x384/no_contrast": "3 x 384, without the contrastive loss",
    "3x384/no_perturbation": "3 x 384, without perturbation",
    "3x384/one_stage": "3 x 384, in one stage",
    "4x312/plain": "4 x 312, soft labels",
    "4x312/lrc_bert": "4 x 312, LRC-BERT",
}
_LABELS_ONLY = {"contrast_weight": 0.0, "contrast_only": 0.0}
CHANGES = {  # of the recipe's section `distil`, by what stands behind a row's shape
    "plain": _LABELS_ONLY | {"perturbation": None},
    "lrc_bert": {},
    "no_contrast": _LABELS_ONLY,
    "no_perturbation": {"perturbation": None},
    "one_stage": {"contrast_only": 0.0},
}
_UNSAID = {"pooling": "cls"}  # what a recipe that does not say it means
COMPARISONS = (
    ("3x384/lrc_bert", "3x384/plain"),
    ("4x312/lrc_bert", "4x312/plain"),
    ("3x384/plain", "3x384/finetuned"),
    ("3x384/no_contrast", "3x384/lrc_bert"),
    ("3x384/no_perturbation", "3x384/lrc_bert"),
    ("3x384/one_stage", "3x384/lrc_bert"),
)


def show(cells: Cells) -> str:
    """Both tables."""
    return f"{_scores(cells)}\n\n{_differences(cells)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.1f}" + ("" if np.isnan(error) else f" ± {error:.1f}")


def _scores(cells: Cells) -> str:
    teacher = {name: cells.find(f"{name}/teacher", "validation") for name in TASKS}
    rows = []
    for row, title in {"teacher": "teacher, fine-tuned", **ROWS}.items():
        found = {name: cells.find(f"{name}/{row}", "validation") for name in TASKS}
        scores = [_with_error(*mean_and_error(found[name])) if found[name] else NOT_RUN for name in TASKS]
        averaged = kept = NOT_RUN
        if (means := _means(found)) is not None:
            error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
            averaged = _with_error(means.mean(), error)
            if row != "teacher" and (of_teacher := _means(teacher)) is not None:
                kept = f"{100 * means.mean() / of_teacher.mean():.1f} %"
        seeds = sorted({cell["seed"] for each in found.values() for cell in each})
        rows.append([title, *scores, averaged, "" if row == "teacher" else kept, ", ".join(map(str, seeds))])
    return _table(["model", *TASKS.values(), "mean without CoLA", "of the teacher's", "seeds"], rows)


def _means(found: dict[str, list[dict]]) -> np.ndarray | None:
    """Mean score over the averaged tasks, in points, for each seed that all of them have; None without one."""
    by_seed = [{cell["seed"]: 100 * cell["score"] for cell in found[name]} for name in AVERAGED]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    return np.array([np.mean([scores[seed] for scores in by_seed]) for seed in seeds]) if seeds else None


def _differences(cells: Cells) -> str:
    rows = []
    for one, other in COMPARISONS:
        found = {name: difference(cells, name, one, other) for name in TASKS}
        texts = [NOT_RUN if found[name] is None else _with_interval(*found[name]) for name in TASKS]
        averaged = [found[name] for name in AVERAGED]
        mean = NOT_RUN
        if None not in averaged:
            values, distributions = zip(*averaged, strict=True)
            mean = _with_interval(np.mean(values), np.mean(distributions, axis=0))
        rows.append([f"{ROWS[one]} − {ROWS[other].partition(', ')[2]}", *texts, mean])
    return _table(["points, 95 % interval", *TASKS.values(), "mean without CoLA"], rows)


def difference(cells: Cells, name: str, one: str, other: str) -> tuple[float, np.ndarray] | None:
    """Points by which row `one` scores above `other` on a task, as a mean over the seeds that both have, and the same
    over resampled examples; None without such a seed."""
    teacher = cells.find(f"{name}/teacher", "validation")
    ones, others = ({c["seed"]: c for c in cells.find(f"{name}/{row}", "validation")} for row in (one, other))
    seeds = sorted(ones.keys() & others.keys())
    if not teacher or not seeds:
        return None
    labels = decoded(teacher[0]["labels"])
    # Each call draws the same examples, so that the mean over seeds is one of the same resample.
    values, distributions = zip(
        *(
            paired_difference(
                ones[seed]["metric"], labels, decoded(ones[seed]["predictions"]), decoded(others[seed]["predictions"])
            )
            for seed in seeds
        ),
        strict=True,
    )
    return float(np.mean(values)), np.mean(distributions, axis=0)


def _with_interval(value: float, distribution: np.ndarray) -> str:
    low, high = interval(distribution)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def show_held_out(cells: Cells) -> str:
    """Every cell read on held-out data, with the settings in which it differs from its recipe as it is shipped."""
    shipped = {shape: read_settings(name, []) for shape, name in SHAPES.items()}
    rows = []
    for name, title in TASKS.items():
        for row, what in ROWS.items():
            for cell in cells.find(f"{name}/{row}", "held-out"):
                shape, _, changed = row.partition("/")
                own = shipped[shape] | {"distil": shipped[shape]["distil"] | CHANGES.get(changed, {})}
                differ = " ".join(
                    f"{section}.{key}={value}"
                    for section in ("student", "general", "distil")
                    for key, value in cell["settings"].get(section, {}).items()
                    if own[section].get(key, _UNSAID.get(key)) != value
                )
                epochs, held_out = cell["settings"]["epochs"], f"{100 * cell['score']:.2f}"
                rows.append([title, what, differ, str(epochs), held_out, str(cell["seed"])])
    return _table(["task", "model", "settings that differ from the recipe", "epochs", "held-out score", "seed"], rows)
