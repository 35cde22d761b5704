"""From a served model to a torch.export program in standard operators, with a dynamic batch and length."""

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask

from fastkd.edge.lookup import use_lookups
from fastkd.edge.served import ServedModel

_OURS = "fastkd_export"
_EXAMPLE = (2, 7)  # neither may be 0 or 1, which torch.export takes for fixed


def padding_mask(mask_function=bidirectional_mask_function, attention_mask=None, dtype=torch.float32, **shape):
    """(B, 1, 1, L), 0 where there is a token and the smallest number elsewhere, built once for all layers.

    The masks of transformers have a row per query (B, 1, L, L), and are put together by a dozen operators.
    """
    if attention_mask is None or mask_function is not bidirectional_mask_function:
        return eager_mask(mask_function=mask_function, attention_mask=attention_mask, dtype=dtype, **shape)
    return (1 - attention_mask.to(dtype))[:, None, None] * torch.finfo(dtype).min


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling=None, **_):
    """Attention written out. That of torch (SDPA) is decomposed with a Where and an IsNaN over all scores per layer,
    for rows without any token."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(_OURS, attention)
AttentionMaskInterface.register(_OURS, padding_mask)


def capture(
    served: ServedModel, *, int8: bool, at_load: bool, largest: tuple[int | None, int | None] = (None, None)
) -> ExportedProgram:
    """The program of a copy of `served`; int8 and at_load are those of `use_lookups`. largest: the batch and length
    that a format plans its memory for; None where any may come.

    Raises ValueError, naming the module, where the model cannot be captured.
    """
    ready = copy.deepcopy(served)
    use_lookups(ready.model, int8=int8, at_load=at_load)
    for module in ready.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = _OURS
    ready.requires_grad_(False)
    ids = torch.full(_EXAMPLE, 5)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    both = {place: Dim.DYNAMIC(min=1, max=most) if most else Dim.DYNAMIC for place, most in enumerate(largest)}
    names = served.inputs
    with _innermost_module(ready) as inside, quiet():
        try:
            program = torch.export.export(
                ready, tuple(example[name] for name in names), dynamic_shapes={name: both for name in names}
            )
        except Exception as error:  # torch raises many kinds here
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"the model does not export: in {inside()}: {what}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which the file would carry along
    return program


def does_not_export(program: ExportedProgram, error: Exception) -> ValueError:
    """The error that names the operator which a format does not have, and the module that it came from."""
    chain = []
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    found = re.search(r"target=torch\.ops\.([\w.]+)|op='(\w+\.\w+)'", "\n".join(chain))
    if found is None:
        return ValueError(f"the model does not export: {chain[-1].strip().splitlines()[0]}")
    operator = next(filter(None, found.groups()))
    # An exporter may name what the program's operator was made into: prims.bessel_j0 of aten.special_bessel_j0.
    name = operator.split(".")[1]
    for node in program.graph.nodes:
        if name in str(node.target) and node.meta.get("nn_module_stack"):
            path, kind = list(node.meta["nn_module_stack"].values())[-1]
            return ValueError(f"the operator {operator} does not export; it comes from {_described(path, kind)}")
    return ValueError(f"the operator {operator} does not export")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _innermost_module(model: nn.Module):
    """Yields a function that names the module which is running, or in which an exception was raised."""
    running: list[tuple[str, nn.Module]] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _, name=name: running.append((name, module))))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield lambda: _described(running[-1][0], type(running[-1][1])) if running else "the model"
    finally:
        for hook in hooks:
            hook.remove()


def _described(path: str, kind: type | str) -> str:
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path.removeprefix('model.') or 'the model'} ({kind.rsplit('.', 1)[-1]})"
