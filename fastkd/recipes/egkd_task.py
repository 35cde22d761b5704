"""EGKD on a task: labels and soft labels, and beside them the teacher's explanations.

Yang et al. (ACM TALLIP 23, 2024). What of this is the paper's stands in docs/methods/egkd.md.
"""

import dataclasses
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from fastkd.explain import Fingerprint, TeacherResults, WordAlignment, twice_differentiable
from fastkd.explain.fingerprint import of_tokenizer
from fastkd.losses import soft_label_loss
from fastkd.recipes.egkd_branches import Explained, GradientBranch, PerturbationBranch
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_teacher import (
    check_mask_token,
    check_units,
    classifier_of,
    results_settings,
    running_teacher,
    special_ids,
)
from fastkd.recipes.egkd_units import OF_WORDS, padded, units_of
from fastkd.recipes.training import DistillationTrainer, NotFiniteError, check_vocabulary


class EgkdTrainer(DistillationTrainer):
    """Trains a student on a task, on its teacher's answers and on its teacher's explanations.

    Args:
        model: the student, a classifier of any architecture that offers embeddings.
        args: `EgkdConfig`.
        teacher: `TeacherResults` for the training data, from `teacher_results`: no teacher runs. Or the fine-tuned
            teacher, a model, which then runs at every step.
        alignment: of the training data, for a student with a tokenizer of its own: words are compared, and `teacher`
            are results of words. None compares tokens.
        train_dataset, eval_dataset: from `Task.tokenize`.
        processing_class: the tokenizer, the student's.

    Logged beside the loss terms: `explanations_skipped`, how often since the last log a branch's explanations of a
    batch were not finite.

    Raises:
        ValueError: heads of different labels, results of other data or without a branch's part, of words for tokens or
            the reverse, labels that are missing or out of range, a student that offers no embeddings: before anything
            is loaded to a device.
        NotFiniteError: as `DistillationTrainer`, and where a branch's explanations were not finite `args.max_skipped`
            times in a row.
    """

    def __init__(
        self,
        model,
        args: EgkdConfig,
        *,
        teacher: TeacherResults | PreTrainedModel,
        processing_class,
        alignment: WordAlignment | None = None,
        train_dataset=None,
        data_collator=None,
        **kwargs,
    ):
        classifier_of(model, processing_class)
        running = {} if isinstance(teacher, TeacherResults) else {"teacher": teacher}
        check_vocabulary(processing_class, student=model, **running)
        check_mask_token(processing_class, args)
        check_results(model, teacher, train_dataset, args)
        check_fingerprint(processing_class, teacher, train_dataset, args, alignment)
        self.branches = args.make_branches()
        self._teacher, self._running, self._explainable = teacher, None, None
        self._skipped: dict[str, Tensor] = {}  # (3,) on the device: since the last log, in a row, and longest row
        self._usable: Tensor | None = None  # of the batch that is being worked on, whether its explanations are finite
        stored = teacher if isinstance(teacher, TeacherResults) else None
        if train_dataset is not None:
            if alignment is not None:
                train_dataset = alignment.with_words("student", train_dataset)
            train_dataset = train_dataset.add_column("example", list(range(len(train_dataset))))
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            train_dataset=train_dataset,
            data_collator=TeacherCollator(
                data_collator or DataCollatorWithPadding(processing_class), processing_class, stored, self.branches
            ),
            **kwargs,
        )

    @property
    def _stored(self) -> bool:
        return isinstance(self._teacher, TeacherResults)

    @property
    def switch(self) -> int:
        """The first step with branches: there is one, however short the run."""
        last = max(0, self.state.max_steps - 1)
        return min(round(self.args.explain_after * self.state.max_steps), last)

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms that this step has."""
        args, step = self.args, self.state.global_step
        weights = {"task": 1 - args.soft_weight, "soft": args.soft_weight}
        if step >= self.switch:
            weights |= args.explaining
            if (step - self.switch) % args.explain_every:
                weights.pop("gradient", None)
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def active(self) -> list:
        """The branches of this step."""
        return [branch for branch in self.branches if branch.name in self.weights]

    @property
    def _gradient(self) -> GradientBranch | None:
        """The gradient branch, if this step has it."""
        return next((branch for branch in self.active if isinstance(branch, GradientBranch)), None)

    def train(self, *args, **kwargs):
        if not self._stored:
            self._running, self.branches = running_teacher(
                self._teacher, self.processing_class, self.train_dataset, self.args
            )
        result = super().train(*args, **kwargs)
        self._stop_everywhere_if_skipped()
        return result

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        usable, self._usable = self._usable, None
        if usable is not None and not self.args.fp16:  # whose scaler skips a step with such a gradient
            self._clear_gradients(usable)
        return loss

    @torch.no_grad()
    def _clear_gradients(self, usable: Tensor) -> None:
        """Where the batch's explanations were not finite, on any process, entries of the step's gradient that are not
        finite become 0: a term that is 0 still has them, since 0 · inf is NaN. What other terms, accumulated batches
        and processes had added to such an entry is lost with it."""
        skipped = self.accelerator.reduce((~usable).float(), "sum") > 0
        if usable.device.type == "cpu" and not skipped:
            return
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(skipped & ~parameter.grad.isfinite(), 0)

    def loss_terms(self, model, inputs):
        given = self.targets(inputs)
        batch = self._explained(inputs, given)
        active, gradient = self.active, self._gradient
        twice = gradient is not None and gradient.differentiates_twice(batch)
        with (
            batch.student.watch() if active else nullcontext() as seen,
            twice_differentiable() if twice else nullcontext(),
        ):
            outputs = model(**batch.inputs)
        batch.watched = (seen, outputs.logits)
        terms = {}
        if "task" in self.weights:
            terms["task"] = outputs.loss
        if "soft" in self.weights:
            terms["soft"] = soft_label_loss(outputs.logits, given["logits"], self.args.temperature)
        usable = {}
        for branch in active:
            terms[branch.name], usable[branch.name] = branch.loss(batch)
        if active:
            self._count(usable, outputs.logits.device)
        return terms, outputs

    def compute_targets(self, inputs):
        if self._stored:
            return inputs["teacher"]
        batch = self._explained(inputs, {})
        teacher, gradient = self._running, self._gradient
        with torch.set_grad_enabled(gradient is not None and gradient.differentiates_teacher(batch)):
            with teacher.watch() as seen:
                logits = teacher.logits(batch.inputs)
        given = {branch.name: branch.running_teacher(teacher, batch, (seen, logits)) for branch in self.active}
        return given | {"logits": logits.detach()}

    def _explained(self, inputs: dict, given: dict[str, Tensor]) -> Explained:
        if self._explainable is None:
            student = self.accelerator.unwrap_model(self.model)
            # accelerate puts autocast into the model's forward; a difference of scores would drown in its rounding.
            forward = getattr(student, "_original_forward", None)
            plain = classifier_of(student, self.processing_class)
            precise = plain if forward is None else classifier_of(student, self.processing_class, forward)
            self._explainable = (plain, precise)
        beside = ("teacher", "example", "masks", *OF_WORDS)
        taken = {name: value for name, value in inputs.items() if name not in beside}
        return Explained(
            taken,
            given,
            inputs["example"],
            inputs.get("masks"),
            self.state.global_step,
            self._stored,
            *self._explainable,
            half=self.args.fp16,
            units=units_of(inputs),
        )

    @torch.no_grad()
    def _count(self, usable: dict[str, Tensor | None], device: torch.device) -> None:
        """Count explanations of a batch that were not finite, on the device: each branch for itself, and none where
        nothing was explained."""
        if not self._skipped:
            self._skipped = {branch.name: torch.zeros(3, dtype=torch.int64, device=device) for branch in self.branches}
        self._usable = torch.ones((), dtype=torch.bool, device=device)
        for name, finite in usable.items():
            if finite is not None:
                total, row, longest = self._skipped[name]
                row = torch.where(finite, 0, row + 1)
                self._skipped[name] = torch.stack([total + ~finite, row, torch.maximum(longest, row)])
                self._usable = self._usable & finite
        if self._reads_losses_at_once(self._usable):
            self._stop_if_skipped({name: int(counts[2]) for name, counts in self._skipped.items()})

    def _stop_if_skipped(self, longest: dict[str, int]) -> None:
        for branch, row in longest.items():
            if row >= self.args.max_skipped:
                raise NotFiniteError(
                    f"step {self.state.global_step}: the explanations of {row} batches in a row were NaN or infinite, "
                    f"branch {branch} (max_skipped={self.args.max_skipped}). The run stops; checkpoints in "
                    f"{self.args.output_dir} are from before. Look at the teacher and the learning rate"
                )

    def _stop_everywhere_if_skipped(self) -> int:
        """On every rank alike; else how many were skipped since the last log, on all of them."""
        if not self._skipped:
            return 0
        found = self.accelerator.gather(torch.stack([*self._skipped.values()])[None])  # (ranks, branches, 3)
        self._stop_if_skipped(dict(zip(self._skipped, found[:, :, 2].amax(0).tolist(), strict=True)))
        return int(found[:, :, 0].sum())

    def _save_checkpoint(self, model, trial):
        self._stop_everywhere_if_skipped()
        super()._save_checkpoint(model, trial)

    def extra_logs(self):
        if not self._skipped:
            return {}
        skipped = self._stop_everywhere_if_skipped()
        for branch, counts in self._skipped.items():
            self._skipped[branch] = torch.cat([torch.zeros_like(counts[:1]), counts[1:]])
        return {"explanations_skipped": skipped}

    def description(self):
        args, lines = self.args, super().description()
        lines["loss"] = " + ".join(
            f"{weight:g} {name}"
            for name, weight in {"task": 1 - args.soft_weight, "soft": args.soft_weight, **args.explaining}.items()
            if weight
        )
        if self._stored:
            of_words = ", of words" if "align" in self._teacher.fingerprint.settings else ""
            lines["teacher"] = f"does not run: results of {len(self._teacher)} examples are stored{of_words}"
        else:
            lines["teacher"] = "runs at every step"
        for branch in self.branches:
            lines[branch.name] = branch.cost()
        if self.branches:
            every = f"; gradient every {args.explain_every} steps" if args.explain_every > 1 else ""
            lines["explained"] = f"after {args.explain_after:.0%} of the steps{every}"
        return lines

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ("example", "words") if name not in self._signature_columns]


class TeacherCollator:
    """Pads a batch, and lays beside it what is stored of the teacher and the masks of the pool, on the host: to look
    sequences up by length on a device would make the host wait.

    Rows that have no number `example`, those of an evaluation, are padded alone.
    """

    def __init__(self, pad, tokenizer, results: TeacherResults | None, branches: list):
        self.pad, self.special_ids = pad, special_ids(tokenizer)
        self.pool = next((branch.pool for branch in branches if isinstance(branch, PerturbationBranch)), None)
        names = {"logits"} | {branch.name for branch in branches}
        self.results = results and dataclasses.replace(
            results,
            per_example={name: values for name, values in results.per_example.items() if name in names},
            per_token={name: values for name, values in results.per_token.items() if name in names},
        )

    def __call__(self, rows: list[dict]) -> dict:
        numbered = "example" in rows[0]
        if not numbered:
            return self.pad(rows)
        examples = torch.tensor([row["example"] for row in rows])
        plain = [{name: value for name, value in row.items() if name != "example"} for row in rows]
        batch = dict(padded(self.pad, plain))
        batch["example"] = examples
        units = units_of(batch)
        if self.results is not None:
            batch["teacher"] = self.results.batch(examples, units.mask(batch))
        if self.pool is not None:
            batch["masks"] = self.pool.spread(units.maskable(batch, self.special_ids))
        return batch


def check_fingerprint(
    tokenizer,
    teacher: TeacherResults | PreTrainedModel,
    data,
    args: EgkdConfig,
    alignment: WordAlignment | None = None,
) -> None:
    """Raise a ValueError where stored results are of another tokenizer, other data, or other settings, or where they
    and the run are not both of tokens, or both of the words of one alignment."""
    if not isinstance(teacher, TeacherResults):
        if alignment is not None:
            raise ValueError(
                "alignment: words are compared with stored results, teacher=teacher_results(..., alignment=alignment); "
                "a teacher that runs at every step has the student's tokens"
            )
        return
    stored = teacher.fingerprint
    check_units(stored, alignment, "teacher")
    if alignment is None and stored.tokenizer != of_tokenizer(tokenizer):
        raise ValueError(
            "the stored results are of another tokenizer's tokens; teacher and student need one tokenizer, or an "
            "alignment of words (fastkd.explain.WordAlignment)"
        )
    if data is not None:
        expected = Fingerprint.of(None, tokenizer, data, results_settings(data, args))
        if alignment is not None:  # the teacher's tokens are others: the alignment knows the student's
            expected = dataclasses.replace(expected, tokenizer=stored.tokenizer, data=stored.data)
        if differences := stored.differences(expected):
            raise ValueError(f"the stored results belong to something else; {'; '.join(differences)}")


def check_results(model, teacher: TeacherResults | PreTrainedModel, data, args: EgkdConfig) -> None:
    """Raise a ValueError where teacher, student and data do not belong together."""
    classes = model.config.num_labels
    if isinstance(teacher, TeacherResults):
        given = teacher.per_example["logits"].shape[1]
        stored = {*teacher.per_example, *teacher.per_token}
        if missing := [name for name in args.explaining if name not in stored]:
            raise ValueError(
                f"the stored results have nothing for {', '.join(missing)}; they hold {', '.join(sorted(stored))}"
            )
        if data is not None and len(teacher) != len(data):
            raise ValueError(f"the stored results are of {len(teacher)} examples, the data has {len(data)}")
    else:
        given = teacher.config.num_labels
    if given != classes:
        raise ValueError(f"the teacher has {given} labels, the student {classes}; both need the task's")
    if data is None:
        return
    if "labels" not in data.column_names:
        if args.soft_weight < 1 or (args.target == "label" and "gradient" in args.explaining):
            raise ValueError(
                f"the training data has the columns {', '.join(data.column_names)}; labels are needed, unless "
                "soft_weight is 1 and target is not 'label'"
            )
    elif classes > 1:
        low, high = min(data["labels"][:]), max(data["labels"][:])
        if low < 0 or high >= classes:
            raise ValueError(
                f"target class {low if low < 0 else high} is out of range; the model has {classes} classes: "
                f"0 to {classes - 1}"
            )
