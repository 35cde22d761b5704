"""A file that is there whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Where to write the file: a name beside `path`, whose place it takes at the end of the block. A block that fails
    leaves nothing of it, and what stood at `path` as it was."""
    unfinished = Path(f"{path}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
