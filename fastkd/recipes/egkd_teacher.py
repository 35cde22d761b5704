"""The teacher's side of EGKD: a classifier to explain, and its results, computed once and read back."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel

from fastkd.explain import (
    Classifier,
    Fingerprint,
    Selector,
    TeacherResults,
    WordAlignment,
    compute_results,
    train_selector,
)
from fastkd.explain.classifier import word_embeddings
from fastkd.models.architectures import embeddings_of
from fastkd.recipes.egkd_branches import Branch, SelectionBranch
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_units import padded, units_of
from fastkd.recipes.run_folder import load
from fastkd.recipes.training import LengthGroupedBatches

_TAKEN = ("input_ids", "attention_mask", "token_type_ids", "labels", "words")


def classifier_of(model: PreTrainedModel, tokenizer, forward=None) -> Classifier:
    """The model as a function of what its first layer works on; of an architecture that is not known, of its word
    embeddings. `forward` takes the model's place, such as one without autocast.

    Raises ValueError for a model that offers no embeddings.
    """
    try:
        embeddings = embeddings_of(model)
    except (ValueError, AttributeError):
        embeddings = _word_embeddings(model)
    return Classifier(forward or model, embeddings, mask_id=tokenizer.mask_token_id, special_ids=special_ids(tokenizer))


def _word_embeddings(model) -> nn.Module:
    embeddings = word_embeddings(model)
    if embeddings is None:
        raise ValueError(
            f"{type(model).__name__} offers no embeddings to explain: neither is its architecture known "
            "(fastkd.models.register_architecture) nor has it get_input_embeddings()"
        )
    return embeddings


def check_mask_token(tokenizer, args: EgkdConfig) -> None:
    """Raise a ValueError where a branch masks with [MASK] and the tokenizer has none."""
    masking = [branch.name for branch in args.make_branches() if branch.baseline == "mask"]
    if masking and tokenizer.mask_token_id is None:
        raise ValueError(
            f"{', '.join(masking)}: the baseline 'mask' needs a mask token, and the tokenizer "
            f"{tokenizer.name_or_path or type(tokenizer).__name__} has none; 'zero' needs none"
        )


def special_ids(tokenizer) -> list[int]:
    """What is never masked and never selected: what frames a sequence, and padding. [UNK] stands for a word."""
    names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    return sorted({found for name in names if (found := getattr(tokenizer, name, None)) is not None})


def results_settings(data, args: EgkdConfig) -> dict[str, dict]:
    """By branch, what its results depend on beside the teacher, the tokenizer and the token ids. Raises ValueError for
    data without the labels that are explained."""
    settings = {branch.name: branch.belongs_to() for branch in args.make_branches()}
    if "gradient" in settings and args.target == "label":
        if "labels" not in data.column_names:
            raise ValueError(f"target='label' needs labels; the data has the columns {', '.join(data.column_names)}")
        labels = ",".join(map(str, data["labels"][:]))
        settings["gradient"]["labels"] = hashlib.sha256(labels.encode()).hexdigest()
    return settings


def teacher_results(
    teacher: str | Path | PreTrainedModel,
    tokenizer,
    data,
    args: EgkdConfig,
    path: str | Path,
    alignment: WordAlignment | None = None,
) -> TeacherResults:
    """Logits of the teacher on all of `data`, and what each branch needs of it: read from `path`, or computed and
    written there where there is no such file. What was stopped goes on where it was: until the file is complete,
    what is computed so far, a trained selector among it, stands in a folder beside it, PATH.parts. Neither the selector
    nor the file knows the order of batches it was made in.

    teacher: the folder of the fine-tuned teacher, or the model. If the file is there, no model is made of the folder.
    data: `Task.tokenize(...)["train"]`, in the order in which the trainer gets it.
    alignment: of these texts, for a student with another tokenizer: results are of words then. None: of tokens.

    Raises ValueError for a file that belongs to another teacher, tokenizer, data, alignment or settings (what differs
    is named), for data that is not the alignment's, and for results that are not finite.
    """
    check_mask_token(tokenizer, args)
    expected = Fingerprint.of(teacher, tokenizer, data, results_settings(data, args))
    parts = Path(f"{path}.parts")
    if alignment is not None:
        data = alignment.with_words("teacher", data)
    if Path(path).exists():
        results = TeacherResults.load(path, expected)
        check_units(results.fingerprint, alignment, path)
    else:
        if alignment is not None:
            expected = replace(expected, settings=expected.settings | {"align": alignment.digest})
        model = teacher if isinstance(teacher, PreTrainedModel) else load(teacher)
        classifier, branches = running_teacher(model, tokenizer, data, args, parts / "selector.safetensors", expected)
        batches = batches_of(data, tokenizer, args)
        results = compute_results(
            batches,
            expected,
            per_example={"logits": classifier.logits} | _explainers(branches, classifier, per_token=False),
            per_token=_explainers(branches, classifier, per_token=True),
            mask=lambda inputs: units_of(inputs).mask(inputs),
            # In fp16 two logits could tie, and the student explain another class than the teacher; scores that are not
            # normalised could be 0.
            precise=["logits"] if args.explainer.norm else ["logits", "gradient"],
            parts=parts,
            progress=_shows_progress(args),
        ).select(torch.tensor(batches.order).argsort())
        results.save(path)
    shutil.rmtree(parts, ignore_errors=True)  # also those of a run that was stopped before it came here
    return results


def check_stored(
    path: str | Path,
    teacher: str | Path | None,
    tokenizer,
    data,
    args: EgkdConfig,
    alignment: WordAlignment | None = None,
) -> None:
    """Raise a ValueError where a file that is there already belongs to something else. A `teacher` that is still to
    come, None, is not looked at."""
    if Path(path).exists():
        expected = Fingerprint.of(teacher, tokenizer, data, results_settings(data, args))
        advice = "Name another file with results=, give this run the same teacher by finetuned_teacher=, or delete it"
        stored = TeacherResults.fingerprint_of(path)
        stored.check(expected, path, advice)
        check_units(stored, alignment, path)


def check_units(stored: Fingerprint, alignment: WordAlignment | None, what: str | Path) -> None:
    """Raise a ValueError where results of tokens meet a run on words, or the reverse, or words of another alignment."""
    held, asked = stored.settings.get("align"), alignment and alignment.digest
    if held == asked:
        return
    if held and asked:
        raise ValueError(
            f"{what}: these results are of words by another alignment: of other texts, other tokenizers or another "
            "max_length"
        )
    of, compared = ("words (align=words)", "tokens") if held else ("tokens", "words (align=words)")
    raise ValueError(f"{what}: these results are of {of}, and this run compares {compared}")


def running_teacher(
    model: PreTrainedModel,
    tokenizer,
    data,
    args: EgkdConfig,
    kept: Path | None = None,
    fingerprint: Fingerprint | None = None,
) -> tuple[Classifier, list[Branch]]:
    """The teacher, frozen and on its device, and branches that can ask it: a selector is trained against it here, or
    read from the file `kept` that an earlier call with this fingerprint has left."""
    classifier = classifier_of(model.eval().requires_grad_(False).to(args.device), tokenizer)
    branches = args.make_branches()
    for branch in branches:
        if isinstance(branch, SelectionBranch):
            branch.selector = _kept_selector(kept, fingerprint, args.device)
            if branch.selector is None:
                batches = batches_of(data, tokenizer, args)
                branch.selector = train_selector(classifier, batches, branch.settings, progress=_shows_progress(args))
                if kept:
                    branch.selector.save(kept, fingerprint)
    return classifier, branches


def _kept_selector(file: Path | None, fingerprint: Fingerprint | None, device: torch.device) -> Selector | None:
    """None where there is no such file, or one of something else."""
    try:
        return Selector.load(file, fingerprint).to(device) if file else None
    except (FileNotFoundError, ValueError):
        return None


def _shows_progress(args: EgkdConfig) -> bool:
    """As the Trainer does."""
    return args.process_index == 0 and not args.disable_tqdm


def _explainers(branches: list[Branch], teacher: Classifier, *, per_token: bool) -> dict:
    return {
        branch.name: lambda inputs, branch=branch: branch.of_teacher(teacher, inputs)
        for branch in branches
        if branch.per_token == per_token
    }


class batches_of:
    """Padded batches of sequences of equal length or nearly so, on the device; can be gone through again.

    order: the rows of the data, as they come; by default grouped by length.
    """

    def __init__(self, data, tokenizer, args: EgkdConfig, order: Sequence[int] | None = None):
        size = args.per_device_eval_batch_size
        if order is None:
            order = list(LengthGroupedBatches([len(ids) for ids in data["input_ids"][:]], size, args.seed))
        self.order = order
        taken = data.select_columns([name for name in data.column_names if name in _TAKEN])
        collate = partial(padded, DataCollatorWithPadding(tokenizer))
        self._loader = DataLoader(taken, size, sampler=self.order, collate_fn=collate)
        self._device = args.device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self):
        for batch in self._loader:
            yield {name: value.to(self._device) for name, value in batch.items()}
