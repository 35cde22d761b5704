"""What a tokenizer says about the rows of its model's embedding table: how often each token occurs in a data set, and
which tokens continue a word."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.utils import tqdm  # silent where transformers' and datasets' progress bars are
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_TEXTS_AT_ONCE = 2000  # enough for the tokenizer's own threads, one batch at a time: nothing is kept


def count_tokens(
    dataset: Dataset | IterableDataset,
    tokenizer,
    *,
    text_columns: Sequence[str] | None = None,
    max_length: int | None = None,
    num_embeddings: int | None = None,
) -> Tensor:
    """(V,) int64: how often each token occurs in `dataset` as the model reads it, special tokens included, no padding.

    One pass, a batch in memory at a time, so that streamed data sets of any size will do; a fast tokenizer encodes a
    batch on all cores (`TOKENIZERS_PARALLELISM`). Counts of several data sets are added with `+`.

    Args:
        dataset: rows with one text, or a pair of texts that the model reads as one sequence.
        tokenizer: the model's own, of transformers.
        text_columns: one column, or the two of a pair; by default all columns of strings.
        max_length: longer examples are cut to so many tokens, as in training; by default the model's own limit.
        num_embeddings: V, rows of the model's table where it has more than the tokenizer has tokens.

    Raises ValueError on a missing column, more than two, none of strings, a row without text, an empty data set, and a
    table smaller than the tokenizer's vocabulary.
    """
    vocabulary = len(tokenizer)
    if num_embeddings is not None and num_embeddings < vocabulary:
        raise ValueError(f"num_embeddings={num_embeddings}, but the tokenizer has {vocabulary} tokens")
    if max_length is not None and not 0 < max_length <= tokenizer.model_max_length:
        raise ValueError(f"max_length={max_length}; allowed are 1 to {tokenizer.model_max_length}, the model's limit")
    columns = _text_columns(dataset, text_columns)
    counts = np.zeros(num_embeddings or vocabulary, dtype=np.int64)
    rows = 0
    with tqdm(total=getattr(dataset, "num_rows", None), desc="count tokens", unit=" rows", delay=1) as progress:
        for batch in dataset.iter(_TEXTS_AT_ONCE):
            texts = [batch[column] for column in columns]
            for column, values in zip(columns, texts, strict=True):
                if None in values:
                    raise ValueError(f"row {rows + values.index(None)} has no {column}")
            encoded = tokenizer(
                *texts,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            counts += np.bincount(np.concatenate(encoded["input_ids"]).astype(np.int64), minlength=len(counts))
            rows += len(texts[0])
            progress.update(len(texts[0]))
    if not rows:
        raise ValueError("the data set is empty: there is nothing to count")
    return torch.from_numpy(counts)


def save_counts(path: str | os.PathLike, counts: Tensor, tokenizer) -> None:
    """Write counts to a safetensors file together with the fingerprint of the tokenizer they were made with."""
    if counts.ndim != 1 or len(counts) < len(tokenizer):
        raise ValueError(f"counts has shape {tuple(counts.shape)}, the tokenizer has {len(tokenizer)} tokens")
    save_file({"counts": counts.to(torch.int64)}, path, metadata={"tokenizer": fingerprint(tokenizer)})


def load_counts(
    paths: str | os.PathLike | Iterable[str | os.PathLike], tokenizer, *, num_embeddings: int | None = None
) -> Tensor:
    """(V,) int64: the counts of one file, or of several added up.

    Raises ValueError on counts made with another tokenizer, of another length than `num_embeddings` (the tokenizer's
    tokens by default), a file that holds no counts, and an empty list; FileNotFoundError on a missing file.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise ValueError("no file of counts was given")
    expected, length = fingerprint(tokenizer), num_embeddings or len(tokenizer)
    total = torch.zeros(length, dtype=torch.int64)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                made_with = (file.metadata() or {}).get("tokenizer")
                counts = file.get_tensor("counts") if "counts" in file.keys() else None
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file, or not all of one: {error}") from error
        if counts is None or made_with is None:
            raise ValueError(f"{path} holds no token counts; fastkd.embeddings.save_counts writes such files")
        if made_with != expected:
            raise ValueError(f"{path} was counted with another tokenizer than this {type(tokenizer).__name__}")
        if counts.shape != total.shape or counts.dtype != torch.int64:
            raise ValueError(
                f"{path} has counts of shape {tuple(counts.shape)}, {counts.dtype}; ({length},) int64 is needed"
            )
        total += counts
    return total


def fingerprint(tokenizer) -> str:
    """SHA-256 of all that decides which ids a text gets, whatever padding or truncation was last asked for."""
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation"), rules.pop("padding")
    else:
        settings = {name: str(value) for name, value in tokenizer.init_kwargs.items() if not name.endswith("_file")}
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), settings]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def continuations(tokenizer, prefix: str = "##", *, num_embeddings: int | None = None) -> Tensor:
    """(V,) bool: which tokens begin with `prefix`, WordPiece's mark inside a word; the `types` of `SparseCode.fit`.

    Raises ValueError where no token does: other tokenizers mark the beginning of a word (`prefix="▁"` or `"Ġ"`).
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    marked = torch.zeros(num_embeddings or len(tokens), dtype=torch.bool)
    marked[: len(tokens)] = torch.tensor([token is not None and token.startswith(prefix) for token in tokens])
    if not marked.any():
        raise ValueError(f"no token of this {type(tokenizer).__name__} begins with prefix={prefix!r}")
    return marked


def _text_columns(dataset: Dataset | IterableDataset, asked: Sequence[str] | None) -> list[str]:
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data set is empty: there is nothing to count")
    strings = [column for column, value in first.items() if isinstance(value, str)]
    columns = strings if asked is None else list(asked)
    wrong = [column for column in columns if column not in strings]
    if wrong or not 1 <= len(columns) <= 2 or isinstance(asked, str):
        raise ValueError(
            f"text_columns={asked!r}: one column of text is needed, or two that the model reads as a pair; the columns "
            f"of text are {', '.join(strings) or 'none'}"
        )
    return columns
