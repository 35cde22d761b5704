"""The finished cells of EGKD as Markdown tables: scores, differences, and how far explanations agree."""

import numpy as np

from fastkd.benchmarks.tables.glue_page import TASKS, differences, differing, scores, table
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.benchmarks.tables.sparse_embeddings_page import NOT_RUN
from fastkd.recipes import read_settings

SHAPES = {"3x384": "egkd-sst2", "bilstm": "egkd-bilstm-sst2"}  # and the recipe that each is made by
BRANCHES = ("gradient", "perturbation", "selection")
BILSTM_TASKS = ("sst2", "stsb")
ROWS = {
    "3x384/plain": "3 x 384, soft labels",
    "3x384/gradient": "3 x 384, gradient branch",
    "3x384/perturbation": "3 x 384, perturbation branch",
    "3x384/selection": "3 x 384, feature selection",
    "3x384/mix": "3 x 384, all three",
    "bilstm/plain": "BiLSTM, soft labels",
    "bilstm/branch": "BiLSTM, the branch best on held-out data",
}
_TRANSFORMERS = {row: title for row, title in ROWS.items() if row.startswith("3x384/")}
_RECURRENT = {row: title for row, title in ROWS.items() if row.startswith("bilstm/")}
_COMPARISONS = tuple((row, "3x384/plain") for row in _TRANSFORMERS if row != "3x384/plain")
_RECURRENT_COMPARISONS = (("bilstm/branch", "bilstm/plain"),)
_SHOWN = (("gradient", "cosine"), ("gradient", "spearman"), ("gradient", "overlap"), ("perturbation", "cosine"))


def show(cells: Cells) -> str:
    """Scores and differences of both kinds of students, and agreement of all."""
    return "\n\n".join(
        [
            scores(cells, _TRANSFORMERS),
            differences(cells, ROWS, _COMPARISONS),
            scores(cells, _RECURRENT, BILSTM_TASKS),
            differences(cells, ROWS, _RECURRENT_COMPARISONS, BILSTM_TASKS),
            agreement(cells),
        ]
    )


def agreement(cells: Cells) -> str:
    """Means over seeds of how far teacher and student agree in what they look at, with the level of unrelated
    explanations, and what a step costs: the median over seeds, as a multiple of soft labels alone."""
    rows = []
    for row, title in ROWS.items():
        for name in BILSTM_TASKS if row in _RECURRENT else TASKS:
            found = cells.find(f"{name}/{row}", "validation")
            values = [_with_chance([c["consistency"][kind] for c in found], which) for kind, which in _SHOWN]
            plain = cells.find(f"{name}/{row.partition('/')[0]}/plain", "validation")
            rows.append([title, TASKS[name], *values, _multiple(found, plain)])
    heads = [f"{kind}, {which.replace('_', ' ')} (by chance)" for kind, which in _SHOWN]
    return table(["student", "task", *heads, "step"], rows)


def _with_chance(found: list[dict], which: str) -> str:
    if not found:
        return NOT_RUN
    mean, chance = (np.mean([each[which] for each in figures]) for figures in (found, [f["by_chance"] for f in found]))
    return f"{mean:.2f} ({chance:.2f})"


def _multiple(found: list[dict], plain: list[dict]) -> str:
    if not found or not plain:
        return NOT_RUN
    own, other = (np.median([cell["ms_per_step"] for cell in cells]) for cells in (found, plain))
    return f"{own / other:.2f}×"


def show_held_out(cells: Cells) -> str:
    """Every cell read on held-out data, with the settings in which it differs from its recipe as it is shipped."""
    shipped = {shape: read_settings(name, []) for shape, name in SHAPES.items()}
    rows = []
    for name, title in TASKS.items():
        for row, what in ROWS.items():
            for cell in cells.find(f"{name}/{row}", "held-out"):
                own, given = shipped[row.partition("/")[0]], cell["settings"]
                differ = differing(own, given, ("student", "distil"))
                agree = f"{cell['consistency']['gradient']['cosine']:.2f}"
                rows.append([title, what, differ, str(given["epochs"]), f"{100 * cell['score']:.2f}", agree])
    heads = ["task", "model", "settings that differ from the recipe", "epochs", "held-out score", "gradient, cosine"]
    return table(heads, rows)
