"""What LRC-BERT trains: a student, and beside it a learned map into the teacher's space for every matched layer."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.losses import LayerContrast
from fastkd.models import tap
from fastkd.models.architectures import layers_of, resolve_layers
from fastkd.models.student import contiguous_groups

PROJECTIONS = "projections.safetensors"


class MatchedStudent(nn.Module):
    """A student and its `LayerContrast`, as one module to train: data parallel then sees all that has a gradient.

    student: a transformers model with any head or none.
    contrast: None trains the student alone.
    pairs: the matched layers (teacher's, student's), in the order of the contrast's maps.
    """

    # The loss is a mean over the batch: the Trainer passes no item count.
    accepts_loss_kwargs = False

    def __init__(self, student: PreTrainedModel, contrast: LayerContrast | None, pairs: Sequence[tuple[int, int]] = ()):
        super().__init__()
        self.student, self.contrast = student, contrast
        self.pairs, self.layers = [list(pair) for pair in pairs], [layer for _, layer in pairs]

    @classmethod
    def to_learn_from(
        cls, teacher: PreTrainedModel, student: PreTrainedModel, pairs: Sequence[tuple[int, int]], pooling: str
    ) -> "MatchedStudent":
        """With maps of its own, which are identities; without pairs the student alone."""
        widths = (student.config.hidden_size, teacher.config.hidden_size)
        return cls(student, LayerContrast(len(pairs), *widths, pooling=pooling) if pairs else None, pairs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        targets: Tensor | None = None,
        exclude: Tensor | None = None,
        group=None,
        head: bool = True,
        **inputs,
    ):
        """The student's own output; with targets (`LayerContrast.targets`) a pair: the contrastive loss, and that
        output, or None without `head`: nothing above the last matched layer runs then.

        The arguments are spelled out because the Trainer drops every column that is not named here.
        """
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids, "labels": labels}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if targets is None:
            return self.student(**inputs)
        with tap(self.student, self.layers, ("hidden",), stop_after=not head) as taps:
            output = self.student(**inputs)
        hidden = [taps[layer]["hidden"] for layer in self.layers]
        loss = self.contrast(hidden, targets, attention_mask, exclude=exclude, group=group)
        return loss, output if head else None

    @property
    def config(self):
        return self.student.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.student.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    def save_projections(self, folder: str | Path) -> None:
        if self.contrast is not None:
            made_for = {"layer_pairs": json.dumps(self.pairs), "pooling": self.contrast.pooling}
            save_file(self.contrast.state_dict(), Path(folder, PROJECTIONS), metadata=made_for)

    def load_projections(self, folder: str | Path) -> None:
        """Raises a ValueError where `folder` holds none, or those of other layers or widths or another pooling."""
        if self.contrast is None:
            return
        path = Path(folder, PROJECTIONS)
        if not path.is_file():
            raise ValueError(f"{folder} holds no {PROJECTIONS}; LRC-BERT's checkpoints and general distillation do")
        given, wanted = load_file(path), self.contrast.state_dict()
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path} holds {len(given)} maps of {_widths(given)}, the matched layers ask for {len(wanted)} of "
                f"{_widths(wanted)}; use the student and the layers it was made with"
            )
        with safe_open(path, framework="pt") as file:
            made_for = file.metadata() or {}
        pairs, pooling = json.loads(made_for.get("layer_pairs", "null")), made_for.get("pooling")
        for name, made, asked in (("layer_pairs", pairs, self.pairs), ("pooling", pooling, self.contrast.pooling)):
            if made is not None and made != asked:
                raise ValueError(f"{path} was made with {name}={made}, here are {asked}; use the same")
        self.contrast.load_state_dict(given)


def _widths(maps: dict[str, Tensor]) -> str:
    """Of the first: all have the same."""
    return next((f"{m.shape[1]} to {m.shape[0]}" for m in maps.values()), "no width")


def match_layers(student, teacher, layer_pairs: list | None) -> list[tuple[int, int]]:
    """Pairs (teacher layer, student layer), from 0. Without a list each student layer m learns from the teacher's
    m · L_T / L_S, both counted from 1 and rounded down: 3, 6, 9 and 12 for four layers of twelve.

    Raises:
        ValueError, TypeError: a list of another form, a layer out of range, or no list for a student that is deeper
            than its teacher.
    """
    depths = {"teacher": len(layers_of(teacher)), "student": len(layers_of(student))}
    if layer_pairs is None:
        if depths["student"] > depths["teacher"]:
            raise ValueError(
                f"the student has {depths['student']} layers, its teacher {depths['teacher']}; say which learns from "
                "which: layer_pairs=[[teacher layer, student layer], ...]"
            )
        groups = contiguous_groups(depths["teacher"], depths["student"])
        return [(group[-1], layer) for layer, group in enumerate(groups)]
    if not layer_pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in layer_pairs):
        raise ValueError(
            f"layer_pairs={layer_pairs!r}: a list of [teacher layer, student layer] is needed, such as [[-1, -1]]"
        )
    sides = zip(("teacher", "student"), zip(*layer_pairs, strict=True), strict=True)
    resolved = [resolve_layers(layers, depths[side], f"layer_pairs, {side}") for side, layers in sides]
    return list(zip(*resolved, strict=True))


def sequence_ids(input_ids: Tensor, mask: Tensor) -> Tensor:
    """(B,) int64: equal for equal sequences of tokens, however they are padded; else different but for a chance of
    2⁻⁶⁰. The same on every process, so that a sentence that occurs twice is no negative of itself."""
    valid = mask != 0
    draw = torch.Generator().manual_seed(0)
    # A random odd factor for each position among the valid ones: multilinear hashing, in integers that wrap around.
    factors = torch.randint(-(2**62), 2**62, (input_ids.shape[1],), generator=draw).to(input_ids.device) * 2 + 1
    position = valid.cumsum(1) - valid.long()
    return ((input_ids.long() + 1) * factors[position]).masked_fill(~valid, 0).sum(1)
