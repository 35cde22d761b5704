"""LRC-BERT on a task: the intermediate layers first, then soft and hard labels beside them."""

import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Value
from transformers import AutoModelForSequenceClassification

import fastkd
from fastkd.losses import soft_label_loss
from fastkd.recipes import LrcBertConfig, LrcBertTrainer
from fastkd.recipes.lrc_bert_student import PROJECTIONS

NARROW = {"layers": 2, "hidden": 24, "heads": 4, "init": "random"}


@pytest.fixture(scope="module")
def make_distil(make_teacher, tokenizer, tokens, settings):
    """make_distil(teacher=.., ..): the trainer of a narrow student of two layers, from random weights."""

    def make(dropout=0.1, teacher=None, student=None, data=None, **changes):
        teacher = teacher or make_teacher(dropout=dropout)
        return LrcBertTrainer(
            student or fastkd.create_student(teacher, **NARROW),
            LrcBertConfig(**settings(**changes)),
            teacher=teacher,
            processing_class=tokenizer,
            train_dataset=data or tokens["train"],
            eval_dataset=tokens["validation"],
        )

    return make


def lines_of(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def trained_teacher(make_finetune):
    trainer = make_finetune(max_steps=80)
    trainer.train()
    return trainer.model


def test_it_trains_and_beats_the_untrained_student(make_distil, trained_teacher, task):
    # A unit step per token is a fifth of an embedding of this width: here it would turn "good" into "bad".
    trainer = make_distil(
        teacher=trained_teacher,
        max_steps=60,
        contrast_only=0.3,
        learning_rate=5e-3,
        logging_steps=6,
        perturbation_norm="batch",
    )
    trainer.compute_metrics = task.compute_metrics
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    contrast = [line["loss_contrast"] for line in lines_of(trainer)]
    soft = [line["loss_soft"] for line in lines_of(trainer) if "loss_soft" in line]
    assert contrast[2] < contrast[0] - 0.2 and contrast[-1] < contrast[2]
    assert soft[-1] < 0.5 * soft[0]
    assert trainer.evaluate()["eval_accuracy"] > max(before, 0.9)


def test_the_losses_of_each_stage_are_logged_under_their_names(make_distil):
    weights = {"contrast_weight": 2.0, "soft_weight": 0.5, "hard_weight": 3.0}
    trainer = make_distil(max_steps=5, contrast_only=0.6, **weights)
    trainer.train()
    lines = lines_of(trainer)
    assert [line["stage"] for line in lines] == [1, 1, 1, 2, 2]
    for line in lines:
        terms = {name.removeprefix("loss_") for name in line if name.startswith("loss_")}
        assert terms == ({"contrast"} if line["stage"] == 1 else {"contrast", "soft", "hard"})
        total = sum(weights[f"{name}_weight"] * line[f"loss_{name}"] for name in terms)
        assert total == pytest.approx(line["loss"], abs=1e-5)


@pytest.mark.parametrize(("steps", "switch"), [(441_774, 353_419), (117_810, 94_248)])
def test_the_first_stage_is_as_long_as_the_papers(make_distil, steps, switch):
    trainer = make_distil()
    trainer.state.max_steps = steps
    assert trainer.switch == switch


@pytest.mark.parametrize(("share", "steps"), [(0.8, 1), (0.8, 2), (0.99, 40)])
def test_the_last_step_at_least_has_all_losses(make_distil, share, steps):
    trainer = make_distil(contrast_only=share)
    trainer.state.max_steps = steps
    assert trainer.switch == steps - 1


def test_in_the_first_stage_no_head_runs_or_changes_and_the_maps_are_trained(make_distil):
    trainer = make_distil(max_steps=5)
    head = trainer.model.student.classifier.weight.clone()
    ran = []
    for model in (trainer.teacher, trainer.model.student):
        model.classifier.register_forward_hook(lambda *_: ran.append(trainer.state.global_step))
    original, heads, maps = trainer.training_step, [], []

    def training_step(*args, **kwargs):
        heads.append(trainer.model.student.classifier.weight.clone())
        maps.append(trainer.model.contrast.projections[0].weight.clone())
        return original(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert set(ran) == {4}
    assert all(torch.equal(weight, head) for weight in heads)
    assert not torch.equal(trainer.model.student.classifier.weight, head)
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(maps))


def test_a_resumed_run_repeats_every_loss_to_the_last_bit_across_the_stages(make_distil, assert_resumes_exactly):
    """The second stage begins with step 12; the maps are part of the state that is compared."""
    assert_resumes_exactly(make_distil)


def test_accumulating_4_x_8_equals_1_x_32_but_for_the_negatives(make_distil, assert_accumulation_changes_nothing):
    """Perturbed, with soft and hard labels. The contrastive loss takes its negatives from each accumulated batch."""
    alone = {"contrast_weight": 0.0, "contrast_only": 0.0}
    assert_accumulation_changes_nothing(lambda **changes: make_distil(**alone, **changes))


def test_what_is_saved_is_the_student_alone_and_a_checkpoint_holds_the_maps(make_distil, tokens, tmp_path):
    trainer = make_distil(max_steps=2, save_strategy="steps", save_steps=2, output_dir=tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / PROJECTIONS).exists()
    assert (tmp_path / "run" / "checkpoint-2" / PROJECTIONS).is_file()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert saved.config.hidden_size == 24
    batch = trainer.data_collator([{"input_ids": ids} for ids in tokens["validation"]["input_ids"][:8]])
    with torch.no_grad():
        expected = saved.eval()(**batch).logits
    found = trainer.predict(tokens["validation"].select(range(8))).predictions
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_without_a_contrastive_loss_there_are_no_maps_and_the_labels_are_all(make_distil, tokens, tokenizer):
    trainer = make_distil(dropout=0.0, contrast_weight=0.0, contrast_only=0.0, perturbation=None, max_steps=1)
    assert all(name.startswith("student.") for name in trainer.model.state_dict())
    rows = tokens["train"].select(range(8))
    batch = dict(tokenizer.pad([{"input_ids": ids} for ids in rows["input_ids"][:]], return_tensors="pt"))
    batch["labels"] = torch.tensor(rows["labels"][:])
    terms, output = trainer.loss_terms(trainer.model.eval(), batch)
    with torch.no_grad():
        teacher = trainer.teacher(**batch)
    assert set(terms) == {"soft", "hard"}
    torch.testing.assert_close(terms["soft"], soft_label_loss(output.logits, teacher.logits, 1.1))
    torch.testing.assert_close(terms["hard"], torch.nn.functional.cross_entropy(output.logits, batch["labels"]))
    trainer.train()
    assert lines_of(trainer)[0]["stage"] == 2


def test_a_regression_has_squared_errors(make_distil, make_teacher, tokens):
    features = tokens["train"].features.copy()
    features["labels"] = Value("float32")
    data = tokens["train"].cast(features)
    teacher = make_teacher(num_labels=1, problem_type="regression")
    trainer = make_distil(teacher=teacher, data=data, max_steps=2, contrast_only=0.5)
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in data.select(range(8))]
    batch = dict(trainer.data_collator(rows))
    terms, output = trainer.loss_terms(trainer.model.eval(), batch)
    with torch.no_grad():
        scores = trainer.teacher(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(terms["soft"], (output.logits - scores).square().mean())
    torch.testing.assert_close(terms["hard"], (output.logits[:, 0] - batch["labels"]).square().mean())
    trainer.train()


def test_the_teacher_stays_as_it_is(make_distil, make_teacher):
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    make_distil(teacher=teacher, max_steps=3, contrast_only=0.5).train()
    assert not teacher.training and all(torch.equal(tensor, before[n]) for n, tensor in teacher.state_dict().items())


def test_bf16_runs_in_both_models(make_distil):
    trainer = make_distil(max_steps=4, contrast_only=0.5, bf16=True)
    seen = set()
    for model in (trainer.teacher, trainer.model.student):
        model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: seen.add(a[2].dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert all(math.isfinite(line["loss"]) for line in lines_of(trainer))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_step_0_says_what_is_about_to_happen(make_distil, capsys):
    make_distil(max_steps=1).train()
    out = capsys.readouterr().out
    assert len({len(line) - len(line[2:].partition("  ")[2].lstrip()) for line in out.splitlines()[:4]}) == 1
    said = " ".join(out.split())
    for phrase in (
        "teacher 4 layers x 32, student 2 layers x 24",
        "student layer 0 learns from teacher layer 1; student layer 1 learns from teacher layer 3 (from 0)",
        "the first 80% of the steps contrast alone, then 1 contrast + 1 soft + 3 hard",
        "embeddings, by 1 per token up their gradient",
        "cos_nce of cls, runs on",
    ):
        assert phrase in said, said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "max"}, "pooling='max'; allowed are cls, mean, token"),
        ({"contrast_only": 1.0}, r"contrast_only=1.0; it must lie in \[0, 1\)"),
        ({"contrast_weight": 0.0}, "contrast_weight=0, but the first 80% of the steps .* contrast_only=0"),
        ({"soft_weight": 0.0, "hard_weight": 0.0}, "the head would learn nothing"),
        ({"soft_weight": -1.0}, "soft_weight=-1.0; it must not be negative"),
        ({"temperature": 0.0}, "temperature=0.0; it must be positive"),
        ({"perturbation": "inputs"}, "perturbation='inputs'; allowed are embedding and null"),
        ({"layer_pairs": [[9, 0]]}, "layer 9 is out of range"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_a_folder_is_made(make_distil, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_distil(output_dir=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_task_is_refused(make_distil, make_teacher, tmp_path):
    student = fastkd.create_student(make_teacher(), layers=2)
    with pytest.raises(ValueError, match="the teacher has 3 labels, the student 2"):
        make_distil(teacher=make_teacher(num_labels=3), student=student, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
