"""EGKD's branches: what each asks of the teacher, and what it makes the student learn.

A branch is asked in two ways. `of_teacher` gives what is stored, for a batch of the data; `running_teacher` what one
step needs, from a teacher that runs beside the student; `watched` is its forward that gave the soft labels. `loss` is
the branch's term of a step, and whether it was finite, None where nothing was explained: a term that was not is 0, and
its gradient is 0, or NaN where 0 meets an infinity, without a look at the device. What scores and masks belong to,
tokens or words, is the batch's `units`.
"""

from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastkd.explain import (
    Classifier,
    GradientSettings,
    MaskPool,
    Selector,
    SelectorSettings,
    Watched,
    distance,
    masked_logits,
    rows_of,
)
from fastkd.losses import soft_label_loss
from fastkd.recipes.egkd_units import Tokens, Units, units_of


@dataclass
class Explained:
    """A batch at a step.

    Attributes:
        inputs: what the student takes, labels among it.
        teacher: "logits" (B, C) and, under each branch's name, what that branch has of the teacher.
        example: (B,) int64, rows of the data. masks: (B, S, U) bool, the pool laid over the sequences; None without the
            perturbation branch.
        step: the optimizer step, from 0. stored: whether the teacher's part was read, and not just computed.
        student: the student, under autocast where there is autocast. precise: the same without.
        half: whether autocast is to fp16. The gradient of a score, unlike that of the loss, has no scaler there, and
            would underflow.
        watched: what was seen of the forward that gave the labels' loss, and its logits.
        units: what scores and masks belong to; U of them are the L tokens, or words.
    """

    inputs: dict[str, Tensor]
    teacher: dict[str, Tensor]
    example: Tensor
    masks: Tensor | None
    step: int
    stored: bool
    student: Classifier
    precise: Classifier
    half: bool
    watched: tuple[Watched, Tensor] | None = None
    units: Units = field(default_factory=Tokens)


@dataclass
class GradientBranch:
    """The student's gradient attributions come near the teacher's: distance(âS, âT), by double backward or by central
    differences."""

    settings: GradientSettings
    target: str
    second_order: str
    distance: str
    share: float
    every: int

    name: ClassVar[str] = "gradient"
    per_token: ClassVar[bool] = True

    @property
    def baseline(self) -> str:
        return self.settings.baseline

    def belongs_to(self) -> dict:
        """What the teacher's results depend on."""
        return asdict(self.settings) | {"target": self.target}

    def classes(self, inputs: dict) -> Tensor | str:
        """The classes that are explained; "predicted" where they are the teacher's own."""
        if self.target != "label":
            return self.target
        labels = inputs["labels"]
        return "predicted" if labels.is_floating_point() else labels  # a regression has one class

    def of_teacher(self, teacher: Classifier, inputs: dict, watched: tuple[Watched, Tensor] | None = None) -> Tensor:
        with torch.autocast(inputs["input_ids"].device.type, enabled=False):
            return units_of(inputs).attribution(
                teacher, inputs, self.settings, target=self.classes(inputs), watched=watched
            )

    def running_teacher(self, teacher: Classifier, batch: Explained, watched: tuple[Watched, Tensor]) -> Tensor:
        return self.of_teacher(teacher, batch.inputs, watched if self.differentiates_teacher(batch) else None)

    def differentiates_teacher(self, batch: Explained) -> bool:
        """Whether the teacher's forward that gives the soft labels serves the explanation too."""
        return self.settings.steps == 1 and not batch.half

    def rows(self, batch: Explained) -> list[int] | None:
        """The sequences that are explained: every (1 / share)-th, from another one each time; None are all."""
        if self.share == 1:
            return None
        count = len(batch.inputs["input_ids"])
        turn = batch.step // self.every
        places = range(turn, turn + count)
        return [row for row, i in enumerate(places) if int((i + 1) * self.share) > int(i * self.share)]

    def explained(self, batch: Explained) -> Classifier:
        """The student as it is explained: a difference of two passes in bf16 would be rounding, their derivative has
        two digits."""
        return batch.student if self.second_order == "exact" and not batch.half else batch.precise

    def takes_watched(self, batch: Explained) -> bool:
        """Whether the student's forward that gives the labels' loss serves the explanation too."""
        return self.settings.steps == 1 and self.share == 1 and self.explained(batch) is batch.student

    def differentiates_twice(self, batch: Explained) -> bool:
        """Whether that forward has to have a second derivative."""
        return self.second_order == "exact" and self.takes_watched(batch)

    def loss(self, batch: Explained) -> tuple[Tensor, Tensor | None]:
        inputs, units, wanted, logits = batch.inputs, batch.units, batch.teacher[self.name], batch.teacher["logits"]
        student, watched = self.explained(batch), batch.watched if self.takes_watched(batch) else None
        scale = 1.0
        if (rows := self.rows(batch)) is not None:
            count = len(logits)
            # Over processes and accumulated batches the sum is what a mean over the explained sequences would be.
            scale = len(rows) / (self.share * count)
            here = torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True)
            inputs, units, wanted, logits = rows_of(inputs, here), units.rows(here), wanted[here], logits[here]
            if not rows:
                return logits.new_zeros(()).float(), None
        classes = self.classes(inputs)
        if isinstance(classes, str) and classes == "predicted":
            classes = logits.argmax(1)
        if self.second_order == "exact":
            scores = units.attribution(
                student, inputs, self.settings, target=classes, create_graph=True, watched=watched
            )
            scores, wanted, usable = _usable(scores, wanted)
            term = distance(scores, wanted, units.mask(inputs), self.distance)
        else:
            term = units.central_difference(
                student, inputs, self.settings, wanted, self.distance, target=classes, watched=watched
            )
            usable = term.isfinite()
        return scale * term.masked_fill(~usable, 0), usable

    def cost(self) -> str:
        steps = self.settings.steps
        what = f"{self.settings.method} of the {self.settings.score}, {'' if steps == 1 else f'{steps} steps, '}"
        what += {"predicted": "teacher's class", "label": "label", "all": "every class"}[self.target]
        part = "" if self.share == 1 else f" of {self.share:.0%} of the sequences"
        each = " for each class" if self.target == "all" else ""
        own = "" if (steps, self.share) == (1, 1) else "a forward, "
        further = {
            "exact": f"{own}a backward to the embeddings and a double one{each}{part}, on unfused attention",
            "central_difference": f"{own}a backward to the embeddings and 2 forwards and backwards{each}{part}",
        }
        form = self.second_order.replace("_", " ")
        return f"{what}; second order: {form}; further passes: {further[self.second_order]}"


@dataclass
class PerturbationBranch:
    """Under masks of a fixed pool the student says what the teacher says: τ² KL, mean over masks. An explanation is a
    fixed linear map of these logits: equal logits are equal explanations."""

    pool: MaskPool
    masks: int
    baseline: str
    temperature: float
    seed: int

    name: ClassVar[str] = "perturbation"
    per_token: ClassVar[bool] = False

    def belongs_to(self) -> dict:
        return asdict(self.pool) | {"baseline": self.baseline}

    def of_teacher(self, teacher: Classifier, inputs: dict) -> Tensor:
        units = units_of(inputs)
        kept = units.over_tokens(self.pool.spread(units.maskable(inputs, teacher.special_ids)))
        return masked_logits(teacher, inputs, kept, baseline=self.baseline)

    def running_teacher(self, teacher: Classifier, batch: Explained, watched: tuple[Watched, Tensor]) -> Tensor:
        embeddings = watched[0].embeddings
        return masked_logits(teacher, batch.inputs, self.kept(batch), baseline=self.baseline, embeddings=embeddings)

    def which(self, batch: Explained) -> Tensor:
        """(B, M) int64, the masks of this step: a function of (seed, step, example) alone. All masks are equally
        likely, and no two of a sequence are the same."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + batch.step)
        order = torch.randperm(self.pool.samples, generator=draw).to(batch.example.device, non_blocking=True)
        turns = batch.example[:, None] * self.masks + torch.arange(self.masks, device=batch.example.device)
        return order[turns % self.pool.samples]

    def kept(self, batch: Explained) -> Tensor:
        """(B, M, L) bool."""
        kept = batch.masks.gather(1, self.which(batch)[..., None].expand(-1, -1, batch.masks.shape[2]))
        return batch.units.over_tokens(kept)

    def loss(self, batch: Explained) -> tuple[Tensor, Tensor]:
        logits = _masked(batch, self.kept(batch), self.baseline)
        wanted = batch.teacher[self.name]
        if batch.stored:  # of the whole pool
            wanted = wanted.gather(1, self.which(batch)[..., None].expand(-1, -1, wanted.shape[2]))
        logits, wanted, usable = _usable(logits.flatten(0, 1), wanted.flatten(0, 1))
        return soft_label_loss(logits, wanted, self.temperature), usable

    def cost(self) -> str:
        passes = "1 forward and backward" if self.masks == 1 else f"{self.masks} forwards and backwards"
        return f"{self.masks} of {self.pool.samples} {self.pool.kind} masks for each sequence; further passes: {passes}"


@dataclass
class SelectionBranch:
    """From the tokens that suffice the teacher the student says what the teacher says of all: τ² KL."""

    settings: SelectorSettings
    temperature: float
    selector: Selector | None = None  # trained against the teacher, where the teacher is asked

    name: ClassVar[str] = "selection"
    per_token: ClassVar[bool] = True

    @property
    def baseline(self) -> str:
        return self.settings.baseline

    def belongs_to(self) -> dict:
        return asdict(self.settings)

    def of_teacher(self, teacher: Classifier, inputs: dict) -> Tensor:
        return units_of(inputs).selected(self.selector.select(teacher, inputs, self.settings.ratio))

    def running_teacher(self, teacher: Classifier, batch: Explained, watched: tuple[Watched, Tensor]) -> Tensor:
        return self.of_teacher(teacher, batch.inputs)

    def loss(self, batch: Explained) -> tuple[Tensor, Tensor]:
        kept = batch.units.over_tokens(batch.teacher[self.name])
        logits = _masked(batch, kept[:, None], self.baseline)[:, 0]
        logits, wanted, usable = _usable(logits, batch.teacher["logits"])
        return soft_label_loss(logits, wanted, self.temperature), usable

    def cost(self) -> str:
        return f"{self.settings.ratio:.0%} of the tokens, chosen once; further passes: 1 forward and backward"


Branch = GradientBranch | PerturbationBranch | SelectionBranch


def _masked(batch: Explained, kept: Tensor, baseline: str) -> Tensor:
    """The student's logits under masks, from the embeddings that the labels' forward had: they, and their gradient, are
    computed once for both."""
    seen, _ = batch.watched
    return masked_logits(batch.student, batch.inputs, kept, baseline=baseline, embeddings=seen.embeddings)


def _usable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both, and whether all their values are finite, a bool on their device; if not, both are 0 everywhere, where they
    give no loss."""
    usable = student.isfinite().all() & teacher.isfinite().all()
    return student.masked_fill(~usable, 0), teacher.masked_fill(~usable, 0), usable
