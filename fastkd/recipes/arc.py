"""ARC from end to end: fine-tune the teacher, distil its relations, replace its layers, evaluate."""

from dataclasses import dataclass, field

from fastkd.models import create_student
from fastkd.recipes.arc_stage_a import ArcStageAConfig, ArcStageATrainer, check_stage_a
from fastkd.recipes.arc_stage_b import ArcStageBConfig, ArcStageBTrainer, stage_b_encoder
from fastkd.recipes.finetune import FineTuneConfig
from fastkd.recipes.run_folder import load, train_and_save
from fastkd.recipes.task_recipe import Run, TaskRecipe, corpus_sources, total_steps, windows, with_head


@dataclass
class ArcRecipe(TaskRecipe):
    """What `fastkd train` reads from a YAML file whose `recipe` is `arc`, beside the settings of `TaskRecipe`.

    Args:
        student: stage B needs the teacher's width.
        corpus: text for stage A beside the task's own sentences: files, folders, hub names; one, or a list of them.
        stage_a, stage_b: settings of the steps, see `ArcStageAConfig`, `ArcStageBConfig`.
    """

    steps = ("teacher", "stage_a", "student")

    output_dir: str = "runs/arc"
    corpus: str | list = field(default_factory=list)
    stage_a: dict = field(default_factory=dict)
    stage_b: dict = field(default_factory=dict)

    def __post_init__(self):
        self.corpus = corpus_sources(self.corpus)

    def sections(self):
        if self.stage_a.get("train_embeddings") is True:
            raise ValueError(
                "stage_a.train_embeddings=true: stage B gives the student the fine-tuned teacher's embeddings, so what "
                "stage A taught them would be lost; leave it out"
            )
        return {
            "finetune": (FineTuneConfig, "teacher", {}),
            "stage_a": (ArcStageAConfig, "stage_a", {"train_embeddings": False}),
            "stage_b": (ArcStageBConfig, "student", {}),
        }

    def prepare(self, run: Run):
        configs, train = run.configs, run.tokens["train"]
        steps = total_steps(configs["stage_b"], train)
        self.check_stages(run, steps)
        text = windows(self.corpus, run, configs["stage_a"].max_length)

        def stage_a(folder):
            teacher = with_head(self.teacher, run.task, self.seed)
            trainer = ArcStageATrainer(
                create_student(teacher, **self.student),
                configs["stage_a"],
                teacher=teacher,
                processing_class=run.tokenizer,
                train_dataset=text,
            )
            train_and_save(trainer, folder)

        def stage_b(folder):
            models = (load(run.folder / name) for name in ("teacher", "stage_a"))
            encoder = stage_b_encoder(*models, configs["stage_b"], steps)
            trainer = ArcStageBTrainer(encoder, configs["stage_b"], processing_class=run.tokenizer, train_dataset=train)
            train_and_save(trainer, folder)

        return {"teacher": self.finetune_teacher(run), "stage_a": stage_a, "student": stage_b}

    def check_stages(self, run: Run, steps: int) -> None:
        """Build both stages on models that are thrown away, so that stage B is not refused after hours of stage A."""
        teacher = with_head(self.teacher, run.task)
        student = create_student(teacher, **self.student)
        check_stage_a(student, teacher, run.tokenizer, run.configs["stage_a"])
        stage_b_encoder(teacher, student, run.configs["stage_b"], steps)
