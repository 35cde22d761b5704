"""ARC from end to end: fine-tune the teacher, distil its relations, replace its layers, evaluate.

Every step writes into a folder of its own and is skipped when that folder is complete; a step that was interrupted
goes on from its last checkpoint. The same command therefore resumes a run.
"""

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from fastkd.data import chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.models import create_student
from fastkd.recipes.arc_stage_a import ArcStageAConfig, ArcStageATrainer
from fastkd.recipes.arc_stage_b import ArcStageBConfig, ArcStageBTrainer, stage_b_encoder
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.settings import check_keys, from_settings

_STEPS = ("teacher", "stage_a", "student")
_DONE = "done.json"


@dataclass
class ArcRecipe:
    """What `fastkd train` reads from a YAML file whose `recipe` is `arc`.

    Args:
        teacher: folder or hub id of the pretrained encoder.
        task: a task of `fastkd.data.load_task`.
        data: folder or hub name of the task's data; None is the hub.
        corpus: text for stage A beside the task's own sentences: files, folders, hub names.
        output_dir: folder of the run.
        student: arguments of `fastkd.create_student`; stage B needs the teacher's width.
        finetune, stage_a, stage_b: settings of the steps, see `FineTuneConfig`, `ArcStageAConfig`, `ArcStageBConfig`.
        max_length: tokens of a task's example.
        hold_out: share of train on which to evaluate in place of the validation split, for choosing settings. 0 reads
            the validation split.
        seed: of every step.
        overwrite: throw away another run in `output_dir`.
    """

    teacher: str
    task: str
    data: str | None = None
    corpus: list = field(default_factory=list)
    output_dir: str = "runs/arc"
    student: dict = field(default_factory=lambda: {"layers": 3, "init": "first"})
    finetune: dict = field(default_factory=dict)
    stage_a: dict = field(default_factory=dict)
    stage_b: dict = field(default_factory=dict)
    max_length: int = 128
    hold_out: float = 0.0
    seed: int = 0
    overwrite: bool = False

    def run(self) -> dict:
        """All steps; returns, prints and writes to `results.json` the metrics of teacher and student."""
        configs = self.configs()
        task = load_task(self.task, self.data)
        task = task.hold_out(self.hold_out) if self.hold_out else task
        tokenizer = AutoTokenizer.from_pretrained(self.teacher)
        tokens = task.tokenize(tokenizer, self.max_length)
        folder = prepare_folder(Path(self.output_dir), self.identity(), self.overwrite)

        def fresh_teacher():
            return with_head(self.teacher, task)

        if not is_done(folder / "teacher"):
            trainer = FineTuneTrainer(
                fresh_teacher(), configs["finetune"], processing_class=tokenizer, train_dataset=tokens["train"]
            )
            train_and_save(trainer, folder / "teacher")
        if not is_done(folder / "stage_a"):
            teacher = fresh_teacher()
            text = load_corpus([*self.corpus, task_sentences(task)])
            trainer = ArcStageATrainer(
                create_student(teacher, **self.student),
                configs["stage_a"],
                teacher=teacher,
                processing_class=tokenizer,
                train_dataset=chunk_corpus(text, tokenizer, configs["stage_a"].max_length),
            )
            train_and_save(trainer, folder / "stage_a")
        predecessor, student = load(folder / "teacher"), load(folder / "stage_a")
        encoder = stage_b_encoder(
            predecessor, student, configs["stage_b"], total_steps(configs["stage_b"], tokens["train"])
        )
        trainer = ArcStageBTrainer(
            encoder, configs["stage_b"], processing_class=tokenizer, train_dataset=tokens["train"]
        )
        if not is_done(folder / "student"):
            train_and_save(trainer, folder / "student")

        results = {name: evaluate(load(folder / name), task, tokens, tokenizer) for name in ("teacher", "student")}
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        for name, metrics in results.items():
            print(f"{name}: " + ", ".join(f"{metric} {100 * value:.1f}" for metric, value in metrics.items()))
        return results

    def identity(self) -> dict:
        """What makes this run another run."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("overwrite", "output_dir")}

    def configs(self) -> dict:
        given = {
            "finetune": (FineTuneConfig, "teacher"),
            "stage_a": (ArcStageAConfig, "stage_a"),
            "stage_b": (ArcStageBConfig, "student"),
        }
        check_keys(self.student, ("layers", "hidden", "heads", "ffn", "init", "seed"), "student")
        return {
            name: from_settings(
                cls, {"output_dir": str(Path(self.output_dir) / sub), "seed": self.seed} | getattr(self, name), name
            )
            for name, (cls, sub) in given.items()
        }


def with_head(path: str | Path, task):
    """The pretrained encoder with a fresh head for the task."""
    kind = (
        {"problem_type": "regression"}
        if task.regression
        else {"id2label": dict(enumerate(task.label_names)), "label2id": {n: i for i, n in enumerate(task.label_names)}}
    )
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=task.num_labels, **kind)


def load(folder: str | Path):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def total_steps(config, train) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    return math.ceil(config.num_train_epochs * math.ceil(len(train) / per_step))


def evaluate(model, task, tokens, tokenizer) -> dict[str, float]:
    """The task's metrics on its validation split (and further ones such as MNLI's mismatched), in fp32."""
    config = FineTuneConfig(output_dir="unused", bf16=False, disable_tqdm=True)
    trainer = FineTuneTrainer(model, config, processing_class=tokenizer, compute_metrics=task.compute_metrics)
    metrics = {}
    for split in tokens:
        if split != "train":
            suffix = split.removeprefix("validation")
            found = trainer.predict(tokens[split]).metrics
            metrics |= {f"{name}{suffix}": found[f"test_{name}"] for name in task.metrics}
    return metrics


def prepare_folder(folder: Path, identity: dict, overwrite: bool) -> Path:
    """An output folder that belongs to this run alone.

    Raises:
        ValueError: it holds another run, or other files, and `overwrite` is not set.
    """
    record = folder / "recipe.json"
    described = json.loads(json.dumps(identity, default=str))
    if folder.exists() and any(folder.iterdir()):
        before = json.loads(record.read_text()) if record.is_file() else None
        if before != described:
            if not overwrite:
                changed = sorted(k for k in described if before is None or before.get(k) != described[k])
                held = "other files" if before is None else f"another run (it differs in {', '.join(changed)})"
                raise ValueError(f"output_dir={folder} holds {held}; name another folder, or overwrite=true")
            for step in _STEPS:
                shutil.rmtree(folder / step, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(described, indent=1))
    return folder


def train_and_save(trainer, folder: Path) -> None:
    """Train, from the last checkpoint if there is one, and leave the model in `folder`."""
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / _DONE).write_text(json.dumps({"log": trainer.state.log_history}))
        # The finished model stands beside them; a run folder need not keep its optimizer states.
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)


def is_done(folder: Path) -> bool:
    return (folder / _DONE).is_file()
