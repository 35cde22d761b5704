"""LRC-BERT's general distillation: the contrastive loss on every matched layer, on text without labels.

Fu et al. (AAAI 2021, arXiv 2012.07335) pre-train so the variant of which they report the best figures; the details are
our reading (docs/methods/lrc_bert.md).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import DataCollatorWithPadding

from fastkd.losses.layer_contrast import check_pooling
from fastkd.models import tap
from fastkd.models.architectures import layers_of
from fastkd.ops import backends
from fastkd.recipes.lrc_bert_student import MatchedStudent, match_layers, sequence_ids
from fastkd.recipes.training import DistillationArguments, DistillationTrainer, check_vocabulary


@dataclass
class ContrastArguments(DistillationArguments):
    """What both phases of LRC-BERT have in common, beside `DistillationArguments`.

    Args:
        layer_pairs: what learns from what, a list of (teacher layer, student layer); negative counts from the end. By
            default uniform, see `match_layers`.
        pooling: what of a layer is compared: "cls", "mean" or "token", see `LayerContrast`.
        global_negatives: whether the negatives are those of all processes. False, and between accumulated batches
            always, they are those of one process's batch.
    """

    layer_pairs: list | None = None
    pooling: str = "cls"
    global_negatives: bool = True
    ddp_find_unused_parameters: bool | None = True  # while there is no task loss, the head has no gradient

    def __post_init__(self):
        check_pooling(self.pooling)
        super().__post_init__()


@dataclass
class LrcBertGeneralConfig(ContrastArguments):
    """Settings of the general distillation, beside those of `ContrastArguments`.

    Args:
        max_length: tokens of a window of text.
    """

    max_length: int = 128
    per_device_train_batch_size: int = 64
    learning_rate: float = 3e-4


class LrcBertGeneralTrainer(DistillationTrainer):
    """Trains a student, and its maps into the teacher's space, on the hidden states of a frozen teacher.

    Args:
        model: the student, of any depth and width, with any head or none; a head is not trained.
        args: `LrcBertGeneralConfig`.
        teacher: the encoder to learn from; the same tokenizer as the student's.
        train_dataset: from `chunk_corpus`.
        processing_class: the tokenizer.
        projections: a folder with the maps to start from, as this trainer leaves them; by default identities.

    What is saved is the student, as a plain transformers model; beside it lie the maps, for the next phase.

    Raises:
        ValueError: layers that do not match, maps of other widths, a tokenizer larger than an embedding: before
            anything is loaded to a device.
    """

    weights = {"contrast": 1.0}  # noqa: RUF012
    title = "general distillation"
    leaves_projections = True

    def __init__(
        self,
        model,
        args: ContrastArguments,
        *,
        teacher,
        processing_class,
        projections: str | Path | None = None,
        data_collator=None,
        **kwargs,
    ):
        check_vocabulary(processing_class, teacher=teacher, student=model)
        self.pairs = match_layers(model, teacher, args.layer_pairs) if self.contrasts(args) else []
        model = MatchedStudent.to_learn_from(teacher, model, self.pairs, args.pooling)
        if projections is not None:
            model.load_projections(projections)
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=data_collator or DataCollatorWithPadding(processing_class),
            **kwargs,
        )

    @staticmethod
    def contrasts(args: ContrastArguments) -> bool:
        """Whether there is a contrastive loss at all."""
        return True

    def needs_head(self) -> bool:
        """Whether this step has a loss on the logits."""
        return False

    def compute_targets(self, inputs):
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        if not self.pairs:
            return None, self.teacher(**inputs).logits
        layers, head = [t for t, _ in self.pairs], self.needs_head()
        with tap(self.teacher, layers, ("hidden",), stop_after=not head) as taps:
            output = self.teacher(**inputs)
        hidden = [taps[layer]["hidden"] for layer in layers]
        vectors = self.accelerator.unwrap_model(self.model).contrast.targets(hidden, inputs["attention_mask"])
        return vectors, output.logits if head else None

    def loss_terms(self, model, inputs):
        vectors, _ = self.targets(inputs)
        if vectors is None:
            return {}, model(**inputs)
        everybody = self.args.world_size > 1 and self.args.global_negatives
        contrast, output = model(
            **inputs,
            targets=vectors,
            exclude=sequence_ids(inputs["input_ids"], inputs["attention_mask"]),
            group=dist.group.WORLD if everybody else None,
            head=self.needs_head(),
        )
        return {"contrast": contrast}, output

    def description(self):
        models = {"teacher": self.teacher, "student": self.model}
        sizes = [f"{who} {len(layers_of(model))} layers x {model.config.hidden_size}" for who, model in models.items()]
        lines = {self.title: ", ".join(sizes)}
        if self.pairs:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            matched = "; ".join(f"student layer {s} learns from teacher layer {t}" for t, s in self.pairs)
            backend = backends.resolve("cos_nce", "auto", self.args.device, dtype, self.teacher.config.hidden_size)
            where = "all processes" if self.args.global_negatives else "its own process"
            lines |= {
                "layers": f"{matched} (from 0)",
                "cos_nce": f"of {self.args.pooling}, runs on {backend}; negatives from the same batch of {where}",
            }
        return lines | super().description()

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and (self.leaves_projections or _internal_call):
            self.accelerator.unwrap_model(self.model).save_projections(output_dir or self.args.output_dir)

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).student.save_pretrained(output_dir)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, f"{output_dir}/training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        matched = self.accelerator.unwrap_model(self.model)
        saved = type(matched.student).from_pretrained(resume_from_checkpoint, dtype=matched.student.dtype)
        matched.student.load_state_dict(saved.state_dict())
        matched.load_projections(resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
