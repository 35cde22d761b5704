"""LRC-BERT on a task: first the intermediate layers alone, then beside them the teacher's and the task's labels.

Fu et al. (AAAI 2021, arXiv 2012.07335). What of this is the paper's stands in docs/methods/lrc_bert.md.
"""

from dataclasses import dataclass

from fastkd.losses import soft_label_loss
from fastkd.recipes.lrc_bert_general import ContrastArguments, LrcBertGeneralTrainer


@dataclass
class LrcBertConfig(ContrastArguments):
    """Settings of the task phase, beside those of `ContrastArguments`: α · Σ COS-NCE + β · soft + γ · hard.

    Args:
        contrast_weight, soft_weight, hard_weight: α, β and γ. Without a contrastive loss, α = 0, `contrast_only` is 0.
        contrast_only: part of the steps, the first ones, with the contrastive loss alone, which leaves the last step at
            least to all losses; 0 is training in one stage.
        temperature: τ of the soft labels; a regression has none, and both its losses are mean squared errors.
        scale_tau2: whether the soft loss is multiplied by τ².
    """

    contrast_weight: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 3.0
    contrast_only: float = 0.8
    temperature: float = 1.1
    scale_tau2: bool = True
    perturbation: str | None = "embedding"

    def __post_init__(self):
        for name in ("contrast_weight", "soft_weight", "hard_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must not be negative")
        if not self.soft_weight + self.hard_weight > 0:
            raise ValueError("soft_weight=0 and hard_weight=0: the head would learn nothing")
        if not 0 <= self.contrast_only < 1:
            raise ValueError(f"contrast_only={self.contrast_only}; it must lie in [0, 1): the head needs steps too")
        if self.contrast_only and not self.contrast_weight:
            raise ValueError(
                f"contrast_weight=0, but the first {self.contrast_only:.0%} of the steps would have nothing else; set "
                "contrast_only=0 as well"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; it must be positive")
        super().__post_init__()


class LrcBertTrainer(LrcBertGeneralTrainer):
    """Trains a student on a task, beside a teacher that was fine-tuned on it.

    Args:
        model: the student, with its head.
        args: `LrcBertConfig`.
        teacher: the fine-tuned teacher.
        train_dataset, eval_dataset: from `Task.tokenize`.
        processing_class: the tokenizer.
        projections: folder of the general distillation, whose maps into the teacher's space are trained on; by default
            they start as identities.

    What is saved at the end is the student, a plain transformers model. Checkpoints hold the maps too.

    Raises:
        ValueError: heads of different labels, and what `LrcBertGeneralTrainer` raises.
    """

    title = "LRC-BERT"
    leaves_projections = False

    def __init__(self, model, args: LrcBertConfig, *, teacher, **kwargs):
        labels = {"teacher": teacher.config.num_labels, "student": model.config.num_labels}
        if labels["teacher"] != labels["student"]:
            raise ValueError(
                f"the teacher has {labels['teacher']} labels, the student {labels['student']}; both need the task's"
            )
        super().__init__(model, args, teacher=teacher, **kwargs)

    @staticmethod
    def contrasts(args: LrcBertConfig) -> bool:
        return args.contrast_weight > 0

    @property
    def switch(self) -> int:
        """The first step with all losses: there is one, however short the run."""
        return min(round(self.args.contrast_only * self.state.max_steps), self.state.max_steps - 1)

    def needs_head(self):
        return self.state.global_step >= self.switch

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses that this step has."""
        args = self.args
        weights = {"contrast": args.contrast_weight}
        if self.needs_head():
            weights |= {"soft": args.soft_weight, "hard": args.hard_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def loss_terms(self, model, inputs):
        terms, output = super().loss_terms(model, inputs)
        if "soft" in self.weights:
            _, logits = self.targets(inputs)
            terms["soft"] = soft_label_loss(
                output.logits, logits, self.args.temperature, scale_tau2=self.args.scale_tau2
            )
        if "hard" in self.weights:
            terms["hard"] = output.loss
        return terms, output

    def extra_logs(self):
        return {"stage": 1 if self.state.global_step <= self.switch else 2}

    def description(self):
        args, lines = self.args, super().description()
        alone = f"the first {args.contrast_only:.0%} of the steps contrast alone, then " if args.contrast_only else ""
        lines["loss"] = (
            f"{alone}{args.contrast_weight:g} contrast + {args.soft_weight:g} soft + {args.hard_weight:g} hard"
        )
        return lines
