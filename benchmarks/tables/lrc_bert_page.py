"""The finished cells of LRC-BERT as Markdown tables: scores, and which difference is one."""

from fastkd.benchmarks.tables.glue_page import TASKS, differences, differing, scores, table
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.recipes import read_settings

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
    return f"{scores(cells, ROWS)}\n\n{differences(cells, ROWS, COMPARISONS)}"


def show_held_out(cells: Cells) -> str:
    """Every cell read on held-out data, with the settings in which it differs from its recipe as it is shipped."""
    shipped = {shape: read_settings(name, []) for shape, name in SHAPES.items()}
    rows = []
    for name, title in TASKS.items():
        for row, what in ROWS.items():
            for cell in cells.find(f"{name}/{row}", "held-out"):
                shape, _, changed = row.partition("/")
                own = shipped[shape] | {"distil": shipped[shape]["distil"] | CHANGES.get(changed, {})}
                matched = {"layer_pairs": None, "pooling": "cls"}
                own["general"] = {"seed": 0} | own["general"] | matched
                own["distil"] = own["distil"] | matched
                differ = differing(own, cell["settings"], ("student", "general", "distil", "finetune"))
                epochs, held_out = cell["settings"]["epochs"], f"{100 * cell['score']:.2f}"
                rows.append([title, what, differ, str(epochs), held_out, str(cell["seed"])])
    return table(["task", "model", "settings that differ from the recipe", "epochs", "held-out score", "seed"], rows)
