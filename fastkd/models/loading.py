"""A model and its tokenizer by folder or hub id, with errors that name what was given."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import load_state_dict

# What a file of weights that is cut short or overwritten makes safetensors and torch.load raise.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError)


def load_model(path: str | Path) -> PreTrainedModel:
    """The model in a folder or on the hub, with the head it was saved with, in the dtype it was saved in.

    Raises ValueError where there is none, or of a class that transformers does not have, or where a file of weights is
    damaged or does not fit config.json.
    """
    with named_if_missing(path):
        config = AutoConfig.from_pretrained(path)
        [name] = config.architectures or ["AutoModel"]
        if not hasattr(transformers, name):
            raise ValueError(f"its class {name} is not one of transformers")
        # What does not fit is refused below: transformers' own error names neither tensor nor file.
        lenient = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = getattr(transformers, name).from_pretrained(path, **lenient)
        if report["mismatched_keys"]:
            tensor, stored, needed = min(report["mismatched_keys"])
            where = _file_of(tensor, path)
            raise ValueError(f"{tensor} has shape {tuple(stored)} in {where}, and {tuple(needed)} by config.json")
        return model


@contextmanager
def named_if_missing(path: str | Path, argument: str = "model") -> Iterator[None]:
    """What goes wrong when a model is loaded from `path`, as a ValueError that names the argument and the cause."""
    try:
        yield
    except (OSError, ValueError, *_UNREADABLE) as error:
        what = "the folder holds none that loads" if Path(path).is_dir() else "no such folder, and none on the hub"
        why = _first_line(error)
        if isinstance(error, _UNREADABLE):
            why = _unreadable_file(path) or why
        raise ValueError(f"{argument}={path} is no model: {what} ({why})") from error


def _weight_files(folder: str | Path) -> list[Path]:
    return sorted([*Path(folder).glob("model*.safetensors"), *Path(folder).glob("pytorch_model*.bin")])


def _file_of(tensor: str, folder: str | Path) -> str:
    """The name of the file that holds a tensor, which may be stored without the name of the encoder in front."""
    for file in _weight_files(folder):
        if any(f".{tensor}".endswith(f".{stored}") for stored in load_state_dict(file, map_location="meta")):
            return file.name
    return "the checkpoint"


def _unreadable_file(folder: str | Path) -> str | None:
    """The first file of weights that cannot be read, and why; None where all can."""
    for file in _weight_files(folder):
        try:
            load_state_dict(file, map_location="meta")
        except _UNREADABLE as error:
            return f"{file.name} cannot be read, or not to its end: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_tokenizer(path: str | Path, argument: str = "model"):
    """The tokenizer that lies beside a model. Raises ValueError, which names the argument, if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        if (Path(path) / "config.json").is_file():
            raise ValueError(f"{argument}={path} has no tokenizer that loads ({_first_line(error)})") from error
        with named_if_missing(path, argument):
            raise
