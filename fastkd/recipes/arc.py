"""ARC from end to end: fine-tune the teacher, distil its relations, replace its layers, evaluate.

Everything that can be refused is refused before the first file is written. Every step writes into a folder of its own
and is skipped when that folder is complete; a step that was interrupted goes on from its last checkpoint. The same
command therefore resumes a run.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer import TRAINER_STATE_NAME

from fastkd.data import chunk_corpus, load_corpus, load_task, task_sentences
from fastkd.models import create_student
from fastkd.recipes.arc_stage_a import ArcStageAConfig, ArcStageATrainer, check_stage_a
from fastkd.recipes.arc_stage_b import ArcStageBConfig, ArcStageBTrainer, stage_b_encoder
from fastkd.recipes.finetune import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.settings import check_keys, from_settings

_STEPS = ("teacher", "stage_a", "student")
_RECORD, _DONE = "recipe.json", "done.json"


@dataclass
class ArcRecipe:
    """What `fastkd train` reads from a YAML file whose `recipe` is `arc`.

    Args:
        teacher: folder or hub id of the pretrained encoder.
        task: a task of `fastkd.data.load_task`.
        data: folder or hub name of the task's data; None is the hub.
        corpus: text for stage A beside the task's own sentences: files, folders, hub names; one, or a list of them.
        output_dir: folder of the run.
        student: arguments of `fastkd.create_student`; stage B needs the teacher's width.
        finetune, stage_a, stage_b: settings of the steps, see `FineTuneConfig`, `ArcStageAConfig`, `ArcStageBConfig`.
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
    output_dir: str = "runs/arc"
    student: dict = field(default_factory=lambda: {"layers": 3, "init": "first"})
    finetune: dict = field(default_factory=dict)
    stage_a: dict = field(default_factory=dict)
    stage_b: dict = field(default_factory=dict)
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
        check_folder(folder, self.identity(), self.overwrite)
        with configs["finetune"].main_process_first(desc="checks"):  # the other ranks read what it has cached
            task = load_task(self.task, self.data)
            task = task.hold_out(self.hold_out) if self.hold_out else task
            tokenizer = load_tokenizer(self.teacher)
            tokens = task.tokenize(tokenizer, self.max_length)
            steps = total_steps(configs["stage_b"], tokens["train"])
            self.check_stages(configs, task, tokenizer, steps)
            corpus = load_corpus([*self.corpus, task_sentences(task)])
            text = chunk_corpus(corpus, tokenizer, configs["stage_a"].max_length)
            # Nothing was written so far, and nothing is refused from here on.
            if configs["finetune"].process_index == 0:
                start_folder(folder, self.identity(), self.overwrite)

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
        if not is_done(folder / "stage_a"):
            teacher = with_head(self.teacher, task, self.seed)
            trainer = ArcStageATrainer(
                create_student(teacher, **self.student),
                configs["stage_a"],
                teacher=teacher,
                processing_class=tokenizer,
                train_dataset=text,
            )
            train_and_save(trainer, folder / "stage_a")
        if not is_done(folder / "student"):
            encoder = stage_b_encoder(load(folder / "teacher"), load(folder / "stage_a"), configs["stage_b"], steps)
            trainer = ArcStageBTrainer(
                encoder, configs["stage_b"], processing_class=tokenizer, train_dataset=tokens["train"]
            )
            train_and_save(trainer, folder / "student")

        results = {name: evaluate(load(folder / name), task, tokens, tokenizer) for name in ("teacher", "student")}
        if configs["finetune"].process_index == 0:
            (folder / "results.json").write_text(json.dumps(results, indent=1))
            for name, metrics in results.items():
                found = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in metrics.items())
                print(f"{name}: {found} ({folder / name})")
        return results

    def check_stages(self, configs: dict, task, tokenizer, steps: int) -> None:
        """Build both stages on models that are thrown away, so that stage B is not refused after hours of stage A."""
        teacher = with_head(self.teacher, task)
        student = create_student(teacher, **self.student)
        check_stage_a(student, teacher, tokenizer, configs["stage_a"])
        stage_b_encoder(teacher, student, configs["stage_b"], steps)

    def identity(self) -> dict:
        """What makes this run another run."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("overwrite", "output_dir")}

    def configs(self) -> dict:
        given = {
            "finetune": (FineTuneConfig, "teacher"),
            "stage_a": (ArcStageAConfig, "stage_a"),
            "stage_b": (ArcStageBConfig, "student"),
        }
        for name in (*given, "student"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}: a section of settings is needed, not {getattr(self, name)!r}")
        check_keys(self.student, ("layers", "hidden", "heads", "ffn", "init", "seed"), "student")
        if "layers" not in self.student:
            raise ValueError("student: layers must be given, e.g. student.layers=3")
        if self.stage_a.get("train_embeddings") is True:
            raise ValueError(
                "stage_a.train_embeddings=true: stage B gives the student the fine-tuned teacher's embeddings, so what "
                "stage A taught them would be lost; leave it out"
            )
        defaults = {"stage_a": {"train_embeddings": False}}
        return {
            name: from_settings(
                cls,
                {"output_dir": str(Path(self.output_dir) / sub), "seed": self.seed}
                | defaults.get(name, {})
                | getattr(self, name),
                name,
            )
            for name, (cls, sub) in given.items()
        }


def with_head(path: str | Path, task, seed: int = 0):
    """The pretrained encoder with a fresh head for the task, drawn from `seed`. Raises ValueError if there is none."""
    kind = (
        {"problem_type": "regression"}
        if task.regression
        else {"id2label": dict(enumerate(task.label_names)), "label2id": {n: i for i, n in enumerate(task.label_names)}}
    )
    with torch.random.fork_rng(devices=[]), _named_if_missing(path):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=task.num_labels, **kind)


def load_tokenizer(path: str | Path):
    """The teacher's tokenizer. Raises ValueError if there is none."""
    with _named_if_missing(path):
        return AutoTokenizer.from_pretrained(path)


@contextmanager
def _named_if_missing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        what = "the folder holds none that loads" if Path(path).is_dir() else "no such folder, and none on the hub"
        raise ValueError(f"teacher={path} is no model: {what} ({str(error).splitlines()[0]})") from error


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


def check_folder(folder: Path, identity: dict, overwrite: bool, steps: tuple[str, ...] = _STEPS) -> None:
    """Raise a ValueError where `folder` holds another run, or other files, and `overwrite` is not set."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file; name a folder")
    if overwrite or not folder.exists():
        return
    record = folder / _RECORD
    before = json.loads(record.read_text()) if record.is_file() else None
    if before is None and any(folder.iterdir()):
        raise ValueError(f"output_dir={folder} holds other files; name another folder, or overwrite=true")
    described = json.loads(json.dumps(identity, default=str))
    changed = sorted(k for k in described if before is not None and before.get(k) != described[k])
    # A run that failed before its first checkpoint has nothing to lose.
    if changed and any(is_done(folder / step) or any((folder / step).glob("checkpoint-*")) for step in steps):
        raise ValueError(
            f"output_dir={folder} holds another run (it differs in {', '.join(changed)}); name another folder, "
            "or overwrite=true"
        )


def start_folder(folder: Path, identity: dict, overwrite: bool, steps: tuple[str, ...] = _STEPS) -> None:
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
        (folder / _DONE).write_text(json.dumps({"log": trainer.state.log_history}))
        # The finished model stands beside them; a run folder need not keep its optimizer states.
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover)
    trainer.accelerator.wait_for_everyone()


def is_done(folder: Path) -> bool:
    return (folder / _DONE).is_file()
