"""Stage B: a student is trained inside its predecessor, and leaves it as a plain transformers model."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import fastkd
from fastkd.models.replacement import fingerprint
from fastkd.recipes.arc_stage_b import soft_label_loss


@pytest.fixture(scope="module")
def predecessor(make_finetune, tmp_path_factory):
    """A fine-tuned teacher, in a folder."""
    folder = tmp_path_factory.mktemp("predecessor")
    trainer = make_finetune(max_steps=80)
    trainer.train()
    trainer.model.save_pretrained(folder)
    return folder


@pytest.fixture
def trained_teacher(predecessor):
    return AutoModelForSequenceClassification.from_pretrained(predecessor)


def test_it_trains_and_the_student_alone_beats_the_untrained_one(make_stage_b, trained_teacher, task):
    student = fastkd.create_student(trained_teacher, layers=2, init="random")
    trainer = make_stage_b(predecessor=trained_teacher, student=student, max_steps=60, logging_steps=10)
    trainer.compute_metrics = task.compute_metrics
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged[-1] < 0.5 * logged[0]
    assert before < 0.75
    assert trainer.evaluate()["eval_accuracy"] > 0.9


def test_losses_and_rates_are_logged_under_their_names(make_stage_b):
    trainer = make_stage_b(max_steps=10, soft_weight=0.25, start_rate=0.2, reach=0.5)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        assert 0.75 * line["loss_task"] + 0.25 * line["loss_soft"] == pytest.approx(line["loss"], abs=1e-5)
        assert line["loss_soft"] > 0
    nominal = [0.2, 0.36, 0.52, 0.68, 0.84, 1, 1, 1, 1, 1]
    assert [line["rate_nominal"] for line in lines] == pytest.approx(nominal)
    assert [line["rate_effective"] for line in lines] == pytest.approx(
        [p / (1 - (1 - p) ** 2) for p in nominal], abs=1e-6
    )
    assert {line["rate_drawn"] for line in lines[:5]} <= {0.5, 1.0}
    assert {line["rate_drawn"] for line in lines[5:]} == {1.0}


def test_without_soft_labels_only_the_task_loss_is_computed(make_stage_b):
    trainer = make_stage_b(max_steps=1)
    trainer.train()
    assert [name for name in trainer.state.log_history[0] if name.startswith("loss_")] == ["loss_task"]


def test_soft_labels_are_the_divergence_of_softened_classes():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p.log() - q.log())).sum() / 5
    assert soft_label_loss(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_resumed_run_repeats_every_loss_to_the_last_bit(make_stage_b, assert_resumes_exactly):
    assert_resumes_exactly(lambda **changes: make_stage_b(soft_weight=0.5, **changes))


def test_accumulating_4_x_8_equals_1_x_32(make_stage_b, assert_accumulation_changes_nothing):
    assert_accumulation_changes_nothing(lambda **changes: make_stage_b(soft_weight=0.5, **changes))


def test_the_predecessor_stays_as_it_is_and_in_eval_mode(make_stage_b, make_teacher):
    predecessor = make_teacher()
    before = fingerprint(predecessor)
    trainer = make_stage_b(predecessor=predecessor, max_steps=6)
    trainer.train()
    assert fingerprint(predecessor) == before
    assert not predecessor.training


def test_a_checkpoint_holds_the_student_alone_and_whose_predecessor_it_needs(
    make_stage_b, trained_teacher, predecessor
):
    trainer = make_stage_b(predecessor=trained_teacher, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = f"{trainer.args.output_dir}/checkpoint-2"
    record = json.loads(open(f"{folder}/replacement.json").read())
    assert record["predecessor"] == str(predecessor)
    assert record["predecessor_fingerprint"] == fingerprint(trained_teacher)
    saved = AutoModelForSequenceClassification.from_pretrained(folder)
    assert saved.config.num_hidden_layers == 2
    for name, tensor in trainer.model.student.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)


def test_resuming_with_another_predecessor_is_refused(make_stage_b, make_teacher):
    trainer = make_stage_b(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    other = make_teacher()
    other.bert.encoder.layer[2].output.dense.bias.data += 1e-3
    second = make_stage_b(predecessor=other, max_steps=4)
    with pytest.raises(ValueError, match=r"trained with predecessor_fingerprint .*use the same predecessor"):
        second.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")


_ELSEWHERE = """
import sys
sys.modules["fastkd"] = None  # importing it raises
import numpy, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    batch = tokenizer(open(sys.argv[2]).read().splitlines(), padding=True, return_tensors="pt")
    numpy.save(sys.argv[3], model(**batch).logits.numpy())
"""


def test_the_exported_student_gives_the_same_logits_without_fastkd(make_stage_b, task, tokens, tmp_path):
    trainer = make_stage_b(max_steps=6)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    (tmp_path / "text").write_text("\n".join(task.validation["sentence"]))
    script = [sys.executable, "-c", _ELSEWHERE, tmp_path / "student", tmp_path / "text", tmp_path / "logits.npy"]
    subprocess.run(list(map(str, script)), check=True, cwd=tmp_path)
    expected = trainer.predict(tokens["validation"]).predictions
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


def test_bf16_runs_in_both_models(make_stage_b):
    trainer = make_stage_b(max_steps=3, bf16=True, soft_weight=0.5)
    seen = []
    trainer.model.predecessor.classifier.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    trainer.model.student.classifier.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    trainer.train()
    assert seen == [torch.bfloat16] * 6
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_step_0_says_what_is_about_to_happen(make_stage_b, capsys):
    make_stage_b(max_steps=1).train()
    said = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "0 for [0, 1]; 1 for [2, 3]",
        "linear from 0.3 to 1 after 60%",
        "effectively from 0.588",
        "is padding",
    ):
        assert phrase in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"soft_weight": 1.5}, "soft_weight=1.5; allowed is 0 to 1"),
        ({"temperature": 0}, "temperature=0; it must be positive"),
        ({"schedule": "linaer"}, "linaer.*'linear', 'cosine' or 'constant'"),
        ({"start_rate": 0.0}, "start=0.0"),
        ({"reach": 1.2}, "reach=1.2"),
        ({"groups": [[0, 1], [3]]}, r"groups=\[\[0, 1\], \[3\]\].*0 to 3"),
        ({"train_head": "never"}, "train_head='never'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_a_folder_is_made(make_stage_b, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_stage_b(output_dir=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_unequal_widths_are_refused_before_a_folder_is_made(make_stage_b, make_teacher, tmp_path):
    predecessor = make_teacher()
    narrow = fastkd.create_student(predecessor, layers=2, hidden=16, heads=4, init="random")
    with pytest.raises(ValueError, match=r"predecessor are \(32, 4\), of the student \(16, 4\)"):
        make_stage_b(predecessor=predecessor, student=narrow, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
