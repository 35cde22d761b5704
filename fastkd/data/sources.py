"""The splits of a task from a folder of files or from the hub."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets, load_dataset

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def _delimited(path: str, separator: str, quoting: int) -> Dataset:
    # Everything is read as text: pandas would take the sentence "None" for a missing value and "1.0" for a number.
    frame = pd.read_csv(path, sep=separator, quoting=quoting, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return Dataset.from_pandas(frame, preserve_index=False)


def _parquet(path: str) -> Dataset:
    # datasets cannot read a file of no rows.
    return Dataset.from_parquet(path) if pq.read_metadata(path).num_rows else Dataset(pq.read_table(path))


_READERS: dict[str, Callable[[str], Dataset]] = {
    ".parquet": _parquet,
    ".json": Dataset.from_json,
    ".jsonl": Dataset.from_json,
    ".csv": lambda path: _delimited(path, ",", csv.QUOTE_MINIMAL),
    ".tsv": lambda path: _delimited(path, "\t", csv.QUOTE_NONE),  # GLUE's own TSV files hold single quotation marks
}


def read_splits(task: str, source: str | Path | None, hub: str, config: str) -> dict[str, Dataset]:
    """`train`, `validation` and further validation splits of `task`, unchecked; see `load_task` for `source`.

    Raises:
        ValueError: no such folder, or no file for a split in it.
        ConnectionError: the hub cannot be reached.
    """
    if source is None:
        splits, where = _from_hub(task, hub, config), f"the hub data set {hub} ({config})"
    elif Path(source).expanduser().exists():
        splits, where = _from_folder(task, Path(source).expanduser()), f"the folder {source}"
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        splits, where = _from_hub(task, str(source), config), f"the hub data set {source} ({config})"
    else:
        raise ValueError(f"the folder {source} does not exist; {task} needs a folder with train and validation files")
    named = {_split_name(name): data for name, data in splits.items()}
    for split in ("train", "validation"):
        if split not in named:
            raise ValueError(f"{task}: {where} has no {split} split; it has {', '.join(sorted(splits)) or 'none'}")
    return {name: data for name, data in named.items() if name is not None}


def _split_name(name: str) -> str | None:
    """The canonical name of a split, e.g. `dev_matched` is MNLI's `validation`; None for a test split."""
    stem, _, variant = name.partition("_")
    split = _SPLIT_NAMES.get(stem)
    return split if split is None or variant in ("", "matched") else f"{split}_{variant}"


def _from_hub(task: str, repository: str, config: str) -> dict[str, Dataset]:
    try:
        try:
            return dict(load_dataset(repository, config))
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # datasets 4 runs no loading scripts, but the hub keeps what they once made as parquet.
            return dict(load_dataset(repository, config, revision="refs/convert/parquet"))
    except (OSError, ValueError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        raise kind(
            f"{task}: {repository} ({config}) is neither a folder here nor could it be read from the hub: {error}. "
            f"Give a folder with train and validation files as the source to work offline"
        ) from error


def _from_folder(task: str, folder: Path) -> dict[str, Dataset]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; {task} needs a folder with train and validation files")
    files = _split_files(folder)
    for child in sorted(folder.iterdir()):
        # sst2, SST-2 and jsts-v1.3 are all names such folders have.
        if not files and child.is_dir() and _letters(re.sub(r"-v[\d.]+$", "", child.name)) == _letters(task):
            files = _split_files(child)
    for split in ("train", "validation"):
        if split not in files:
            raise ValueError(
                f"{folder} has no {split} file for {task}: looked for {_looked_for(split)} there and in {folder / task}"
            )
    splits = {}
    for split, paths in files.items():
        if len(paths) > 1 and not all(_SHARD.search(path.stem) for path in paths):
            raise ValueError(f"{split} of {task} is ambiguous in {folder}: {', '.join(path.name for path in paths)}")
        splits[split] = concatenate_datasets([_read(path) for path in paths])
    return splits


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _split_files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = _split_name(path.stem.split("-")[0])
        if split is not None and path.suffix in _READERS and path.is_file():
            files.setdefault(split, []).append(path)
    return files


def _looked_for(split: str) -> str:
    names = [name for name, meaning in _SPLIT_NAMES.items() if meaning == split]
    return f"{'|'.join(names)}{{{','.join(_READERS)}}}"


def _read(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        return _READERS[path.suffix](str(path))
    except Exception as error:  # the readers raise a dozen kinds, none of which names the file
        raise ValueError(f"{path} could not be read as {path.suffix[1:]}: {error}") from error
