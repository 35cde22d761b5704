"""Settings of EGKD, and the branches they describe."""

import math
from dataclasses import dataclass, field

from fastkd.explain import GradientSettings, MaskPool, SelectorSettings
from fastkd.explain.classifier import BASELINES
from fastkd.explain.scores import check_distance
from fastkd.recipes.egkd_branches import Branch, GradientBranch, PerturbationBranch, SelectionBranch
from fastkd.recipes.settings import check_keys, section_from
from fastkd.recipes.training import DistillationArguments

TARGETS = ("predicted", "label", "all")
SECOND_ORDER = ("exact", "central_difference")
_NAMES = tuple(branch.name for branch in (GradientBranch, PerturbationBranch, SelectionBranch))
_MOST_MASKS = 4


@dataclass
class EgkdConfig(DistillationArguments):
    """Settings of EGKD, beside those of `DistillationArguments`: (1 - λ) CE + λ τ² KL + Σ weight · branch.

    Args:
        branches: weight of each branch: "gradient", "perturbation", "selection"; none is plain distillation.
        soft_weight: λ, the share of the teacher's soft labels, in [0, 1]; the labels have the rest.
        temperature: τ of all soft labels; a regression has none, and mean squared errors.
        explain_after: part of the steps, the first ones, without the branches.
        max_skipped: batches in a row whose explanations were NaN or infinite, after which the run stops; each is left
            out of its branch and counted in the log.
        gradient: of the gradient branch, arguments of `GradientSettings`. By default gradient × input of the
            log-probability, normalised by "l2", as in AD-KD.
        target: the class that is explained: the teacher's "predicted", the "label", or "all".
        second_order: how the student's scores are differentiated, "exact", which is cheaper, or "central_difference",
            which leaves attention fused.
        distance: of the scores, "l2", "l1" or "smooth_l1".
        explain_every: the gradient branch has every so many-th step, with its weight as it is.
        explain_share: share of the sequences of a batch that the gradient branch explains, in (0, 1].
        pool: of the perturbation branch, arguments of `MaskPool`.
        masks: of the pool, for each sequence and step, 1 to 4.
        mask_baseline: what a masked token becomes, "zero" or "mask".
        selector: of the selection branch, arguments of `SelectorSettings`.

    Raises ValueError for what does not fit, for perturbation="embedding" beside a branch: both move embeddings, and for
    gradient checkpointing with an exact second order.
    """

    branches: dict = field(default_factory=lambda: {"gradient": 10.0})
    soft_weight: float = 0.8
    temperature: float = 2.0
    explain_after: float = 0.1
    max_skipped: int = 10
    gradient: dict = field(default_factory=dict)
    target: str = "predicted"
    second_order: str = "exact"
    distance: str = "l2"
    explain_every: int = 1
    explain_share: float = 1.0
    pool: dict = field(default_factory=dict)
    masks: int = 1
    mask_baseline: str = "zero"
    selector: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("branches", "gradient", "pool", "selector"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r}; a section `key: value` is needed")
        check_keys(self.branches, _NAMES, "branches")
        for name, weight in self.branches.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"branches: {name}={weight!r}; a weight of 0 or more is needed, and a finite one")
        for name, allowed in (
            ("target", TARGETS),
            ("second_order", SECOND_ORDER),
            ("mask_baseline", BASELINES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        check_distance(self.distance)
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"soft_weight={self.soft_weight}; allowed is 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; it must be positive and finite")
        if not 0 <= self.explain_after < 1:
            raise ValueError(f"explain_after={self.explain_after}; it must lie in [0, 1)")
        if not 0 < self.explain_share <= 1:
            raise ValueError(f"explain_share={self.explain_share}; it must lie in (0, 1]")
        for name in ("explain_every", "max_skipped", "masks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; a whole number is needed, 1 at least")
        if self.masks > _MOST_MASKS:  # a pool has as many at least
            raise ValueError(f"masks={self.masks}; allowed are 1 to {_MOST_MASKS}")
        self._all_branches()  # each checks its own settings
        if self.explaining and self.perturbation:
            raise ValueError(
                "perturbation=embedding moves the student's embeddings, and so do the branches "
                f"{', '.join(self.explaining)}; choose one"
            )
        if self.explaining and self.torch_compile:
            raise ValueError("the branches tap embeddings by hooks, which torch_compile=true skips; choose one")
        super().__post_init__()
        if self.gradient_checkpointing and "gradient" in self.explaining and self.second_order == "exact":
            raise ValueError(
                "gradient_checkpointing=true runs layers again outside the pass that has a second derivative; choose "
                "second_order=central_difference, or no checkpointing"
            )

    @property
    def explaining(self) -> dict[str, float]:
        """The branches that weigh something."""
        return {name: float(weight) for name, weight in self.branches.items() if weight > 0}

    @property
    def explainer(self) -> GradientSettings:
        """Of the gradient branch."""
        defaults = {"score": "log_probability", "norm": "l2"}
        return section_from(GradientSettings, defaults | self.gradient, "gradient")

    @property
    def mask_pool(self) -> MaskPool:
        """Of the perturbation branch."""
        return section_from(MaskPool, {"samples": 32} | self.pool, "pool")

    def make_branches(self) -> list[Branch]:
        """Those that weigh something."""
        return [branch for branch in self._all_branches() if branch.name in self.explaining]

    def _all_branches(self) -> list[Branch]:
        selector = section_from(SelectorSettings, self.selector, "selector")
        return [
            GradientBranch(
                self.explainer, self.target, self.second_order, self.distance, self.explain_share, self.explain_every
            ),
            PerturbationBranch(self.mask_pool, self.masks, self.mask_baseline, self.temperature, self.seed),
            SelectionBranch(selector, self.temperature),
        ]
