"""Explanations: how much each token matters to a classifier, as plain functions, and what training on them needs.

Every attribution gives scores (B, L), 0 in padding, of one class for each example, or (B, C, L) of every class:

- gradient: `saliency`, `gradient_x_input`, `integrated_gradients`;
- perturbation: `occlusion`, `linear_explanation` (LIME and KernelSHAP over a fixed `MaskPool`);
- feature selection: a `Selector`, trained once by `train_selector`, and its k best tokens.

How the recipe `egkd` calls them, once for the teacher and at every step for the student, stands in
`fastkd/recipes/egkd_branches.py`.
"""

from fastkd.explain.align import (
    WordAlignment,
    check_tokenizers,
    pad_words,
    tokens_of_words,
    word_mask,
    word_scores,
)
from fastkd.explain.central_difference import DistanceTo, central_difference
from fastkd.explain.classifier import Classifier, Watched, maskable_tokens, rows_of, valid_tokens
from fastkd.explain.compute import compute_results
from fastkd.explain.consistency import Consistency, by_chance, consistency
from fastkd.explain.fingerprint import Fingerprint
from fastkd.explain.gradient import (
    GradientSettings,
    gradient_attribution,
    gradient_x_input,
    integrated_gradients,
    saliency,
)
from fastkd.explain.mask_pool import MaskPool
from fastkd.explain.perturbation import explanation_of_logits, linear_explanation, masked_logits, occlusion
from fastkd.explain.picture import ShownExample, side_by_side, spelled
from fastkd.explain.scores import distance, normalise
from fastkd.explain.second_order import twice_differentiable
from fastkd.explain.selection import hard_top_k, relaxed_top_k
from fastkd.explain.selector import Selector, SelectorSettings, train_selector
from fastkd.explain.stored import TeacherResults

__all__ = [
    "Classifier",
    "Consistency",
    "DistanceTo",
    "Fingerprint",
    "GradientSettings",
    "MaskPool",
    "Selector",
    "SelectorSettings",
    "ShownExample",
    "TeacherResults",
    "Watched",
    "WordAlignment",
    "by_chance",
    "central_difference",
    "check_tokenizers",
    "compute_results",
    "consistency",
    "distance",
    "explanation_of_logits",
    "gradient_attribution",
    "gradient_x_input",
    "hard_top_k",
    "integrated_gradients",
    "linear_explanation",
    "maskable_tokens",
    "masked_logits",
    "normalise",
    "occlusion",
    "pad_words",
    "relaxed_top_k",
    "rows_of",
    "saliency",
    "side_by_side",
    "spelled",
    "tokens_of_words",
    "train_selector",
    "twice_differentiable",
    "valid_tokens",
    "word_mask",
    "word_scores",
]
