"""A classifier as a function of its embeddings: all that an explanation needs to know of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from fastkd.explain.arguments import as_ids, check_mask, check_type, check_whole

BASELINES = ("zero", "mask")
# With labels the model would compute a loss too; words are for those who sum over them (fastkd.explain.align).
_NOT_FOR_THE_MODEL = ("labels", "words", "word_mask")

Inputs = Mapping[str, Tensor]


class _Embedded(Exception):
    """Ends a forward whose embeddings are all that is wanted. Private: it never leaves `Classifier.embed`."""


class Draws:
    """The random generators as they are now, on the CPU and on `device`: with `replay` what follows draws the same
    dropout again."""

    def __init__(self, device: torch.device):
        self._device, self._cpu = device, torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def replay(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """What runs within draws the same dropout again; what comes after draws as if it had not run."""
        with torch.random.fork_rng(devices=[self._device] if self._cuda is not None else []):
            self.replay()
            yield


@dataclass
class Watched:
    """What a watched forward let through: `embeddings` (B, L, D) in its graph, the draws that came `before` them, which
    are those of their own dropout, and the `draws` that came after."""

    embeddings: Tensor | None = None
    draws: Draws | None = None
    before: Draws | None = None


class Classifier:
    """A model f as logits of its embeddings, z = f(e), e of shape (B, L, D).

        Classifier(model)                                    # e: the word embeddings
        Classifier(model, fastkd.models.embeddings_of(model), mask_id=103, special_ids=[0, 101, 102])
                                                             # e: what the first layer works on

    Where the inputs of a call hold `inputs_embeds` in the place of `input_ids`, e is that; `model` may then be any
    function, also a compiled one. Otherwise e is tapped: the output of the module `embeddings`, in whose place other
    vectors are given, so that positions, types and masks come from the ids as they always do.

    Args:
        model: gives logits (B, C), or an output with such `logits`. It runs in the mode and under the autocast that
            it is in: for a teacher that is `eval()`. Not a wrapper for data parallel: what is inside.
        embeddings: a module of `model` that runs once in each forward and gives (B, L, D). By default the module that
            `model.get_input_embeddings()` names.
        mask_id: the id of [MASK], for the baseline of that name.
        special_ids: ids that are never masked and never selected, such as [CLS], [SEP] and padding.

    Raises:
        TypeError: `model` cannot be called, `embeddings` is no module, or `special_ids` are no ids.
        ValueError: `embeddings` is no module of `model`, or `model` is compiled: its hooks would be skipped.
    """

    def __init__(
        self,
        model: Callable,
        embeddings: nn.Module | None = None,
        *,
        mask_id: int | None = None,
        special_ids: Iterable[int] = (),
    ):
        if not callable(model):
            raise TypeError(f"model is of type {type(model).__name__}; a model or another function is needed")
        if embeddings is not None:
            check_type("embeddings", embeddings, nn.Module)
        if mask_id is not None:
            check_whole("mask_id", mask_id, 0)
        self.model, self.mask_id, self.special_ids = model, mask_id, as_ids(special_ids)
        self._embeddings = word_embeddings(model) if embeddings is None else embeddings
        if self._embeddings is not None and isinstance(model, nn.Module):
            modules = dict(model.named_modules())
            if not any(module is self._embeddings for module in modules.values()):
                raise ValueError(f"embeddings={type(embeddings).__name__} is no module of {type(model).__name__}")
            if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules.values()):
                raise ValueError(
                    f"{type(model).__name__} is compiled: compiled code skips hooks, by which embeddings are tapped. "
                    "Explain the model that was compiled, or give inputs_embeds and Classifier(lambda **inputs: ...)"
                )

    def embed(self, inputs: Inputs) -> Tensor:
        """e (B, L, D) in its graph; nothing above the embeddings runs.

        Raises:
            TypeError, ValueError: for inputs, as `valid_tokens`.
            ValueError: the model offers no embeddings, takes no `inputs_embeds`, or gives vectors of another shape.
            RuntimeError: the embeddings did not run.
        """
        _check_inputs(inputs)
        if "inputs_embeds" in inputs:
            return check_embeddings(inputs["inputs_embeds"], inputs)

        def stop(module, args, output):
            raise _Embedded(output)

        handle = self._module().register_forward_hook(stop)
        try:
            self._run(inputs)
        except _Embedded as stopped:
            return check_embeddings(stopped.args[0], inputs)
        finally:
            handle.remove()
        raise RuntimeError(self._ran(0))

    def logits(self, inputs: Inputs, embeddings: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """z (B, C): the logits of the inputs, or of `embeddings` (B, L, D) in the place of theirs. Dropout above the
        embeddings is drawn anew, or as in `draws`. Raises as `embed`."""
        _check_inputs(inputs)
        if embeddings is None:
            return self._logits(inputs)
        if "inputs_embeds" in inputs:
            if draws is not None:
                draws.replay()
            return self._logits({**inputs, "inputs_embeds": embeddings})
        runs = 0

        def exchanged(*args, **kwargs):
            nonlocal runs
            runs += 1
            if draws is not None:
                draws.replay()
            return embeddings

        # A hook would let the module run for nothing.
        with _forward_of(self._module(), exchanged):
            logits = self._logits(inputs)
        if runs != 1:
            raise RuntimeError(self._ran(runs))
        return logits

    @contextmanager
    def watch(self) -> Iterator[Watched]:
        """Within, one forward of the model leaves its embeddings and the dropout drawn above them in what is given: a
        training step's own forward serves its explanation too. The forward may run through a wrapper of the model."""
        seen = Watched()

        def look(module, args, output):
            if seen.embeddings is not None:
                raise RuntimeError(self._ran(2))
            # A leaf was cut off from frozen embeddings by us, to have a gradient at all.
            seen.embeddings = output if output.requires_grad else output.detach().requires_grad_()
            seen.draws = Draws(output.device)
            return seen.embeddings

        def before(module, args):
            seen.before = Draws(next(chain(module.parameters(), module.buffers())).device)

        module = self._module()
        handles = module.register_forward_pre_hook(before), module.register_forward_hook(look)
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def maskable(self, inputs: Inputs) -> Tensor:
        """(B, L) bool: the tokens that a perturbation may take away, neither padding nor special."""
        return maskable_tokens(inputs, self.special_ids)

    def baseline(self, inputs: Inputs, kind: str, like: Tensor, draws: Draws | None = None) -> Tensor:
        """e₀ (B, L, D) that stands for no information: "zero", or "mask": the embeddings of the sequence with [MASK] in
        the place of each token that is not special. `like` are the embeddings of `inputs`; `draws` those of their
        dropout, which e₀ then has too: else their difference would be dropout, at special tokens nothing else."""
        if kind not in BASELINES:
            raise ValueError(f"baseline={kind!r}; allowed are {', '.join(BASELINES)}")
        if kind == "zero":
            return torch.zeros_like(like)
        if self.mask_id is None or "input_ids" not in inputs:
            missing = "input_ids" if self.mask_id is not None else "a mask_id: Classifier(..., mask_id=...)"
            raise ValueError(f"baseline='mask' needs {missing}; baseline='zero' does not")
        ids = inputs["input_ids"].masked_fill(self.maskable(inputs), self.mask_id)
        with nullcontext() if draws is None else draws.again():
            return self.embed({**inputs, "input_ids": ids})

    def _module(self) -> nn.Module:
        if self._embeddings is None:
            raise ValueError(
                f"{getattr(self.model, '__name__', type(self.model).__name__)} offers no embeddings: it has no "
                "get_input_embeddings(). Name the module that makes them, Classifier(model, embeddings), or give "
                "inputs_embeds in the place of input_ids"
            )
        return self._embeddings

    def _logits(self, inputs: Inputs) -> Tensor:
        output = self._run(inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None or logits.dim() != 2:
            found = f"an output of type {type(output).__name__}" if logits is None else f"shape {tuple(logits.shape)}"
            raise ValueError(f"the model gives {found}; a classifier's logits (B, C) are needed")
        return logits

    def _run(self, inputs: Inputs):
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        if "inputs_embeds" in inputs and not _takes_embeddings(self.model):
            raise ValueError(
                f"{type(self.model).__name__} offers no embeddings: its forward takes no inputs_embeds. Give input_ids "
                "and the module that embeds them: Classifier(model, embeddings)"
            )
        return self.model(**inputs)

    def _ran(self, times: int) -> str:
        return (
            f"the embeddings ({type(self._embeddings).__name__}) ran {times} times in one forward; a module is needed "
            "that runs once and that no torch.compile hides"
        )


def valid_tokens(inputs: Inputs) -> Tensor:
    """(B, L) bool: the tokens that are no padding.

    Raises TypeError for inputs that are no mapping of tensors, ValueError where they lack input_ids and inputs_embeds
    or have other shapes.
    """
    given = _check_inputs(inputs)
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"] != 0
    return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)


def maskable_tokens(inputs: Inputs, special_ids: Iterable[int]) -> Tensor:
    """(B, L) bool: the tokens that are neither padding nor one of `special_ids`."""
    valid = valid_tokens(inputs)
    if "input_ids" not in inputs:
        return valid
    for special in as_ids(special_ids):
        valid = valid & (inputs["input_ids"] != special)
    return valid


def rows_of(inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    """The inputs of these examples, (R,) indices, each as often as it is named."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within, the module runs this."""
    own = vars(module).get("forward")  # of the instance, as accelerate leaves one
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def word_embeddings(model) -> nn.Module | None:
    """The module that `model.get_input_embeddings()` names, if there is one."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _takes_embeddings(model: Callable) -> bool:
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):  # a callable that tells nothing about itself
        return True
    return "inputs_embeds" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_embeddings(embeddings: Tensor, inputs: Inputs) -> Tensor:
    """They, if they are (B, L, D) for these inputs; else a ValueError."""
    expected = valid_tokens(inputs).shape
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 3 or embeddings.shape[:2] != expected:
        found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"the embeddings are {found}; a vector for each token is needed, {(*expected, 'D')}")
    return embeddings


def _check_inputs(inputs: Inputs) -> Tensor:
    """input_ids (B, L) or inputs_embeds (B, L, D), whichever is given; errors as `valid_tokens`."""
    needed = "input_ids (B, L) or inputs_embeds (B, L, D)"
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs is of type {type(inputs).__name__}; a mapping with {needed} is needed")
    for name, dimensions in (("inputs_embeds", 3), ("input_ids", 2)):
        if name in inputs:
            check_type(name, inputs[name], Tensor, ': tokenizer(..., return_tensors="pt")')
            if inputs[name].dim() != dimensions:
                raise ValueError(f"{name} is {tuple(inputs[name].shape)}; {needed} is needed")
            if inputs.get("attention_mask") is not None:
                check_mask("attention_mask", inputs["attention_mask"], inputs[name].shape[:2])
            return inputs[name]
    raise ValueError(f"inputs holds {', '.join(map(str, inputs)) or 'nothing'}; {needed} is needed")
