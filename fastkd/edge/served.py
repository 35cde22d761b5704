"""A transformers model as it is served: from token ids to one row of numbers per text."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import cached_file

from fastkd.models.loading import load_model

TASKS = ("sequence-classification", "regression", "sentence-embedding")


@dataclass(frozen=True)
class Pooling:
    """How a sentence embedding comes out of the token vectors: "mean" over the tokens of the mask or "cls", the first
    token's; then scaled to length 1 where `normalize` is set."""

    mode: str = "mean"
    normalize: bool = False


class ServedModel(nn.Module):
    """input_ids, attention_mask and, where the model has them, token_type_ids, each (B, L) int64, to (B, labels) logits
    or (B, D) sentence embeddings, fp32.

    Args:
        model: with a sequence-classification head, or an encoder alone.
        pooling: of an encoder alone.

    Raises ValueError for a model with another head.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling = Pooling()):
        super().__init__()
        self.task = task_of(model.config, type(model).__name__)
        self.model, self.pooling = model.eval(), pooling
        self.inputs = input_names(model)
        self.max_length = longest_input(model)
        if self.task == "sentence-embedding":
            self.model.pooler = None  # a layer for next-sentence prediction, of which nothing here is read

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        if self.task != "sentence-embedding":
            return output.logits.float()
        tokens = output.last_hidden_state.float()
        if self.pooling.mode == "cls":
            pooled = tokens[:, 0]
        else:
            mask = attention_mask.to(tokens.dtype)
            pooled = (mask[:, None] @ tokens)[:, 0] / mask.sum(1, keepdim=True).clamp(min=1e-9)
        return F.normalize(pooled, dim=1) if self.pooling.normalize else pooled


def load_served(model: str | Path) -> ServedModel:
    """The model in a folder or on the hub, with its classification head, or pooled as its sentence-transformers files
    say (without them: the mean over the mask).

    Raises ValueError where there is no model, or one with another head, another pooling or further modules.
    """
    try:
        pooling = read_pooling(model)
    except OSError:  # no such folder and no hub id: load_model says so
        pooling = None
    if pooling is None:
        return ServedModel(load_model(model))
    # Such a folder may name the class that it was pretrained as, whose head it lacks.
    try:
        return ServedModel(AutoModel.from_pretrained(model), pooling)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={model} is no model that loads ({str(error).splitlines()[0]})") from error


def task_of(config: PretrainedConfig, name: str | None = None) -> str:
    """One of `TASKS`, by a model's class and its config. Raises ValueError for a class with another head."""
    name = name or (config.architectures or [None])[0]
    if name is not None and name.endswith("ForSequenceClassification"):
        regression = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
        return "regression" if regression else "sequence-classification"
    if name is None or name in _encoders():
        return "sentence-embedding"
    raise ValueError(
        f"a {name} is not exported; models with a sequence-classification or regression head are, and encoders alone, "
        "as sentence embeddings (AutoModel.from_pretrained(...).save_pretrained(...))"
    )


def read_pooling(model: str | Path) -> Pooling | None:
    """What modules.json of sentence-transformers says; None where the model has no such file."""
    found = _file(model, "modules.json")
    if found is None:
        return None
    mode, normalize = "mean", False
    for module in json.loads(found.read_text(encoding="utf-8")):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            mode = _mode(model, _file(model, f"{module['path']}/config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ValueError(f"model={model}: modules.json has a {kind}; Transformer, Pooling and Normalize are known")
    return Pooling(mode, normalize)


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Inputs in the order of the graph; token types only where there is more than one."""
    known = inspect.signature(model.forward).parameters
    typed = "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if typed else ()))


def longest_input(model: PreTrainedModel) -> int | None:
    """Tokens for which there are positions, special tokens included; None where no bound is known."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    if not tables:
        return getattr(model.config, "max_position_embeddings", None)
    # RoBERTa's kind counts positions from behind the padding token's row.
    return min(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables)


def _mode(model: str | Path, config: Path | None) -> str:
    if config is None:
        raise ValueError(f"model={model}: modules.json names a Pooling that has no config.json")
    given = json.loads(config.read_text(encoding="utf-8"))
    chosen = [given["pooling_mode"]] if "pooling_mode" in given else []
    chosen += [name.removeprefix("pooling_mode_") for name, on in given.items() if "pooling_mode_" in name and on]
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise ValueError(f"model={model}: it pools by {', '.join(chosen) or 'nothing'}; mean and cls are known")
    return known[chosen[0]]


def _file(model: str | Path, name: str) -> Path | None:
    found = cached_file(
        str(model), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _encoders() -> set[str]:
    names = MODEL_MAPPING_NAMES.values()
    return {name for each in names for name in ((each,) if isinstance(each, str) else each)}
