"""ARC stage A: self-attention relations of an upper teacher layer, distilled on unlabelled text.

The loss is MiniLMv2's (arXiv 2012.15828, equations 5 to 8): relation KL of queries, keys and values. ARC's full text
is not public; that its "fine-grained self-attention" is this loss is our reading (docs/methods/arc.md).
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DataCollatorWithPadding

from fastkd.losses import RelationKL
from fastkd.models import tap
from fastkd.models.architectures import layers_of, resolve_layers
from fastkd.ops import backends
from fastkd.ops.relation_kl import check_num_heads
from fastkd.recipes.training import DistillationArguments, DistillationTrainer, check_vocabulary


@dataclass
class ArcStageAConfig(DistillationArguments):
    """Settings of stage A, beside those of `DistillationArguments`.

    Args:
        relation_heads: heads into which the projections are cut anew; divides both widths (MiniLMv2: 48 for base-size
            teachers, 64 for large ones).
        layer_pairs: what learns from what, a list of (teacher layer, student layer, weight); negative counts from the
            end. MiniLMv2: the last of 12 layers, the 21st of 24 for BERT-large, the 19th of 24 for RoBERTa-large.
        relations: weight of each relation.
        train_embeddings: false leaves the embeddings, copied from a teacher of the same width, as they are.
        max_length: tokens of a window of text.
    """

    relation_heads: int = 48
    layer_pairs: list = field(default_factory=lambda: [[-1, -1, 1.0]])
    relations: dict = field(default_factory=lambda: {"query": 1.0, "key": 1.0, "value": 1.0})
    train_embeddings: bool = True
    max_length: int = 128
    per_device_train_batch_size: int = 64
    learning_rate: float = 3e-4

    def __post_init__(self):
        if not self.layer_pairs or not all(isinstance(p, (list, tuple)) and len(p) == 3 for p in self.layer_pairs):
            raise ValueError(
                f"layer_pairs={self.layer_pairs!r}: a list of [teacher layer, student layer, weight] is needed, "
                "such as [[-1, -1, 1.0]]"
            )
        super().__post_init__()


class ArcStageATrainer(DistillationTrainer):
    """Trains a student on the relations of a frozen teacher. No label is needed, and no head is trained.

    Args:
        model: the student, with any head or none.
        args: `ArcStageAConfig`.
        teacher: the pretrained encoder; the same tokenizer as the student's.
        train_dataset: from `chunk_corpus`.
        processing_class: the tokenizer.

    Raises:
        ValueError: relation heads that do not divide a width, a layer out of range, a tokenizer larger than an
            embedding: before anything is loaded to a device.
    """

    def __init__(self, model, args: ArcStageAConfig, *, teacher, processing_class, data_collator=None, **kwargs):
        self.pairs = check_stage_a(model, teacher, processing_class, args)
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        self.relation_kl = RelationKL(args.relation_heads, args.relations)
        self.weights = {
            self._term(t, s, name): pair_weight * weight
            for t, s, pair_weight in self.pairs
            for name, weight in args.relations.items()
        }
        # Data parallel would wait for ever for the gradients of what the relations do not reach.
        self._frozen = _not_reached(model, [s for _, s, _ in self.pairs], tuple(args.relations))
        if not args.train_embeddings:
            self._frozen += [p for p in model.get_input_embeddings().parameters() if p.requires_grad]
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=data_collator or DataCollatorWithPadding(processing_class),
            **kwargs,
        )

    def _term(self, teacher_layer: int, student_layer: int, name: str) -> str:
        return name if len(self.pairs) == 1 else f"{name}_{teacher_layer}to{student_layer}"

    def loss_terms(self, model, inputs):
        what = tuple(self.relation_kl.weights)
        teacher = self.targets(inputs)
        with tap(model, [s for _, s, _ in self.pairs], what, stop_after=True) as student:
            model(**inputs)
        terms = {}
        for t, s, _ in self.pairs:
            losses = self.relation_kl(student[s], teacher[t], inputs["attention_mask"])
            terms |= {self._term(t, s, name): losses[name] for name in what}
        return terms, None

    def compute_targets(self, inputs):
        # Nothing above the last projection that is needed runs, in either model.
        with tap(self.teacher, [t for t, _, _ in self.pairs], tuple(self.relation_kl.weights), stop_after=True) as taps:
            self.teacher(**inputs)
        return taps

    def description(self):
        what = ", ".join(self.relation_kl.weights)
        depths = {"teacher": len(layers_of(self.teacher)), "student": len(layers_of(self.model))}
        widths = {"teacher": self.teacher.config.hidden_size, "student": self.model.config.hidden_size}
        matched = "; ".join(f"student layer {s} learns {what} of teacher layer {t}" for t, s, _ in self.pairs)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        heads = self.args.relation_heads
        return {
            "stage A": f"teacher {depths['teacher']} layers x {widths['teacher']}, "
            f"student {depths['student']} layers x {widths['student']}",
            "layers": f"{matched} (from 0); nothing above them runs",
            "relations": f"{heads} heads, {widths['teacher'] // heads} wide in the teacher, "
            f"{widths['student'] // heads} in the student",
            "relation_kl": f"runs on {backends.resolve('relation_kl', 'auto', self.args.device, dtype)}",
        } | super().description()

    def train(self, *args, **kwargs):
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        try:
            return super().train(*args, **kwargs)
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(True)


def check_stage_a(student, teacher, tokenizer, config: ArcStageAConfig) -> list[tuple[int, int, float]]:
    """Whether stage A can run; returns the layer pairs, all counted from 0.

    Raises:
        ValueError: relation heads that do not divide a width, a layer out of range, an unknown relation, a tokenizer
            larger than an embedding.
    """
    check_num_heads(
        config.relation_heads, {"teacher": teacher.config.hidden_size, "student": student.config.hidden_size}
    )
    check_vocabulary(tokenizer, teacher=teacher, student=student)
    teacher_layers, student_layers, weights = zip(*config.layer_pairs, strict=True)
    teacher_layers = resolve_layers(teacher_layers, len(layers_of(teacher)), "layer_pairs, teacher")
    student_layers = resolve_layers(student_layers, len(layers_of(student)), "layer_pairs, student")
    with tap(student, student_layers, tuple(config.relations)):
        return list(zip(teacher_layers, student_layers, map(float, weights), strict=True))


def _not_reached(model, layers: list[int], what: tuple[str, ...]) -> list[nn.Parameter]:
    """The trainable parameters above the last tapped projection: they get no gradient in stage A.

    They keep the teacher's values, to start stage B from.
    """
    # Asked from autograd on three made-up tokens: no architecture has to be known.
    training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    with torch.enable_grad(), tap(model.eval(), layers, what, stop_after=True) as taps:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    total = sum(taps[layer][name].sum() for layer in taps.layers for name in what)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    model.train(training)
    return [p for p, grad in zip(parameters, grads, strict=True) if grad is None]
