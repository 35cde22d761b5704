"""Tensors in one safetensors file, beside the fingerprint of what they belong to."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd.explain.fingerprint import Fingerprint
from fastkd.whole_file import whole_file

_VERSION = "2"  # of the files, and of how the digests of their fingerprints are made


def write(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], fingerprint: Fingerprint) -> None:
    """Write the file whole or not at all, and the folders above it that are missing; `kind` says what it holds, such
    as "teacher results". Raises ValueError, before anything is written, for a path that is a folder."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    with whole_file(path) as unfinished:
        about = {"format": _format(kind), "version": _VERSION, "fingerprint": fingerprint.as_json()}
        save_file(tensors, unfinished, metadata=about)


def read(path: str | os.PathLike, kind: str) -> tuple[Fingerprint, dict[str, Tensor]]:
    """What `write` has written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, a file of another kind, of another version of fastkd, or cut short.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or not all of one: {error}") from error
    if metadata.get("format") != _format(kind):
        raise ValueError(f"{path} holds no {kind}")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"{path} was written by another version of fastkd; delete it, or name another file")
    return Fingerprint.from_json(metadata["fingerprint"]), tensors


def _format(kind: str) -> str:
    return f"fastkd.{kind.replace(' ', '_')}"
