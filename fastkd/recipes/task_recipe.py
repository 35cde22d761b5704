"""What the recipes of a task have in common: fine-tune the teacher, distil it in steps, evaluate teacher and student.

Everything that can be refused is refused before the first file is written. Every step writes into a folder of its own
and is skipped when that folder is complete; a step that was interrupted goes on from its last checkpoint. The same
command therefore resumes a run.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fastkd.data import Task, chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.data.corpora import check_source
from fastkd.models.loading import load_tokenizer, named_if_missing
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.given_steps import check_given, check_teacher, copy_step
from fastkd.recipes.run_folder import check_folder, is_done, load, start_folder, train_and_save
from fastkd.recipes.settings import check_keys, section_from

STUDENT_KEYS = ("layers", "hidden", "heads", "ffn", "init", "seed")


@dataclass(frozen=True)
class Run:
    """What every step of a run works with.

    folder: of the run. configs: of each section of settings. tokens: `Task.tokenize` of the task's splits.
    student_tokenizer, student_tokens: the student's, which are the teacher's unless the recipe says otherwise.
    """

    folder: Path
    configs: dict
    task: Task
    tokenizer: PreTrainedTokenizerBase
    tokens: DatasetDict
    student_tokenizer: PreTrainedTokenizerBase
    student_tokens: DatasetDict

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.configs["finetune"].process_index == 0


Step = Callable[[Path], None]  # does its work, and leaves it in the folder


@dataclass
class TaskRecipe:
    """The settings that all recipes of a task have, and their run. A recipe gives its `sections` and `prepare`.

    Args:
        teacher: folder or hub id of the pretrained encoder.
        task: a task of `fastkd.data.load_task`.
        data: folder or hub name of the task's data; None is the hub.
        output_dir: folder of the run.
        student: arguments of `fastkd.create_student`.
        finetune: settings of the teacher's fine-tuning, see `FineTuneConfig`.
        finetuned_teacher: folder of a teacher that is fine-tuned on the task already, such as the step `teacher` of
            another run: it is copied, and the first step not done. `teacher` is then what it was fine-tuned from.
        max_length: tokens of a task's example.
        hold_out: share of train on which to evaluate in place of the validation split, for choosing settings. 0 reads
            the validation split.
        seed: of every step.
        overwrite: throw away what stands in `output_dir`, this run's own steps included, and start anew.

    Raises:
        ValueError: from `run`, before any work, where anything does not fit.
    """

    steps: ClassVar[tuple[str, ...]]
    student_keys: ClassVar[tuple[str, ...]] = STUDENT_KEYS

    teacher: str
    task: str
    data: str | None = None
    output_dir: str = "runs/task"
    student: dict = field(default_factory=lambda: {"layers": 3, "init": "first"})
    finetune: dict = field(default_factory=dict)
    finetuned_teacher: str | None = None
    max_length: int = 128
    hold_out: float = 0.0
    seed: int = 0
    overwrite: bool = False

    def sections(self) -> dict[str, tuple[type, str, dict]]:
        """By section: the dataclass of its settings, the step they belong to, and settings the recipe gives itself."""
        raise NotImplementedError

    def prepare(self, run: Run) -> dict[str, Step]:
        """The steps by name, nothing of which has run. Raises ValueError for all that would be refused later."""
        raise NotImplementedError

    def student_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The student's, the teacher's being `tokenizer`. Raises ValueError where the two do not go together."""
        return tokenizer

    def further_results(self, run: Run) -> dict:
        """What stands in results.json beside the metrics of teacher and student, asked once both are finished."""
        return {}

    def run(self) -> dict:
        """All steps; returns, prints and writes to `results.json` the metrics of teacher and student."""
        configs, folder = self.configs(), Path(self.output_dir)
        check_folder(folder, self.identity(), self.overwrite, self.steps)
        with configs["finetune"].main_process_first(desc="checks"):  # the other ranks read what it has cached
            task = load_task(self.task, self.data)
            task = task.hold_out(self.hold_out) if self.hold_out else task
            tokenizer = load_tokenizer(self.teacher, "teacher")
            own = self.student_tokenizer(tokenizer)
            tokens = task.tokenize(tokenizer, self.max_length)
            own_tokens = tokens if own is tokenizer else task.tokenize(own, self.max_length)
            run = Run(folder, configs, task, tokenizer, tokens, own, own_tokens)
            steps = self.prepare(run)
            # Nothing was written so far, and nothing is refused from here on.
            if run.leads:
                start_folder(folder, self.identity(), self.overwrite, self.steps)

        finished = [name for name in steps if is_done(folder / name)]
        configs["finetune"].distributed_state.wait_for_everyone()  # or a quick step of one is "finished" to another
        for name in finished:
            print(f"{name}: finished before, in {folder / name}")
        for name, step in steps.items():
            if name not in finished:
                step(folder / name)

        reads = {"teacher": (run.tokens, run.tokenizer), "student": (run.student_tokens, run.student_tokenizer)}
        metrics = {name: evaluate(load(folder / name), task, *read) for name, read in reads.items()}
        results = metrics | self.further_results(run)
        if run.leads:
            (folder / "results.json").write_text(json.dumps(results, indent=1))
            for name, values in metrics.items():
                found = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in values.items())
                print(f"{name}: {found} ({folder / name})")
        return results

    def identity(self) -> dict:
        """What makes this run another run."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("overwrite", "output_dir")}

    def configs(self) -> dict:
        """The settings of each section, checked."""
        for section in dataclasses.fields(self):
            given = getattr(self, section.name)
            if section.type is dict and not isinstance(given, dict):
                raise ValueError(f"{section.name}: a section of settings is needed, not {given!r}")
        self.check_student()
        own = {"seed": self.seed}
        return {
            name: section_from(
                cls, own | {"output_dir": str(Path(self.output_dir) / step)} | given | getattr(self, name), name
            )
            for name, (cls, step, given) in self.sections().items()
        }

    def check_student(self) -> None:
        """Raise a ValueError where the section `student` has a key that is unknown, or none for its layers."""
        check_keys(self.student, self.student_keys, "student")
        if "layers" not in self.student:
            raise ValueError("student: layers must be given, e.g. student.layers=3")

    def finetune_teacher(self, run: Run) -> Step:
        """The step that all recipes begin with. Raises ValueError where a teacher is given and does not fit."""
        if self.finetuned_teacher is not None:
            given = Path(self.finetuned_teacher)
            check_given("finetuned_teacher", given, run.folder)
            check_teacher("finetuned_teacher", given, with_head(self.teacher, run.task), run.task, run.tokenizer)
            return lambda folder: copy_step(given, folder, run.configs["finetune"])
        return lambda folder: train_and_save(
            FineTuneTrainer(
                with_head(self.teacher, run.task, self.seed),
                run.configs["finetune"],
                processing_class=run.tokenizer,
                train_dataset=run.tokens["train"],
            ),
            folder,
        )


def with_head(path: str | Path, task: Task, seed: int = 0, argument: str = "teacher"):
    """The pretrained encoder with a fresh head for the task, drawn from `seed`. Raises ValueError, which names the
    argument, if there is none."""
    kind = (
        {"problem_type": "regression"}
        if task.regression
        else {"id2label": dict(enumerate(task.label_names)), "label2id": {n: i for i, n in enumerate(task.label_names)}}
    )
    with torch.random.fork_rng(devices=[]), named_if_missing(path, argument):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=task.num_labels, **kind)


def corpus_sources(corpus: str | list) -> list[str]:
    """The setting `corpus` as a list. Raises ValueError where it is no source and no list of them, or where a path
    holds nothing to read."""
    sources = [corpus] if isinstance(corpus, str) else corpus
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError(f"corpus={corpus!r}; a file, a folder, a hub name, or a list of these is needed")
    for source in sources:
        check_source(source)
    return sources


def windows(corpus: list[str], run: Run, max_length: int):
    """Windows of the corpus and of the task's sentences."""
    return chunk_corpus(load_corpus([*corpus, task_sentences(run.task)]), run.tokenizer, max_length)


def total_steps(config, train) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    return math.ceil(config.num_train_epochs * math.ceil(len(train) / per_step))


def evaluate(model, task: Task, tokens: DatasetDict, tokenizer) -> dict[str, float]:
    """The task's metrics on its validation split (and further ones such as MNLI's mismatched), in fp32."""
    # A Trainer makes its folder, though nothing is written to it here.
    config = FineTuneConfig(output_dir=tempfile.gettempdir(), bf16=False, disable_tqdm=True)
    trainer = FineTuneTrainer(model, config, processing_class=tokenizer, compute_metrics=task.compute_metrics)
    metrics = {}
    for split in tokens:
        if split != "train":
            suffix = split.removeprefix("validation")
            found = trainer.predict(tokens[split]).metrics
            metrics |= {f"{name}{suffix}": found[f"test_{name}"] for name in task.metrics}
    return metrics
