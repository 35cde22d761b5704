"""LRC-BERT from end to end: fine-tune the teacher, distil it on general text, distil it on the task, evaluate.

As with ARC, everything that can be refused is refused before the first file is written, and the same command resumes a
run: a step whose folder is complete is skipped, one that was interrupted goes on from its last checkpoint.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel

from fastkd.data import chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.models import create_student
from fastkd.recipes.arc import (
    check_folder,
    evaluate,
    is_done,
    load,
    load_tokenizer,
    start_folder,
    train_and_save,
    with_head,
)
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.lrc_bert_general import LrcBertGeneralConfig, LrcBertGeneralTrainer
from fastkd.recipes.lrc_bert_student import match_layers
from fastkd.recipes.lrc_bert_task import LrcBertConfig, LrcBertTrainer
from fastkd.recipes.settings import check_keys, from_settings
from fastkd.recipes.training import check_vocabulary

_STEPS = ("teacher", "general", "student")


@dataclass
class LrcBertRecipe:
    """What `fastkd train` reads from a YAML file whose `recipe` is `lrc_bert`.

    Args:
        teacher: folder or hub id of the pretrained encoder.
        task: a task of `fastkd.data.load_task`.
        data: folder or hub name of the task's data; None is the hub.
        corpus: text for the general distillation beside the task's own sentences: files, folders, hub names; one, or
            a list of them.
        output_dir: folder of the run.
        student: arguments of `fastkd.create_student`.
        layer_pairs, pooling: of both distillations, see `ContrastArguments`; the maps of the first serve the second.
        finetune, general, distil: settings of the steps, see `FineTuneConfig`, `LrcBertGeneralConfig`, `LrcBertConfig`.
        max_length: tokens of a task's example.
        hold_out: share of train on which to evaluate in place of the validation split, for choosing settings. 0 reads
            the validation split.
        seed: of every step.
        overwrite: throw away what stands in `output_dir`, this run's own steps included, and start anew.

    Raises:
        ValueError: from `run`, before any work, where anything does not fit.
    """

    teacher: str
    task: str
    data: str | None = None
    corpus: str | list = field(default_factory=list)
    output_dir: str = "runs/lrc-bert"
    student: dict = field(default_factory=lambda: {"layers": 4, "init": "first"})
    layer_pairs: list | None = None
    pooling: str = "cls"
    finetune: dict = field(default_factory=dict)
    general: dict = field(default_factory=dict)
    distil: dict = field(default_factory=dict)
    max_length: int = 128
    hold_out: float = 0.0
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if isinstance(self.corpus, str):
            self.corpus = [self.corpus]
        if not isinstance(self.corpus, list) or not all(isinstance(source, str) for source in self.corpus):
            raise ValueError(f"corpus={self.corpus!r}; a file, a folder, a hub name, or a list of these is needed")

    def run(self) -> dict:
        """All steps; returns, prints and writes to `results.json` the metrics of teacher and student."""
        configs, folder = self.configs(), Path(self.output_dir)
        check_folder(folder, self.identity(), self.overwrite, _STEPS)
        with configs["finetune"].main_process_first(desc="checks"):  # the other ranks read what it has cached
            task = load_task(self.task, self.data)
            task = task.hold_out(self.hold_out) if self.hold_out else task
            tokenizer = load_tokenizer(self.teacher)
            tokens = task.tokenize(tokenizer, self.max_length)
            self.check_models(task, tokenizer)
            text = self.text(task, tokenizer, configs["general"])
            # Nothing was written so far, and nothing is refused from here on.
            if configs["finetune"].process_index == 0:
                start_folder(folder, self.identity(), self.overwrite, _STEPS)

        for step in _STEPS:
            if is_done(folder / step):
                print(f"{step}: finished before, in {folder / step}")
        if not is_done(folder / "teacher"):
            trainer = FineTuneTrainer(
                with_head(self.teacher, task, self.seed),
                configs["finetune"],
                processing_class=tokenizer,
                train_dataset=tokens["train"],
            )
            train_and_save(trainer, folder / "teacher")
        if not is_done(folder / "general"):
            train_and_save(self.general_trainer(configs["general"], tokenizer, text), folder / "general")
        if not is_done(folder / "student"):
            trainer = LrcBertTrainer(
                with_head(folder / "general", task, self.seed),
                configs["distil"],
                teacher=load(folder / "teacher"),
                processing_class=tokenizer,
                train_dataset=tokens["train"],
                projections=folder / "general",
            )
            train_and_save(trainer, folder / "student")

        results = {name: evaluate(load(folder / name), task, tokens, tokenizer) for name in ("teacher", "student")}
        if configs["finetune"].process_index == 0:
            (folder / "results.json").write_text(json.dumps(results, indent=1))
            for name, metrics in results.items():
                found = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in metrics.items())
                print(f"{name}: {found} ({folder / name})")
        return results

    def text(self, task, tokenizer, config: LrcBertGeneralConfig):
        """Windows of the corpus and of the task's sentences."""
        return chunk_corpus(load_corpus([*self.corpus, task_sentences(task)]), tokenizer, config.max_length)

    def general_trainer(self, config: LrcBertGeneralConfig, tokenizer, text) -> LrcBertGeneralTrainer:
        """Of the bare encoders: the student's head comes with its task."""
        teacher = AutoModel.from_pretrained(self.teacher)
        student = create_student(teacher, **self.student)
        return LrcBertGeneralTrainer(student, config, teacher=teacher, processing_class=tokenizer, train_dataset=text)

    def check_models(self, task, tokenizer) -> None:
        """Make the student and throw it away, so that it is not refused after hours of fine-tuning."""
        teacher = with_head(self.teacher, task)
        student = create_student(teacher, **self.student)
        check_vocabulary(tokenizer, teacher=teacher, student=student)
        match_layers(student, teacher, self.layer_pairs)

    def identity(self) -> dict:
        """What makes this run another run."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("overwrite", "output_dir")}

    def configs(self) -> dict:
        shared = {"layer_pairs": self.layer_pairs, "pooling": self.pooling}
        given = {
            "finetune": (FineTuneConfig, "teacher", {}),
            "general": (LrcBertGeneralConfig, "general", shared),
            "distil": (LrcBertConfig, "student", shared),
        }
        for name in (*given, "student"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}: a section of settings is needed, not {getattr(self, name)!r}")
        check_keys(self.student, ("layers", "hidden", "heads", "ffn", "init", "seed"), "student")
        if "layers" not in self.student:
            raise ValueError("student: layers must be given, e.g. student.layers=4")
        for name, (_, _, both) in given.items():
            if twice := both.keys() & getattr(self, name):
                said = ", ".join(sorted(twice))
                raise ValueError(f"{name}: {said} holds for both distillations; say it beside the sections: {said}=...")
        return {
            name: from_settings(
                cls,
                {"output_dir": str(Path(self.output_dir) / sub), "seed": self.seed} | both | getattr(self, name),
                name,
            )
            for name, (cls, sub, both) in given.items()
        }
