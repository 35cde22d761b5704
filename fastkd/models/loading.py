"""A model and its tokenizer by folder or hub id, with errors that name what was given."""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel


def load_model(path: str | Path) -> PreTrainedModel:
    """The model in a folder or on the hub, with the head it was saved with, in the dtype it was saved in.

    Raises ValueError where there is none, or of a class that transformers does not have.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        [name] = config.architectures or ["AutoModel"]
        if not hasattr(transformers, name):
            raise ValueError(f"its class {name} is not one of transformers")
        lenient = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # transformers' own error names nothing
        model, report = getattr(transformers, name).from_pretrained(path, **lenient)
        for tensor, stored, needed in sorted(report["mismatched_keys"]):
            raise ValueError(
                f"{tensor} is {tuple(stored)} in {_file_of(tensor, path)}, and by config.json {tuple(needed)}"
            )
        return model
    except (OSError, ValueError, *_UNREADABLE) as error:
        what = "the folder holds none that loads" if Path(path).is_dir() else "no such folder, and none on the hub"
        why = str(error).splitlines()[0]
        if isinstance(error, _UNREADABLE):
            why = _unreadable_file(path) or why
        raise ValueError(f"model={path} is no model: {what} ({why})") from error


def load_tokenizer(path: str | Path):
    """The tokenizer that lies beside a model. Raises ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={path} has no tokenizer that loads ({str(error).splitlines()[0]})") from error
