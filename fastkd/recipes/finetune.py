"""Fine-tuning on a task: how a teacher is made, and the plain baseline of every student."""

from dataclasses import dataclass

from transformers import DataCollatorWithPadding

from fastkd.models.architectures import layers_of
from fastkd.recipes.training import DistillationArguments, DistillationTrainer


@dataclass
class FineTuneConfig(DistillationArguments):
    """`DistillationArguments`; fine-tuning needs no settings of its own."""


class FineTuneTrainer(DistillationTrainer):
    """Task loss only: cross-entropy for classes, mean squared error for scores, as the model's head defines it.

    Args:
        model: any transformers model with a task head.
        args: `FineTuneConfig`.
        train_dataset, eval_dataset: from `Task.tokenize`.
        processing_class: the tokenizer.
    """

    weights = {"task": 1.0}  # noqa: RUF012

    def __init__(self, model, args: FineTuneConfig, *, processing_class, data_collator=None, **kwargs):
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=data_collator or DataCollatorWithPadding(processing_class),
            **kwargs,
        )

    def description(self):
        config = self.model.config
        layers = len(layers_of(self.model))
        return {"fine-tuning": f"{layers} layers x {config.hidden_size}"} | super().description()

    def loss_terms(self, model, inputs):
        outputs = model(**inputs)
        return {"task": outputs.loss}, outputs
