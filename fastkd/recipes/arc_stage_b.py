"""ARC stage B: a student trained inside its fine-tuned predecessor, by random one-to-one layer replacement.

The procedure is BERT-of-Theseus' (arXiv 2002.02925); that ARC starts it from the student of stage A is our reading
(docs/methods/arc.md).
"""

from dataclasses import dataclass

import torch
from transformers import DataCollatorWithPadding

from fastkd.losses import soft_label_loss
from fastkd.models import ReplaceableEncoder, ReplacementSchedule
from fastkd.models.architectures import embeddings_of
from fastkd.recipes.training import DistillationArguments, DistillationTrainer, check_vocabulary


@dataclass
class ArcStageBConfig(DistillationArguments):
    """Settings of stage B, beside those of `DistillationArguments`.

    Args:
        schedule: "linear", "cosine" or "constant" replacement rate.
        start_rate: nominal rate at step 0, in (0, 1].
        reach: part of the run after which the rate is 1; from there on the student is fine-tuned alone.
        groups: predecessor layers that each student layer replaces; by default one each, or contiguous runs.
        train_head: whether embeddings, pooler and head are trained: false, true, or "after" (once the rate is 1).
        soft_weight: share of the predecessor's soft labels in the loss, in [0, 1]; 0 is Theseus' task loss alone.
        temperature: of the soft labels; their term is multiplied by its square.
    """

    schedule: str = "linear"
    start_rate: float = 0.3
    reach: float = 0.6
    groups: list | None = None
    train_head: bool | str = "after"
    soft_weight: float = 0.0
    temperature: float = 2.0
    ddp_find_unused_parameters: bool | None = True  # a layer that was not drawn has no gradient in that step

    def __post_init__(self):
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"soft_weight={self.soft_weight}; allowed is 0 to 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}; it must be positive")
        super().__post_init__()


class ArcStageBTrainer(DistillationTrainer):
    """Trains `model.student` inside `model.predecessor`; evaluation and every checkpoint are the student's alone.

    Args:
        model: a `ReplaceableEncoder`; `stage_b_encoder` makes one from the config.
        args: `ArcStageBConfig`.
        train_dataset, eval_dataset: from `Task.tokenize`.
        processing_class: the tokenizer.

    Logged beside the loss terms: `rate_nominal` and `rate_effective` (a step in which no student layer was drawn is
    drawn again) at the time of logging, and `rate_drawn`, the share of student layers that ran since the last log.
    """

    def __init__(
        self, model: ReplaceableEncoder, args: ArcStageBConfig, *, processing_class, data_collator=None, **kwargs
    ):
        check_vocabulary(processing_class, predecessor=model.predecessor, student=model.student)
        self.weights = {"task": 1 - args.soft_weight}
        if args.soft_weight:
            self.weights["soft"] = args.soft_weight
        self._drawn: list[float] = []
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=data_collator or DataCollatorWithPadding(processing_class),
            **kwargs,
        )

    @property
    def encoder(self) -> ReplaceableEncoder:
        return self.accelerator.unwrap_model(self.model)

    def description(self):
        encoder, args = self.encoder, self.args
        groups = "; ".join(f"{i} for {group}" for i, group in enumerate(encoder.groups))
        return {
            "stage B": f"student layer for predecessor layers: {groups} (from 0)",
            "schedule": f"{args.schedule} from {args.start_rate:g} to 1 after {args.reach:.0%} of the steps; "
            f"effectively from {encoder.effective_rate:.3f}, as a draw of no student layer is repeated",
            "head": {False: "embeddings and head stay the predecessor's", True: "embeddings and head are trained"}.get(
                args.train_head, "embeddings and head are trained once the rate is 1"
            ),
        } | super().description()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.encoder.set_step(self.state.global_step)
        self._drawn.append(sum(self.encoder.draw) / len(self.encoder.draw))
        return super().training_step(model, inputs, num_items_in_batch)

    def loss_terms(self, model, inputs):
        outputs = model(**inputs)
        terms = {"task": outputs.loss}
        if "soft" in self.weights:
            terms["soft"] = soft_label_loss(outputs.logits, self.targets(inputs), self.args.temperature)
        return terms, outputs

    def compute_targets(self, inputs):
        return self.encoder.predecessor(**inputs).logits if "soft" in self.weights else None

    def embeddings(self):
        return embeddings_of(self.encoder.student)

    def extra_logs(self):
        drawn, self._drawn = self._drawn, []
        return {
            "rate_nominal": round(self.encoder.rate, 6),
            "rate_effective": round(self.encoder.effective_rate, 6),
            "rate_drawn": round(sum(drawn) / len(drawn), 6),
        }

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:  # one rank writes
            return
        output_dir = output_dir or self.args.output_dir
        self.encoder.save_pretrained(output_dir)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, f"{output_dir}/training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.encoder.load_checkpoint(resume_from_checkpoint)


def stage_b_encoder(predecessor, student, config: ArcStageBConfig, total_steps: int) -> ReplaceableEncoder:
    """The pair, with the schedule that the config describes for a run of `total_steps` optimizer steps."""
    schedule = ReplacementSchedule.from_total(total_steps, config.schedule, config.start_rate, config.reach)
    return ReplaceableEncoder(
        predecessor, student, schedule, groups=config.groups, seed=config.seed, train_head=config.train_head
    )
