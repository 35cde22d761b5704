"""A folder that is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_out(out: str | Path, overwrite: bool, source: str | Path) -> None:
    """A ValueError where `out` is a file, cannot be written, holds something and `overwrite` is not set, or has to
    do with `source`, which is only read."""
    folder = Path(out).expanduser().resolve()
    if Path(source).expanduser().exists():
        read = Path(source).expanduser().resolve()
        if folder == read or folder in read.parents or read in folder.parents:
            raise ValueError(
                f"out={out} and the model {source}, which stays as it is, lie in one another; name another"
            )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"out={out} is not empty; name another folder, or overwrite it (--overwrite)")
    check_place("out", out)


def check_place(name: str, path: str | Path) -> None:
    """Raise a ValueError that names the argument `name` unless something can be written to `path`, with the folders
    above it that are missing. Nothing stays behind."""
    place = Path(path).expanduser().resolve().parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".fastkd-", dir=place):  # what os.access says of root is not so
            pass
    except OSError as error:
        raise ValueError(f"{name}={path} cannot be written: {place} takes no files ({error.strerror})") from error


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A new folder beside `out` to write to; it takes its place once everything is written, or is removed."""
    folder = Path(out).expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("partial", "replaced"))
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
