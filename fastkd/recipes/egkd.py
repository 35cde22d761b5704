"""EGKD from end to end: fine-tune the teacher, compute what it gives for the data, distil, evaluate and compare."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastkd.models import create_bilstm, create_student
from fastkd.recipes.egkd_report import explanation_report
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_task import EgkdTrainer, check_results
from fastkd.recipes.egkd_teacher import check_stored, classifier_of, teacher_results
from fastkd.recipes.finetune import FineTuneConfig
from fastkd.recipes.output_folder import check_place
from fastkd.recipes.run_folder import is_done, load, mark_done, train_and_save
from fastkd.recipes.settings import check_keys
from fastkd.recipes.task_recipe import Run, TaskRecipe, with_head
from fastkd.recipes.training import check_vocabulary

_FILE = "results.safetensors"
_PAGE = "explanations.html"
_BILSTM_KEYS = ("kind", "layers", "hidden", "width", "dropout", "init", "seed")


@dataclass
class EgkdRecipe(TaskRecipe):
    """What `fastkd train` reads from a YAML file whose `recipe` is `egkd`, beside the settings of `TaskRecipe`.

    Args:
        student: arguments of `fastkd.create_student`, which begins with layers of the fine-tuned teacher; or, beside
            `kind: bilstm`, those of `fastkd.create_bilstm`.
        distil: settings of the distillation, see `EgkdConfig`.
        stored: whether the teacher's results are computed once and read; false runs the teacher at every step.
        results: file of the teacher's results, which other runs may share; None is one in the run's folder.
    """

    steps = ("teacher", "teacher_results", "student")

    output_dir: str = "runs/egkd"
    distil: dict = field(default_factory=dict)
    stored: bool = True
    results: str | None = None

    def sections(self):
        if self.results and not self.stored:
            raise ValueError(f"results={self.results} and stored=false: without stored results there is no such file")
        return {"finetune": (FineTuneConfig, "teacher", {}), "distil": (EgkdConfig, "student", {})}

    def prepare(self, run: Run):
        self.check_models(run)
        config, train = run.configs["distil"], run.tokens["train"]
        file = Path(self.results) if self.results else run.folder / "teacher_results" / _FILE
        if self.stored:
            check_place("results", file)
            if self.results or not self.overwrite:
                teacher = run.folder / "teacher"
                # One that is still to be fine-tuned is compared when it is there.
                known = teacher if is_done(teacher) and not self.overwrite else self.finetuned_teacher
                check_stored(file, known, run.tokenizer, train, config)

        def results(folder):
            if run.leads:
                print(f"{folder.name}: what the teacher gives for {len(train)} examples, computed once for {file}")
            with config.main_process_first(desc="teacher's results"):
                found = teacher_results(run.folder / "teacher", run.tokenizer, train, config, file)
            if run.leads:
                mark_done(folder, {"examples": len(found), "file": str(file)})

        def distil(folder):
            teacher = run.folder / "teacher"
            trainer = EgkdTrainer(
                self.make_student(load(teacher)),
                config,
                teacher=teacher_results(teacher, run.tokenizer, train, config, file) if self.stored else load(teacher),
                processing_class=run.tokenizer,
                train_dataset=train,
            )
            train_and_save(trainer, folder)

        steps = {"teacher": self.finetune_teacher(run), "teacher_results": results, "student": distil}
        return steps if self.stored else {name: steps[name] for name in ("teacher", "student")}

    def further_results(self, run: Run):
        """How alike teacher and student explain the evaluation split."""
        page = run.folder / _PAGE if run.leads else None
        models = (load(run.folder / name) for name in ("teacher", "student"))
        report = explanation_report(*models, run.tokenizer, run.tokens["validation"], run.configs["distil"], page)
        if run.leads:
            for kind, found in report.items():
                print(f"{kind} explanations agree: {json.dumps({k: round(v, 3) for k, v in found.items()})}")
            print(f"some of them: {page}")
        return {"consistency": report}

    def check_student(self):
        kind = self.student.get("kind")
        if kind is None:
            return super().check_student()
        if kind != "bilstm":
            raise ValueError(f"student: kind={kind!r}; allowed is bilstm, or none for layers of the teacher's kind")
        check_keys(self.student, _BILSTM_KEYS, "student")
        if missing := [name for name in ("layers", "hidden") if name not in self.student]:
            raise ValueError(f"student: {', '.join(missing)} must be given, e.g. student.{missing[0]}=1")

    def make_student(self, teacher):
        if "kind" not in self.student:
            return create_student(teacher, **self.student)
        return create_bilstm(teacher, **{name: value for name, value in self.student.items() if name != "kind"})

    def check_models(self, run: Run) -> None:
        """Make the student and throw it away, so that it is not refused after hours of fine-tuning."""
        teacher = with_head(self.teacher, run.task)
        student = self.make_student(teacher)
        for model in (teacher, student):
            classifier_of(model, run.tokenizer)
        check_vocabulary(run.tokenizer, teacher=teacher, student=student)
        check_results(student, teacher, run.tokens["train"], run.configs["distil"])
