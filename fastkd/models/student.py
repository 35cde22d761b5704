"""Students: a smaller model of the teacher's own class."""

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fastkd.models.architectures import architecture_of, layers_of, resolve_layers


def contiguous_groups(num_teacher: int, num_student: int) -> list[list[int]]:
    """Teacher layers cut into one run per student layer, as even as possible: 6 into 4 is [0], [1, 2], [3], [4, 5]."""
    bounds = [i * num_teacher // num_student for i in range(num_student + 1)]
    return [list(range(first, last)) for first, last in itertools.pairwise(bounds)]


def create_student(
    teacher: PreTrainedModel,
    *,
    layers: int,
    hidden: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    init: str | Sequence[int] = "first",
    seed: int = 0,
) -> PreTrainedModel:
    """A new model of the teacher's class, head, labels, dtype and device, with fewer layers and possibly narrower.

    layers: number of layers.
    hidden, heads, ffn: width, attention heads, width of the feed-forward block; the teacher's by default, `ffn` in the
        teacher's proportion to `hidden`.
    init: "first" copies layers 0, 1, ...; "spaced" copies evenly spaced ones, the last included (1, 3, 5 of 6); a list
        copies exactly these; all three copy embeddings and head as well and need the teacher's widths. "random" copies
        nothing and draws every weight from `seed` without touching the global random state.

    The teacher stays as it is. Raises ValueError, before any work, on an unknown architecture, widths that do not fit
    together, a layer out of range, or more layers than the teacher has without init="random".
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: a transformers model is needed, got {type(teacher).__name__}")
    architecture = architecture_of(teacher.config)
    if not architecture.projections:
        raise ValueError(f"a student of a {teacher.config.model_type} is not made from its layers; see create_bilstm")
    teacher_layers = layers_of(teacher)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ValueError(f"layers={layers!r}: a student needs a whole number of layers, at least 1")
    chosen = _chosen_layers(init, layers, len(teacher_layers))
    config = _student_config(teacher.config, layers, hidden, heads, ffn, chosen)

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        student = type(teacher)(config)
    if getattr(teacher, "pooler", None) is None and hasattr(student, "pooler"):
        student.pooler = None  # a bare encoder built with add_pooling_layer=False
    student.to(device=teacher.device, dtype=teacher.dtype)

    if chosen is not None:
        copy_all_but_layers(teacher, student)
        for target, source in zip(layers_of(student), chosen, strict=True):
            _copy_layer(teacher_layers[source], target, architecture.droppable)
    return student.train(teacher.training)


def all_but_layers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state, by name, of embeddings, poolers, norms and heads: everything outside the layers."""
    layers = layers_of(model)
    [prefix] = [name for name, module in model.named_modules() if module is layers]
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}


def copy_all_but_layers(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy embeddings and head. Raises ValueError naming the first part that does not fit."""
    given, wanted = all_but_layers(source), all_but_layers(target)
    for name in sorted(given.keys() | wanted.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the one model and {shapes[1]} in the other: they must agree")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name])


def _chosen_layers(init: str | Sequence[int], layers: int, teacher_layers: int) -> list[int] | None:
    if init == "random":
        return None
    if isinstance(init, str) and init not in ("first", "spaced"):
        raise ValueError(f'init={init!r}: give "first", "spaced", "random" or a list of teacher layers')
    if not isinstance(init, str):
        chosen = resolve_layers(init, teacher_layers, "init")
        if len(chosen) != layers:
            raise ValueError(f"init={list(init)} names {len(chosen)} layers for a student of {layers}")
        return chosen
    if layers > teacher_layers:
        raise ValueError(f"layers={layers}: there are {teacher_layers} to copy; name fewer, or use init='random'")
    return (
        list(range(layers)) if init == "first" else [group[-1] for group in contiguous_groups(teacher_layers, layers)]
    )


def _student_config(
    teacher: PretrainedConfig,
    layers: int,
    hidden: int | None,
    heads: int | None,
    ffn: int | None,
    chosen: list[int] | None,
) -> PretrainedConfig:
    architecture = architecture_of(teacher)
    teacher_ffn = getattr(teacher, architecture.ffn)
    hidden = teacher.hidden_size if hidden is None else hidden
    heads = teacher.num_attention_heads if heads is None else heads
    ffn = round(teacher_ffn * hidden / teacher.hidden_size) if ffn is None else ffn
    for name, size in (("hidden", hidden), ("heads", heads), ("ffn", ffn)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r}: a positive whole number is needed")
    if hidden % heads:
        allowed = [n for n in range(1, hidden + 1) if hidden % n == 0 and n <= 64]
        raise ValueError(f"heads={heads} does not divide hidden={hidden}; possible: {', '.join(map(str, allowed))}")
    widths, teacher_widths = (hidden, heads, ffn), (teacher.hidden_size, teacher.num_attention_heads, teacher_ffn)
    if chosen is not None and widths != teacher_widths:
        raise ValueError(
            f"the student's (hidden, heads, ffn) = {widths} differ from the teacher's {teacher_widths}: its layers "
            "cannot be copied; use init='random'"
        )

    config = copy.deepcopy(teacher)
    config.__dict__.pop("quantization_config", None)  # of a teacher with a coded table: the student's is dense
    config.num_hidden_layers, config.num_attention_heads = layers, heads
    for field in ("hidden_size", *architecture.width):
        setattr(config, field, hidden)
    setattr(config, architecture.ffn, ffn)
    for field in architecture.per_layer:
        values = getattr(teacher, field)
        sources = chosen if chosen is not None else [i % len(values) for i in range(layers)]
        setattr(config, field, [values[i] for i in sources])
    return config


def _copy_layer(source: nn.Module, target: nn.Module, droppable: tuple[str, ...]) -> None:
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    strange = [name for name in (*missing, *unexpected) if name not in droppable]
    if strange:
        raise ValueError(f"a {type(source).__name__} cannot be copied: {', '.join(strange)} stand in one layer only")
