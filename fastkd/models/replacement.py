"""Layer replacement: BERT-of-Theseus (arXiv 2002.02925) for groups of predecessor layers, ARC for groups of one.

In training the student's embeddings and head enclose a list of layers in which each student layer stands either for
itself or is stood in for by its group of predecessor layers. The list is put in place of the student's own for the
length of a forward, so masks, position biases and rotary tables stay the model's own business.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fastkd.models.architectures import architecture_of, find_encoder, layers_of
from fastkd.models.schedules import effective_rate
from fastkd.models.student import all_but_layers, contiguous_groups, copy_all_but_layers

_RECORD = "replacement.json"


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over class, sizes and every parameter of a model; the same wherever and whenever it is loaded."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class ReplaceableEncoder(nn.Module):
    """A student that is trained inside its frozen predecessor.

    predecessor: the fine-tuned model, with its head. It is frozen in place and stays in eval mode: no dropout.
    student: a model of the same class and width. Its embeddings and head are overwritten with the predecessor's.
    schedule: replacement rate by optimizer step, such as `ReplacementSchedule("linear", 0.3, 1000)`.
    groups: for each student layer the list of predecessor layers it replaces; together all of them, in order. By
        default one each where the depths are equal, contiguous runs as even as possible otherwise.
    seed: of the draws. A draw depends on (seed, optimizer step) alone, so it is the same for all micro-batches of a
        step, on every rank, and after a resume. A draw without any student layer is repeated: the rate that is trained
        with is `effective_rate`, not `rate`.
    train_head: whether embeddings, pooler and head are trained too: False (Theseus), True, or "after" (once the rate
        is 1). With "after" they count as trainable until the first `set_step`, so that an optimizer built before
        training holds them.

    Call `set_step(step)` with the number of finished optimizer steps before each step. In training mode the forward
    runs the mixed model, in eval mode the student alone; both return the model's ordinary output. `state_dict` is the
    student's alone. Under DDP use `find_unused_parameters=True`: the layers not drawn have no gradient in that step.

    Raises ValueError where classes, widths, heads or groups do not fit.
    """

    # The loss is a mean over the batch: the Trainer divides it by the accumulation steps, and passes no item count.
    accepts_loss_kwargs = False

    def __init__(
        self,
        predecessor: PreTrainedModel,
        student: PreTrainedModel,
        schedule: Callable[[int], float],
        groups: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
        train_head: bool | str = False,
    ):
        super().__init__()
        _check_pair(predecessor, student)
        if train_head not in (True, False, "after"):
            raise ValueError(f"train_head={train_head!r}: give True, False or 'after'")
        self.groups = _checked_groups(groups, len(layers_of(predecessor)), len(layers_of(student)))
        if self.groups[0] != [0] and getattr(find_encoder(predecessor).config, "conv_kernel_size", 0):
            raise ValueError(
                f"groups[0]={self.groups[0]}: this DeBERTa has a convolution behind its first layer, so the first "
                "group must be [0]"
            )
        copy_all_but_layers(predecessor, student)
        for field in ("id2label", "label2id", "problem_type"):
            setattr(student.config, field, getattr(predecessor.config, field))

        self.predecessor = predecessor.requires_grad_(False).eval()
        self.student = student.requires_grad_(True)
        self.schedule, self.seed, self.train_head = schedule, seed, train_head
        self.predecessor_fingerprint = fingerprint(predecessor)
        self._step = 0
        self._train_all_but_layers(train_head is not False)

    # -- what the trainer says and reads -----------------------------------------------------------------------------

    def set_step(self, step: int) -> None:
        """Say how many optimizer steps are finished; rate and draw follow from it."""
        self._step = step
        if self.train_head == "after":
            self._train_all_but_layers(self.rate >= 1)

    @property
    def rate(self) -> float:
        """Nominal replacement rate of this step."""
        return self._rate(self._step)

    @property
    def effective_rate(self) -> float:
        """Replacement rate given that at least one student layer is drawn: 0.457 for 0.3 and three layers."""
        return effective_rate(self.rate, len(self.groups))

    @property
    def draw(self) -> tuple[bool, ...]:
        """Which student layers run in this step's training forwards."""
        return self._draw(self._step)

    def _rate(self, step: int) -> float:
        rate = self.schedule(step)
        if not 0 < rate <= 1:
            raise ValueError(f"the schedule gives a replacement rate of {rate} at step {step}: it must lie in (0, 1]")
        return rate

    def _draw(self, step: int) -> tuple[bool, ...]:
        rate, generator = self._rate(step), random.Random(f"{self.seed} {step}")
        while not any(draw := tuple(generator.random() < rate for _ in self.groups)):
            pass
        return draw

    # -- the model ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        start_positions=None,
        end_positions=None,
        **inputs,
    ):
        """The model's own forward and output. The arguments are spelled out because the Trainer drops every column
        that is not named here."""
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if not self.training:
            return self.student(**inputs)
        with self._mixed(self.draw):
            return self.student(**inputs)

    @contextmanager
    def _mixed(self, draw: Sequence[bool]) -> Iterator[None]:
        """The student with the drawn layers of its own and the predecessor's groups in place of the others."""
        own, others = layers_of(self.student), layers_of(self.predecessor)
        mixed = nn.ModuleList()
        for layer, group, drawn in zip(own, self.groups, draw, strict=True):
            mixed.extend([layer] if drawn else [others[i] for i in group])
        encoder = find_encoder(self.student)
        parent, _, name = architecture_of(encoder.config).layers.rpartition(".")
        holder = attrgetter(parent)(encoder) if parent else encoder
        setattr(holder, name, mixed)
        try:
            yield
        finally:
            setattr(holder, name, own)

    def train(self, mode: bool = True) -> "ReplaceableEncoder":
        super().train(mode)
        self.predecessor.eval()
        return self

    def _train_all_but_layers(self, trainable: bool) -> None:
        for tensor in all_but_layers(self.student).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(trainable)

    @property
    def config(self):
        return self.student.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.student.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    # -- what is kept ------------------------------------------------------------------------------------------------

    def state_dict(self, *args, **kwargs):
        """The student's, under the student's own names."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        return self.student.load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, directory: str | Path, **kwargs) -> None:
        """Write the student as a plain transformers model, and beside it which predecessor it was trained in."""
        self.student.save_pretrained(directory, **kwargs)
        record = self._identity() | {"predecessor": self.predecessor.name_or_path}
        Path(directory, _RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def load_checkpoint(self, directory: str | Path) -> None:
        """Continue from what `save_pretrained` wrote. Raises ValueError where it belongs to another predecessor, other
        groups or another seed, and FileNotFoundError where it is no such folder; the student is then unchanged."""
        path = Path(directory, _RECORD)
        if not path.is_file():
            raise FileNotFoundError(f"{directory} is no checkpoint of a ReplaceableEncoder: it holds no {_RECORD}")
        record = json.loads(path.read_text())
        for name, here in self._identity().items():
            if record.get(name) != here:
                raise ValueError(
                    f"{directory} was trained with {name} {record.get(name)}, this model has {here} (the checkpoint's "
                    f"predecessor was loaded from {record.get('predecessor')!r}): use the same predecessor and settings"
                )
        saved = type(self.student).from_pretrained(directory, dtype=self.student.dtype)
        self.student.load_state_dict(saved.state_dict())

    def _identity(self) -> dict:
        return {"predecessor_fingerprint": self.predecessor_fingerprint, "groups": self.groups, "seed": self.seed}


def _check_pair(predecessor: PreTrainedModel, student: PreTrainedModel) -> None:
    if type(predecessor) is not type(student):
        raise ValueError(
            f"predecessor is a {type(predecessor).__name__}, student a {type(student).__name__}: both must be of one "
            "class; load the student with the predecessor's class"
        )
    dtypes = [model.dtype for model in (predecessor, student)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"the predecessor is {dtypes[0]} and the student {dtypes[1]}: load both in the same dtype")
    # Heads count too: position biases and rotary tables are made once, for all layers.
    sizes = [(model.config.hidden_size, model.config.num_attention_heads) for model in (predecessor, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"(hidden, heads) of the predecessor are {sizes[0]}, of the student {sizes[1]}: layers can replace each "
            "other at equal width and heads only"
        )
    for field in architecture_of(student.config).per_layer:
        absent = set(getattr(predecessor.config, field)) - set(getattr(student.config, field))
        if absent:
            raise ValueError(
                f"the predecessor's layers use {field} {sorted(absent)}, which no layer of the student has: choose "
                "student layers that have each of them"
            )


def _checked_groups(groups: Sequence[Sequence[int]] | None, layers: int, student_layers: int) -> list[list[int]]:
    if groups is None:
        if student_layers > layers:
            raise ValueError(f"the student has {student_layers} layers, its predecessor only {layers}")
        return contiguous_groups(layers, student_layers)
    groups = [list(group) for group in groups]
    if len(groups) != student_layers:
        raise ValueError(
            f"groups={groups}: {len(groups)} groups for {student_layers} student layers; give one for each"
        )
    if not all(groups) or [layer for group in groups for layer in group] != list(range(layers)):
        raise ValueError(
            f"groups={groups}: together the groups must be the predecessor's layers 0 to {layers - 1}, each once, in "
            "order, none empty"
        )
    return groups
