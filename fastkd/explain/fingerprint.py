"""What stored results belong to: a teacher's weights, a tokenizer, data, and the settings they were computed with."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.auto.modeling_auto  # noqa: F401  (AutoConfig knows fastkd's own students once this is there)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
_SHOWN = 12  # characters of a digest
# What makes another function of the same tensors. Not the whole configuration, whose defaults change with transformers.
_BESIDE_WEIGHTS = (
    "model_type", "num_attention_heads", "pad_token_id", "hidden_act", "activation", "hidden_activation",
    "layer_norm_eps", "norm_eps", "position_embedding_type", "position_buckets", "max_relative_positions",
    "relative_attention", "pos_att_type", "share_att_key", "local_attention", "layer_types", "rope_parameters",
)  # fmt: skip
_NOTHING = "nothing"


@dataclass(frozen=True)
class Fingerprint:
    """Digests of what a result depends on. Equal parts have equal digests, on every machine.

    Attributes:
        teacher: of the weights and what gives them their meaning, by `of_teacher`.
        tokenizer: of the tokenizer, by `of_tokenizer`.
        data: of the tokenized examples in their order, by `of_data`.
        settings: what was computed and how, as JSON values; compared by value, so that a message can name the key.
        examples, longest: how many examples the data has, and the tokens of the longest: words for a message, compared
            by the digest. None where they are not known.
    """

    teacher: str
    tokenizer: str
    data: str
    settings: dict[str, Any]
    examples: int | None = None
    longest: int | None = None

    @staticmethod
    def of(teacher: nn.Module | str | Path | None, tokenizer, data, settings: Mapping[str, Any]) -> Fingerprint:
        """teacher: the model, or the folder it was saved to: both have one fingerprint, and no model is made of a
        folder; None is one that is still to come. tokenizer: one of transformers. data: rows with `COLUMNS`, a
        datasets.Dataset or mapping of lists.

        Raises TypeError for settings that are no JSON values, ValueError as `of_teacher` and `of_data`."""
        try:
            plain = json.loads(json.dumps(dict(settings), sort_keys=True))
        except TypeError as error:
            raise TypeError(f"settings of a fingerprint must be JSON values: {error}") from error
        weights = "" if teacher is None else of_teacher(teacher)
        digest = of_data(data)
        lengths = [len(ids) for ids in data["input_ids"][:]]
        return Fingerprint(weights, of_tokenizer(tokenizer), digest, plain, len(lengths), max(lengths, default=0))

    def as_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Fingerprint:
        """Raises ValueError for a text that is no fingerprint."""
        try:
            return Fingerprint(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"no fingerprint: {error}") from error

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, in words; empty for equal ones. `self` is the stored one, whose settings may say more; an
        `other` of a teacher that is still to come agrees with any."""
        found = []
        for words, name in (("the teacher (its weights or configuration)", "teacher"), ("the tokenizer", "tokenizer")):
            pair = getattr(self, name), getattr(other, name)
            if pair[1] not in ("", pair[0]):
                found.append(f"{words}: {pair[0][:_SHOWN]} is stored, {pair[1][:_SHOWN]} given")
        if self.data != other.data:
            found.append(f"the data: {_data_words(self, other)}")
        for key in sorted(other.settings):
            found += _changed(self.settings.get(key, _NOTHING), other.settings[key], key)
        return found

    def check(self, expected: Fingerprint, path, advice: str = "Delete it, or name another file") -> None:
        """Raise a ValueError where this is not what the file at `path` should belong to."""
        if differences := self.differences(expected):
            raise ValueError(f"{path} belongs to something else; {'; '.join(differences)}. {advice}")


def of_teacher(teacher: nn.Module | str | Path) -> str:
    """Digest of the weights, and of what a configuration of transformers says of their function beside them. A model
    has that of the folder it was saved to by `save_pretrained`.

    Raises ValueError as `of_weights`, and for a folder whose configuration transformers does not know.
    """
    digest = of_weights(teacher)
    if (config := _configuration(teacher)) is None:
        return digest
    beside = {name: getattr(config, name, None) for name in _BESIDE_WEIGHTS}
    return hashlib.sha256(json.dumps([digest, beside], default=str).encode()).hexdigest()


def of_weights(teacher: nn.Module | str | Path) -> str:
    """Digest of names, dtypes, shapes and bytes of all tensors. A model has that of the folder it was saved to by
    `save_pretrained`, as long as no two of its parameters are tied.

    Raises ValueError for a folder without safetensors files, and for what is no folder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_named(teacher), key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def of_tokenizer(tokenizer) -> str:
    """Digest of the vocabulary, of the special tokens by role, and of the whole pipeline of a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    parts = {"vocabulary": tokenizer.get_vocab(), "special": sorted(tokenizer.all_special_tokens), "roles": roles}
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        # Set by the last call with padding or truncation: the data's digest knows what came of it.
        parts["pipeline"] = {name: part for name, part in pipeline.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def of_data(data) -> str:
    """Digest of those of `COLUMNS` that the data has: lists of token ids (or masks), one for each example.

    Raises ValueError for data without input_ids.
    """
    names = getattr(data, "column_names", None) or list(data)
    if "input_ids" not in names:
        raise ValueError(f"the data has the columns {', '.join(names)}; tokenized data with input_ids is needed")
    digest = hashlib.sha256()
    for name in COLUMNS:
        if name not in names:
            continue
        rows = data[name][:]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        flat = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        for part in (name.encode(), lengths.tobytes(), flat.tobytes()):
            digest.update(part)
    return digest.hexdigest()


def of_batches(batches: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the tensors of padded batches, in their order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def _data_words(stored: Fingerprint, given: Fingerprint) -> str:
    """How the data of both, which is not the same, differs."""
    digests = stored.data[:_SHOWN], given.data[:_SHOWN]
    if None in (stored.examples, given.examples):
        return "{} is stored, {} given".format(*digests)
    sizes = [f"{part.examples} examples of at most {part.longest} tokens" for part in (stored, given)]
    if sizes[0] != sizes[1]:
        return "{} are stored, {} given (digests {} and {})".format(*sizes, *digests)
    return "both have {}, but other ones or another order ({} is stored, {} given)".format(sizes[0], *digests)


def _changed(stored, given, key: str) -> Iterator[str]:
    """What differs of two settings, by the whole path of its key."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in sorted({**stored, **given}):
            yield from _changed(stored.get(name, _NOTHING), given.get(name, _NOTHING), f"{key}.{name}")
    elif stored != given:
        yield f"{key}: {stored} is stored, {given} given"


def _named(teacher: nn.Module | str | Path):
    if isinstance(teacher, nn.Module):
        yield from teacher.state_dict().items()
        return
    if not Path(teacher).expanduser().is_dir():
        raise ValueError(f"there is no folder {teacher}; name the one that the teacher was saved to")
    files = sorted(Path(teacher).expanduser().glob("*.safetensors"))
    if not files:
        raise ValueError(f"{teacher} holds no safetensors files; save the teacher there with save_pretrained")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _configuration(teacher: nn.Module | str | Path) -> PreTrainedConfig | None:
    if isinstance(teacher, nn.Module):
        return getattr(teacher, "config", None)
    folder = Path(teacher).expanduser()
    return AutoConfig.from_pretrained(folder) if (folder / CONFIG_NAME).exists() else None


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
