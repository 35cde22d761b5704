"""A folder in which a run of named steps stands: whose it is, which steps are finished, where one goes on."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoModelForSequenceClassification
from transformers.trainer import TRAINER_STATE_NAME

_RECORD, DONE = "recipe.json", "done.json"
# Settings of a step that may change while a run is interrupted: what is trained does not depend on them.
_OF_NO_EFFECT = frozenset(
    """disable_tqdm log_level log_level_replica logging_first_step logging_steps logging_strategy report_to run_name
    save_steps save_strategy save_total_limit dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor""".split()
)


def check_folder(folder: Path, identity: dict, overwrite: bool, steps: Iterable[str]) -> None:
    """Raise a ValueError where `folder` holds another run, or other files, and `overwrite` is not set.

    Settings that do not change what is trained (of logs, checkpoints and loading) make no other run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file; name a folder")
    if overwrite or not folder.exists():
        return
    record = folder / _RECORD
    before = json.loads(record.read_text()) if record.is_file() else None
    if before is None and any(folder.iterdir()):
        raise ValueError(f"output_dir={folder} holds other files; name another folder, or overwrite=true")
    described = json.loads(json.dumps(identity, default=str))
    changed = [] if before is None else _differences(before, described)
    # A run that failed before its first checkpoint has nothing to lose.
    if changed and any(is_done(folder / step) or any((folder / step).glob("checkpoint-*")) for step in steps):
        raise ValueError(
            f"output_dir={folder} holds another run (it differs in {', '.join(changed)}); name another folder, "
            "or overwrite=true"
        )


def _differences(before: dict, now: dict) -> list[str]:
    """`key: old -> new` of what differs, in the order of the settings; of sections by `section.key`."""
    found = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            keys = [name for name in {**old, **value} if name not in _OF_NO_EFFECT and old.get(name) != value.get(name)]
            found += [f"{key}.{name}: {old.get(name, 'default')} -> {value.get(name, 'default')}" for name in keys]
        elif old != value:
            found.append(f"{key}: {old} -> {value}")
    return found


def start_folder(folder: Path, identity: dict, overwrite: bool, steps: Iterable[str]) -> None:
    """Make `folder` this run's own."""
    if overwrite:
        for step in steps:
            shutil.rmtree(folder / step, ignore_errors=True)
        (folder / "results.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RECORD).write_text(json.dumps(identity, indent=1, default=str))


def train_and_save(trainer, folder: Path) -> None:
    """Train, from the last complete checkpoint if there is one, and leave the model in `folder`."""
    # Its state is the last thing that is written to a checkpoint: one without was interrupted.
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    last = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last and trainer.is_world_process_zero():
        print(f"{folder.name}: goes on from {last}")
    trainer.train(resume_from_checkpoint=last and str(last))
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        mark_done(folder, {"log": trainer.state.log_history})
        # The finished model stands beside them; a run folder need not keep its optimizer states.
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()


def mark_done(folder: Path, record: dict) -> None:
    """A step's last word: `record` is kept in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).write_text(json.dumps(record))


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def load(folder: str | Path):
    """The classifier that a step left."""
    return AutoModelForSequenceClassification.from_pretrained(folder)
