"""Plain text for stage A: corpora of any size, cut into windows of tokens."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from fastkd.data.tasks import Task, check_max_length

_BUILDERS = {".parquet": "parquet", ".txt": "text", ".json": "json", ".jsonl": "json"}
_EVALUATION = ("validation", "valid", "val", "dev", "test")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:.+)?")

Corpus: TypeAlias = Dataset | IterableDataset
Source: TypeAlias = str | Path | Dataset | IterableDataset


def load_corpus(source: Source | Sequence[Source], *, text_column: str = "text", streaming: bool = False) -> Corpus:
    """A data set with the one column `text` (string), one document, paragraph or line per row, blank ones dropped.

    Args:
        source: a parquet, txt (one text per line), json or jsonl file; a folder of such files, sub-folders included,
            where files named validation, dev or test are left out; a hub data set (`owner/name`, or
            `owner/name:configuration`), of which the train split is read; a loaded data set, e.g. `task_sentences`;
            or a list of these, read one after the other.
        text_column: the column that holds the text; a txt file and a loaded data set with a `text` column have it
            under that name anyway.
        streaming: read on the fly, nothing is copied to the cache; gives an IterableDataset.

    Raises:
        ValueError: no such file or folder, nothing to read in it, no such column, or blank text only.
    """
    sources = source if isinstance(source, (list, tuple)) else [source]
    if not sources:
        raise ValueError("an empty list of corpora was given")
    parts = [part for each in sources for part in _parts(each, text_column, streaming)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def check_source(source: str | Path) -> None:
    """Raise the ValueErrors of `load_corpus` that need no text to be read: no such path, or no usable file in it."""
    path = Path(source).expanduser()
    if path.exists():
        _files(path)
    elif not _HUB_NAME.fullmatch(str(source)):
        raise ValueError(f"{source} is neither a file or folder here nor the name of a hub data set (owner/name)")


def task_sentences(task: Task) -> Dataset:
    """The distinct sentences of `task.train`, in their order, as a corpus: both of a pair, the validation's none."""
    texts = dict.fromkeys(text for column in task.text_columns for text in task.train[column][:] if text.strip())
    return Dataset.from_dict({"text": list(texts)})


def chunk_corpus(dataset: Corpus, tokenizer, max_length: int = 128, *, min_tail: int = 8) -> Corpus:
    """The corpus as examples of up to `max_length` tokens, special tokens included: `input_ids`, `attention_mask`,
    `length` (in tokens).

    A longer text is cut into consecutive windows; a last window of fewer than `min_tail` tokens of its own is thrown
    away. A shorter text stays an example of its own: texts are never packed together, because relations between
    unrelated texts teach nothing. Lazy for an IterableDataset.

    Raises:
        ValueError: `max_length` is longer than the model's, or has no room for text.
    """
    check_max_length(max_length, tokenizer)
    special = tokenizer.num_special_tokens_to_add()

    def windows(batch: dict[str, list[str]]) -> dict[str, list]:
        numbered: Iterable[tuple[int, list[int]]]
        if tokenizer.is_fast:
            encoded = tokenizer(
                batch["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True, verbose=False
            )
            numbered = zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True)
        else:  # the Python tokenizers return what overflows as one piece
            body = max_length - special
            numbered = (
                (row, tokenizer.build_inputs_with_special_tokens(ids[start : start + body]))
                for row, ids in enumerate(
                    tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
                )
                for start in range(0, len(ids), body)
            )
        kept, previous = [], None
        for row, ids in numbered:
            is_tail = row == previous and len(ids) < max_length
            if len(ids) > special and not (is_tail and len(ids) - special < min_tail):
                kept.append(ids)
            previous = row
        lengths = [len(ids) for ids in kept]
        return {"input_ids": kept, "attention_mask": [[1] * n for n in lengths], "length": lengths}

    described = {} if isinstance(dataset, IterableDataset) else {"desc": f"cut to {max_length} tokens"}
    return dataset.select_columns("text").map(windows, batched=True, remove_columns=["text"], **described)


def _parts(source: Source, text_column: str, streaming: bool) -> list[Corpus]:
    """One or more data sets with the one column `text`."""
    if isinstance(source, (Dataset, IterableDataset)):
        given = [("the given data set", source, "text" if "text" in (source.column_names or ()) else text_column)]
    elif Path(source).expanduser().exists():
        given = []
        for builder, files in _files(Path(source).expanduser()).items():
            try:
                data = load_dataset(builder, data_files=files, split="train", streaming=streaming)
            except DatasetGenerationError as error:
                raise ValueError(
                    f"{source}: its {builder} files cannot be read as one corpus ({error.__cause__ or error})"
                ) from error
            given.append((str(source), data, "text" if builder == "text" else text_column))
    else:
        given = [(str(source), _from_hub(str(source), streaming), text_column)]
    return [_text_only(where, data, column, streaming) for where, data, column in given]


def _files(path: Path) -> dict[str, list[str]]:
    """Builder to files: all of one kind are read together."""
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"{path} is no corpus; it must end in {', '.join(_BUILDERS)}")
        return {_BUILDERS[path.suffix]: [str(path)]}
    files: dict[str, list[str]] = {}
    left_out = []
    for file in sorted(path.rglob("*")):
        if file.suffix in _BUILDERS and file.is_file():
            if file.stem.split("-")[0].split("_")[0].lower() in _EVALUATION:
                left_out.append(str(file.relative_to(path)))
            else:
                files.setdefault(_BUILDERS[file.suffix], []).append(str(file))
    if not files:
        reason = (
            f"only evaluation splits ({', '.join(left_out)}), which are read if named as files"
            if left_out
            else f"no file that ends in {', '.join(_BUILDERS)}"
        )
        raise ValueError(f"the folder {path} holds {reason}")
    return files


def _from_hub(name: str, streaming: bool) -> Corpus:
    repository, _, config = name.partition(":")
    try:
        return load_dataset(repository, config or None, split="train", streaming=streaming)
    except (OSError, ValueError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        raise kind(f"{name} is neither a file or folder here nor could it be read from the hub: {error}") from error


def _text_only(where: str, data: Corpus, text_column: str, streaming: bool) -> Corpus:
    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"{where} is empty")
    if text_column not in first:
        raise ValueError(f"{where} has no column {text_column!r} (text_column); it has {', '.join(map(repr, first))}")
    if not isinstance(first[text_column], str):
        raise ValueError(f"{where}: the column {text_column!r} holds {type(first[text_column]).__name__}, not text")
    if streaming and isinstance(data, Dataset):
        data = data.to_iterable_dataset()

    def not_blank(batch: dict[str, list[str | None]]) -> dict[str, list[str]]:
        return {"text": [text for text in batch[text_column] if text and text.strip()]}

    # The features are fixed here, so that corpora of differing string types can be put together.
    data = data.map(not_blank, batched=True, remove_columns=list(first), features=Features({"text": Value("string")}))
    if next(iter(data), None) is None:
        raise ValueError(f"{where} holds blank text only")
    return data
