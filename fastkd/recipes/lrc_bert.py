"""LRC-BERT from end to end: fine-tune the teacher, distil it on general text, distil it on the task, evaluate."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel

from fastkd.models import create_student
from fastkd.recipes.finetune import FineTuneConfig
from fastkd.recipes.given_steps import check_encoder, check_given, copy_step
from fastkd.recipes.lrc_bert_general import LrcBertGeneralConfig, LrcBertGeneralTrainer
from fastkd.recipes.lrc_bert_student import MatchedStudent, match_layers
from fastkd.recipes.lrc_bert_task import LrcBertConfig, LrcBertTrainer
from fastkd.recipes.run_folder import load, train_and_save
from fastkd.recipes.task_recipe import Run, TaskRecipe, corpus_sources, windows, with_head
from fastkd.recipes.training import check_vocabulary


@dataclass
class LrcBertRecipe(TaskRecipe):
    """What `fastkd train` reads from a YAML file whose `recipe` is `lrc_bert`, beside the settings of `TaskRecipe`.

    Args:
        corpus: text for the general distillation beside the task's own sentences: files, folders, hub names; one, or
            a list of them.
        layer_pairs, pooling: of both distillations, see `ContrastArguments`; the maps of the first serve the second.
        general, distil: settings of the steps, see `LrcBertGeneralConfig`, `LrcBertConfig`.
        general_student: folder that the step `general` of another run has left, with the same teacher, `student`,
            `layer_pairs` and `pooling`: it is copied, and that step not done.
    """

    steps = ("teacher", "general", "student")

    output_dir: str = "runs/lrc-bert"
    student: dict = field(default_factory=lambda: {"layers": 4, "init": "first"})
    corpus: str | list = field(default_factory=list)
    layer_pairs: list | None = None
    pooling: str = "cls"
    general: dict = field(default_factory=dict)
    distil: dict = field(default_factory=dict)
    general_student: str | None = None

    def __post_init__(self):
        self.corpus = corpus_sources(self.corpus)

    def sections(self):
        shared = {"layer_pairs": self.layer_pairs, "pooling": self.pooling}
        for name in ("general", "distil"):
            if twice := [key for key in sorted(shared) if key in getattr(self, name)]:
                said = ", ".join(twice)
                raise ValueError(f"{name}: {said} holds for both distillations; say it beside the sections: {said}=...")
        return {
            "finetune": (FineTuneConfig, "teacher", {}),
            "general": (LrcBertGeneralConfig, "general", shared),
            "distil": (LrcBertConfig, "student", shared),
        }

    def prepare(self, run: Run):
        self.check_models(run)
        config, given = run.configs["general"], self.general_student
        text = windows(self.corpus, run, config.max_length) if given is None else None

        def general(folder):
            if given is not None:
                return copy_step(Path(given), folder, config)
            train_and_save(self.general_trainer(config, run.tokenizer, text), folder)

        def distil(folder):
            trainer = LrcBertTrainer(
                with_head(run.folder / "general", run.task, self.seed),
                run.configs["distil"],
                teacher=load(run.folder / "teacher"),
                processing_class=run.tokenizer,
                train_dataset=run.tokens["train"],
                projections=run.folder / "general",
            )
            train_and_save(trainer, folder)

        return {"teacher": self.finetune_teacher(run), "general": general, "student": distil}

    def general_trainer(self, config: LrcBertGeneralConfig, tokenizer, text) -> LrcBertGeneralTrainer:
        """Of the bare encoders: the student's head comes with its task."""
        teacher = AutoModel.from_pretrained(self.teacher)
        student = create_student(teacher, **self.student)
        return LrcBertGeneralTrainer(student, config, teacher=teacher, processing_class=tokenizer, train_dataset=text)

    def check_models(self, run: Run) -> None:
        """Make the student and throw it away, so that it is not refused after hours of fine-tuning."""
        teacher = with_head(self.teacher, run.task)
        student = create_student(teacher, **self.student)
        check_vocabulary(run.tokenizer, teacher=teacher, student=student)
        pairs = match_layers(student, teacher, self.layer_pairs)
        if self.general_student is not None:
            given = Path(self.general_student)
            check_given("general_student", given, run.folder)
            check_encoder("general_student", given, student)
            MatchedStudent.to_learn_from(teacher, student, pairs, self.pooling).load_projections(given)
