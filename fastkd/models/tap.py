"""Taps: query, key and value projections and hidden states, taken from the forward that runs anyway.

Forward hooks on the linear maps see each projection before the split into heads and before any rotary embedding, so
attention itself stays what it was (SDPA, flash) and nothing is computed twice.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastkd.models.architectures import find_encoder, layers_of, projections_of, resolve_layers

_PROJECTIONS = ("query", "key", "value")
_KINDS = (*_PROJECTIONS, "hidden")


class _Stop(Exception):
    """Ends a tapped forward. Private: it never leaves the model that was given to `tap`."""


class Taps:
    """What one forward let through: `taps[layer]["query"]` is a (B, L, D) tensor in the dtype the model ran in.

    The tensors belong to the running graph and stay available after the block; each forward inside it replaces them.
    """

    def __init__(self, layers: Sequence[int], what: Sequence[str], num_layers: int):
        self.layers = tuple(layers)
        self.what = tuple(what)
        self._num_layers = num_layers
        self._captured: dict[int, dict[str, Tensor]] = {}
        self._forwards = 0
        self._running = False
        self._grad_mode = False

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        [number] = resolve_layers([layer], self._num_layers)
        if number not in self.layers:
            raise ValueError(f"layer {layer} is not tapped; tapped layers: {list(self.layers)}")
        if not self._forwards:
            raise RuntimeError(
                "nothing was captured: no forward of the tapped model ran inside the block, or it ran inside a "
                "function compiled by torch.compile, which skips the hooks"
            )
        missing = [what for what in self.what if what not in self._captured.get(number, {})]
        if missing:
            raise RuntimeError(
                f"layer {number} captured no {', '.join(missing)}: the forward ended before reaching it, "
                "or its layers do not run through their modules (a compiled or replaced layer)"
            )
        return dict(self._captured[number])

    def as_dict(self) -> dict[int, dict[str, Tensor]]:
        """{layer: {"query": tensor, ...}} of all tapped layers."""
        return {layer: self[layer] for layer in self.layers}

    def _begin(self, *_) -> None:
        self._captured = {layer: {} for layer in self.layers}
        self._forwards += 1
        self._running, self._grad_mode = True, torch.is_grad_enabled()

    def _end(self, *_) -> None:
        self._running = False

    def _capture(self, layer: int, tensors: dict[str, Tensor]) -> None:
        # Outside a forward of the encoder a layer runs only when backward recomputes a checkpointed one. Inside, the
        # first call counts: DeBERTa with shared keys sends its table of positions through the same linear map.
        if not self._running:
            return
        if self._grad_mode and not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {layer} runs without gradient inside a forward that has one: reentrant gradient checkpointing. "
                "Tapped tensors would be constants; use use_reentrant=False"
            )
        for what, tensor in tensors.items():
            self._captured[layer].setdefault(what, tensor)

    def _complete(self) -> bool:
        return self._running and all(len(tensors) == len(self.what) for tensors in self._captured.values())


@contextmanager
def tap(
    model: nn.Module,
    layers: Sequence[int],
    what: Sequence[str] = ("query", "key", "value"),
    stop_after: bool = False,
) -> Iterator[Taps]:
    """Collect raw projections and hidden states of named layers from the forwards that run inside the block.

        with fastkd.tap(teacher, [-1], stop_after=True) as teacher_taps, torch.no_grad():
            teacher(**inputs)
        with fastkd.tap(student, [-1]) as student_taps:
            loss = student(**inputs).loss
        fastkd.relation_kl(student_taps[-1]["query"], teacher_taps[-1]["query"], num_heads=12, mask=mask)

    model: an encoder of a supported architecture with any head or none, also inside DDP or a sentence encoder.
    layers: layer numbers from 0, negative ones from the end.
    what: any of "query", "key", "value" (outputs of the linear maps, (B, L, D)) and "hidden" (output of the layer,
        (B, L, D), before a norm or convolution that the encoder itself applies behind the layer).
    stop_after: end the forward right after the last tensor that is needed; nothing above it runs, and the call of
        `model` returns the captured tensors, {layer: {"query": ..., ...}}, in place of its usual output. From them DDP
        with `find_unused_parameters=True` learns which parameters take part; each must then reach the loss.

    Gradients flow through the captured tensors; non-reentrant gradient checkpointing is fine (the layer at which the
    forward stops is not checkpointed: it holds nothing but its projections).

    Raises ValueError for an unknown architecture, layer or kind, for a compiled model (it would capture nothing,
    silently) and for DataParallel (replicas share hooks); RuntimeError on a reentrant checkpoint, or when reading taps
    that captured nothing.
    """
    encoder, all_layers = find_encoder(model), layers_of(model)
    numbers = sorted(set(resolve_layers(layers, len(all_layers))))
    _check(model, numbers, what, stop_after)
    taps = Taps(numbers, what, len(all_layers))

    with ExitStack() as undo:
        undo.callback(encoder.register_forward_pre_hook(taps._begin).remove)
        for number in numbers:
            for module, tensors_of in _sources(model, all_layers[number], taps.what):
                hook = _capture_hook(taps, number, tensors_of, stop_after)
                undo.callback(module.register_forward_hook(hook).remove)
        undo.callback(encoder.register_forward_hook(taps._end, always_call=True).remove)
        if stop_after:
            undo.callback(_checkpointing_off(all_layers[numbers[-1]]))
            undo.callback(_catch_stop(model, taps))
        yield taps


def _check(model: nn.Module, numbers: list[int], what: Sequence[str], stop_after: bool) -> None:
    if not numbers:
        raise ValueError("layers=[]: name at least one layer")
    if isinstance(what, str) or not what or not set(what) <= set(_KINDS) or len(set(what)) != len(what):
        raise ValueError(f"what={what!r}: give a tuple of {', '.join(map(repr, _KINDS))}, each at most once")
    if isinstance(model, DataParallel):
        raise ValueError("DataParallel runs replicas that share hooks: start one process per GPU with torchrun instead")
    for name, module in model.named_modules():
        # `_orig_mod` is what torch.compile(module) leaves, `_compiled_call_impl` what module.compile() leaves.
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or type(model).__name__} is compiled: compiled code skips hooks and would capture nothing. "
                "Tap the model before torch.compile, and compile the rest of the step if wanted"
            )
        if stop_after and (hasattr(module, "_get_fsdp_state") or "_fsdp_wrapped_module" in module._modules):
            raise ValueError("stop_after=True skips the hooks by which FSDP frees its parameters; use stop_after=False")


def _sources(model: nn.Module, layer: nn.Module, what: tuple[str, ...]):
    """Pairs (module to hook, function from its output to {kind: tensor})."""
    modules = projections_of(model, layer)
    wanted = [kind for kind in _PROJECTIONS if kind in what]
    if modules["query"] is modules["key"]:  # fused: one output, three equal parts side by side

        def split(output):
            parts = dict(zip(_PROJECTIONS, output.chunk(3, dim=-1), strict=True))
            return {kind: parts[kind] for kind in wanted}

        if wanted:
            yield modules["query"], split
    else:
        for kind in wanted:
            yield modules[kind], lambda output, kind=kind: {kind: output}
    if "hidden" in what:
        yield layer, lambda output: {"hidden": output[0] if isinstance(output, tuple) else output}


def _capture_hook(taps: Taps, number: int, tensors_of, stop_after: bool):
    def hook(module, args, output):
        taps._capture(number, tensors_of(output))
        if stop_after and taps._complete():
            raise _Stop(taps)

    return hook


def _checkpointing_off(layer: nn.Module):
    """Stop inside a checkpointed region would leave its bookkeeping half done."""
    if not getattr(layer, "gradient_checkpointing", False):
        return lambda: None
    layer.gradient_checkpointing = False
    return functools.partial(setattr, layer, "gradient_checkpointing", True)


def _catch_stop(model: nn.Module, taps: Taps):
    """Let the call of `model` return the taps when the forward was ended. Returns the function that undoes it."""
    while isinstance(model, DistributedDataParallel):  # its own forward must go on to its end
        model = model.module
    own_forward = vars(model).get("forward")  # accelerate leaves one on the instance
    forward = model.forward

    @functools.wraps(forward)
    def stopping_forward(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except _Stop as stop:
            if stop.args[0] is not taps:
                raise
        return taps.as_dict()

    model.forward = stopping_forward

    def restore():
        if own_forward is None:
            del model.forward
        else:
            model.forward = own_forward

    return restore
