"""EGKD from end to end: fine-tune the teacher, compute what it gives for the data, distil, evaluate and compare."""

from dataclasses import dataclass, field
from pathlib import Path

from fastkd.explain import WordAlignment, check_tokenizers
from fastkd.models import create_bilstm, create_student
from fastkd.models.loading import load_tokenizer
from fastkd.recipes.egkd_report import agreement, explanation_report
from fastkd.recipes.egkd_settings import EgkdConfig
from fastkd.recipes.egkd_task import EgkdTrainer, check_results
from fastkd.recipes.egkd_teacher import check_mask_token, check_stored, classifier_of, teacher_results
from fastkd.recipes.finetune import FineTuneConfig
from fastkd.recipes.output_folder import check_place
from fastkd.recipes.run_folder import is_done, load, mark_done, train_and_save
from fastkd.recipes.settings import check_keys
from fastkd.recipes.task_recipe import STUDENT_KEYS, Run, TaskRecipe, with_head
from fastkd.recipes.training import check_vocabulary

_FILE = "results.safetensors"
_PAGE = "explanations.html"
_PRETRAINED = "student.pretrained"
_BILSTM_KEYS = ("kind", "layers", "hidden", "width", "dropout", "init", "seed")


@dataclass
class EgkdRecipe(TaskRecipe):
    """What `fastkd train` reads from a YAML file whose `recipe` is `egkd`, beside the settings of `TaskRecipe`.

    Args:
        student: arguments of `fastkd.create_student`, which begins with layers of the fine-tuned teacher, or, beside
            `pretrained: DIR_OR_HUB_ID`, with layers of that encoder, whose tokenizer it has; or, beside `kind: bilstm`,
            arguments of `fastkd.create_bilstm`.
        align: null compares explanations of tokens, which needs one tokenizer; "words" compares them on words.
        distil: settings of the distillation, see `EgkdConfig`.
        stored: whether the teacher's results are computed once and read; false runs the teacher at every step.
        results: file of the teacher's results, which other runs may share; None is one in the run's folder. What is
            computed so far stands beside it until it is complete: a run that is stopped goes on from there.
    """

    steps = ("teacher", "teacher_results", "student")
    student_keys = ("pretrained", *STUDENT_KEYS)

    output_dir: str = "runs/egkd"
    align: str | None = None
    distil: dict = field(default_factory=dict)
    stored: bool = True
    results: str | None = None

    def sections(self):
        if self.results and not self.stored:
            raise ValueError(f"results={self.results} and stored=false: without stored results there is no such file")
        if self.align is not None and not self.stored:
            raise ValueError(f"align={self.align} and stored=false: words are compared with stored results alone")
        if self.results and Path(self.results).expanduser().is_dir():
            file = Path(self.results) / _FILE
            raise ValueError(f"results={self.results} is a folder; name a file, such as results={file}")
        return {"finetune": (FineTuneConfig, "teacher", {}), "distil": (EgkdConfig, "student", {})}

    def prepare(self, run: Run):
        self.check_models(run)
        config, train, alignment = run.configs["distil"], run.tokens["train"], self.alignment(run, "train")
        file = Path(self.results).expanduser() if self.results else run.folder / "teacher_results" / _FILE
        if self.stored:
            check_place("results", file)
            if self.results or not self.overwrite:
                teacher = run.folder / "teacher"
                # One that is still to be fine-tuned is compared when it is there.
                known = teacher if is_done(teacher) and not self.overwrite else self.finetuned_teacher
                check_stored(file, known, run.tokenizer, train, config, alignment)
                if known is None and file.exists() and run.leads:
                    print(
                        f"{file} is there: its teacher is compared with this run's once that is fine-tuned "
                        "(finetuned_teacher=DIR takes the teacher of another run)"
                    )

        def stored_results():
            return teacher_results(run.folder / "teacher", run.tokenizer, train, config, file, alignment)

        def results(folder):
            if run.leads:
                how = f"read from {file}" if file.exists() else f"computed once, for {file}"
                print(f"{folder.name}: what the teacher gives for {len(train)} examples, {how}")
            with config.main_process_first(desc="teacher's results"):
                check_stored(file, run.folder / "teacher", run.tokenizer, train, config, alignment)
                found = stored_results()
            if run.leads:
                mark_done(folder, {"examples": len(found), "file": str(file)})

        def distil(folder):
            teacher = run.folder / "teacher"
            trainer = EgkdTrainer(
                self.new_student(run, load(teacher)),
                config,
                teacher=stored_results() if self.stored else load(teacher),
                processing_class=run.student_tokenizer,
                alignment=alignment,
                train_dataset=run.student_tokens["train"],
            )
            train_and_save(trainer, folder)

        steps = {"teacher": self.finetune_teacher(run), "teacher_results": results, "student": distil}
        return steps if self.stored else {name: steps[name] for name in ("teacher", "student")}

    def further_results(self, run: Run):
        """How alike teacher and student explain the evaluation split."""
        page = run.folder / _PAGE if run.leads else None
        models = (load(run.folder / name) for name in ("teacher", "student"))
        data, config = run.tokens["validation"], run.configs["distil"]
        report = explanation_report(
            *models,
            run.tokenizer,
            data,
            config,
            page,
            run.task.name,
            student_reads=(run.student_tokenizer, run.student_tokens["validation"]),
            alignment=self.alignment(run, "validation"),
        )
        if run.leads:
            for kind, found in report.items():
                print(f"{kind} explanations agree: {agreement(found)}")
            print(f"some of them: {page}")
        return {"consistency": report}

    def student_tokenizer(self, tokenizer):
        own = load_tokenizer(self.student["pretrained"], _PRETRAINED) if "pretrained" in self.student else tokenizer
        check_tokenizers(tokenizer, own, self.align)
        return own

    def alignment(self, run: Run, split: str) -> WordAlignment | None:
        """Of the texts of "train" or "validation", where words are compared."""
        if self.align is None:
            return None
        texts = [getattr(run.task, split)[column][:] for column in run.task.text_columns]
        return WordAlignment.of(run.tokenizer, run.student_tokenizer, *texts, max_length=self.max_length)

    def check_student(self):
        kind = self.student.get("kind")
        if kind is None:
            pretrained = self.student.get("pretrained", "")
            if not isinstance(pretrained, str):
                raise ValueError(f"{_PRETRAINED}={pretrained!r}; the folder or hub id of an encoder is needed")
            return super().check_student()
        if kind != "bilstm":
            raise ValueError(f"student: kind={kind!r}; allowed is bilstm, or none for layers of an encoder")
        check_keys(self.student, _BILSTM_KEYS, "student")
        if missing := [name for name in ("layers", "hidden") if name not in self.student]:
            raise ValueError(f"student: {', '.join(missing)} must be given, e.g. student.{missing[0]}=1")

    def new_student(self, run: Run, teacher):
        """A student as it begins: of layers of the encoder that the settings name, or as `make_student`."""
        if "pretrained" not in self.student:
            return self.make_student(teacher)
        encoder = with_head(self.student["pretrained"], run.task, self.seed, _PRETRAINED)
        return create_student(encoder, **{name: value for name, value in self.student.items() if name != "pretrained"})

    def make_student(self, teacher):
        """A student on the teacher's tokenizer."""
        if "kind" not in self.student:
            return create_student(teacher, **self.student)
        return create_bilstm(teacher, **{name: value for name, value in self.student.items() if name != "kind"})

    def check_models(self, run: Run) -> None:
        """Make the student and throw it away, so that it is not refused after hours of fine-tuning."""
        teacher = with_head(self.teacher, run.task)
        student = self.new_student(run, teacher)
        classifier_of(teacher, run.tokenizer)
        classifier_of(student, run.student_tokenizer)
        for tokenizer in (run.tokenizer, run.student_tokenizer):
            check_mask_token(tokenizer, run.configs["distil"])
        check_vocabulary(run.tokenizer, teacher=teacher)
        check_vocabulary(run.student_tokenizer, student=student)
        check_results(student, teacher, run.tokens["train"], run.configs["distil"])
