"""The finished cells of students on four tasks of GLUE as Markdown tables: scores, and which difference is one."""

from collections.abc import Sequence

import numpy as np

from fastkd.benchmarks.tables.protocol import Cells, interval, mean_and_error, paired_difference
from fastkd.benchmarks.tables.sparse_embeddings_page import NOT_RUN, decoded

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA"}
LENGTHS = ("max_steps", "num_train_epochs")  # of a run: that of all rows of its task
AVERAGED = ("sst2", "mrpc", "stsb")  # of CoLA the teacher knows too little


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def with_error(mean: float, error: float) -> str:
    return f"{mean:.1f}" + ("" if np.isnan(error) else f" ± {error:.1f}")


def scores(cells: Cells, titles: dict[str, str], tasks: Sequence[str] = tuple(TASKS)) -> str:
    """The scores of the rows in `titles`, and of the teacher."""
    teacher = {name: cells.find(f"{name}/teacher", "validation") for name in tasks}
    rows = []
    for row, title in {"teacher": "teacher, fine-tuned", **titles}.items():
        found = {name: cells.find(f"{name}/{row}", "validation") for name in tasks}
        by_task = [with_error(*mean_and_error(found[name])) if found[name] else NOT_RUN for name in tasks]
        averaged = kept = NOT_RUN
        if (means := _means(found)) is not None:
            error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
            averaged = with_error(means.mean(), error)
            if row != "teacher" and (of_teacher := _means(teacher)) is not None:
                kept = f"{100 * means.mean() / of_teacher.mean():.1f} %"
        seeds = sorted({cell["seed"] for each in found.values() for cell in each})
        rows.append([title, *by_task, averaged, "" if row == "teacher" else kept, ", ".join(map(str, seeds))])
    return table(["model", *map(TASKS.get, tasks), _mean_of(tasks), "of the teacher's", "seeds"], rows)


def _mean_of(tasks: Sequence[str]) -> str:
    return "mean without CoLA" if "cola" in tasks else "mean"


def _means(found: dict[str, list[dict]]) -> np.ndarray | None:
    """Mean score over the averaged tasks, in points, for each seed that all of them have; None without one."""
    by_seed = [{cell["seed"]: 100 * cell["score"] for cell in found[name]} for name in AVERAGED if name in found]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    return np.array([np.mean([scores[seed] for scores in by_seed]) for seed in seeds]) if seeds else None


def differences(
    cells: Cells,
    titles: dict[str, str],
    comparisons: Sequence[tuple[str, str]],
    tasks: Sequence[str] = tuple(TASKS),
) -> str:
    """How many points the first row of each comparison scores above the second."""
    rows = []
    for one, other in comparisons:
        found = {name: difference(cells, name, one, other) for name in tasks}
        texts = [NOT_RUN if found[name] is None else _with_interval(*found[name]) for name in tasks]
        averaged = [found[name] for name in AVERAGED if name in tasks]
        mean = NOT_RUN
        if None not in averaged:
            values, distributions = zip(*averaged, strict=True)
            mean = _with_interval(np.mean(values), np.mean(distributions, axis=0))
        rows.append([f"{titles[one]} − {titles[other].partition(', ')[2]}", *texts, mean])
    return table(["points, 95 % interval", *map(TASKS.get, tasks), _mean_of(tasks)], rows)


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


def differing(shipped: dict[str, dict], given: dict[str, dict], sections: Sequence[str]) -> str:
    """The settings of a cell in which it differs from its recipe, as `section.key=value` words; `default` is a setting
    that the recipe says and the cell left to the trainer."""
    words = []
    for section in sections:
        if section in given:
            own, cell = shipped[section], given[section]
            keys = [*cell, *(key for key in own if key not in cell and key not in LENGTHS)]
            words += [f"{section}.{key}={cell.get(key, 'default')}" for key in keys if own.get(key) != cell.get(key)]
    return " ".join(words)
