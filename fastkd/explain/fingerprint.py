"""What stored results belong to: a teacher's weights, a tokenizer, data, and the settings they were computed with."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Fingerprint:
    """Digests of what a result depends on. Equal parts have equal digests, on every machine.

    Attributes:
        teacher: of the weights, by `of_weights`.
        tokenizer: of the tokenizer, by `of_tokenizer`.
        data: of the tokenized examples in their order, by `of_data`.
        settings: what was computed and how, as JSON values; compared by value, so that a message can name the key.
    """

    teacher: str
    tokenizer: str
    data: str
    settings: dict[str, Any]

    @staticmethod
    def of(teacher: nn.Module | str | Path | None, tokenizer, data, settings: Mapping[str, Any]) -> Fingerprint:
        """teacher: the model, or the folder it was saved to: both have one fingerprint, and of a folder only the bytes
        are read; None is one that is still to come. tokenizer: one of transformers. data: rows with `COLUMNS`, a
        datasets.Dataset or mapping of lists."""
        plain = json.loads(json.dumps(dict(settings), sort_keys=True))
        weights = "" if teacher is None else of_weights(teacher)
        return Fingerprint(weights, of_tokenizer(tokenizer), of_data(data), plain)

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
        words = {"teacher": "the teacher (its weights)", "tokenizer": "the tokenizer", "data": "the data"}
        found = [
            f"{words[field.name]}: {getattr(self, field.name)[:12]} is stored, {getattr(other, field.name)[:12]} given"
            for field in fields(self)
            if field.name in words and getattr(other, field.name) not in ("", getattr(self, field.name))
        ]
        for key in sorted(other.settings):
            pair = [part.settings.get(key, "nothing") for part in (self, other)]
            if pair[0] != pair[1]:
                found.append(f"{key}: {pair[0]} is stored, {pair[1]} given")
        return found

    def check(self, expected: Fingerprint, path) -> None:
        """Raise a ValueError where this is not what the file at `path` should belong to."""
        if differences := self.differences(expected):
            raise ValueError(
                f"{path} belongs to something else; {'; '.join(differences)}. Delete it to have it computed anew"
            )


def of_weights(teacher: nn.Module | str | Path) -> str:
    """Digest of names, dtypes, shapes and bytes of all tensors. A model has that of the folder it was saved to by
    `save_pretrained`, as long as no two of its parameters are tied.

    Raises ValueError for a folder without safetensors files.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_named(teacher), key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def of_tokenizer(tokenizer) -> str:
    """Digest of the vocabulary, of the special tokens, and of the whole pipeline of a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {"vocabulary": tokenizer.get_vocab(), "special": sorted(tokenizer.all_special_tokens)}
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


def _named(teacher: nn.Module | str | Path):
    if isinstance(teacher, nn.Module):
        yield from teacher.state_dict().items()
        return
    files = sorted(Path(teacher).expanduser().glob("*.safetensors"))
    if not files:
        raise ValueError(f"{teacher} holds no safetensors files; save the teacher there with save_pretrained")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
