"""Fine-tuning: how a teacher is made."""

import pytest
from datasets import Value

from fastkd.recipes import FineTuneConfig, FineTuneTrainer


def test_it_trains_and_beats_the_untrained_model(make_finetune, task):
    trainer = make_finetune(max_steps=80, logging_steps=20)
    trainer.compute_metrics = task.compute_metrics
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert trainer.evaluate()["eval_accuracy"] > max(before, 0.9)


def test_the_task_loss_is_logged_under_its_name(make_finetune):
    trainer = make_finetune(max_steps=4, logging_steps=2)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert line["loss_task"] == pytest.approx(line["loss"], abs=1e-6)


def test_a_resumed_run_repeats_every_loss_to_the_last_bit(make_finetune, assert_resumes_exactly):
    assert_resumes_exactly(make_finetune)


def test_accumulating_4_x_8_equals_1_x_32(make_finetune, assert_accumulation_changes_nothing):
    assert_accumulation_changes_nothing(make_finetune)


def test_a_score_is_trained_by_squared_error(make_teacher, tokenizer, tokens, settings):
    features = tokens["train"].features.copy()
    features["labels"] = Value("float32")
    trainer = FineTuneTrainer(
        make_teacher(num_labels=1, problem_type="regression"),
        FineTuneConfig(**settings(max_steps=80, logging_steps=20)),
        processing_class=tokenizer,
        train_dataset=tokens["train"].cast(features),
    )
    trainer.train()
    logged = [line["loss_task"] for line in trainer.state.log_history if "loss" in line]
    assert logged[-1] < 0.1 < 0.25 < logged[0]  # 0.25 is what a constant reaches


def test_predictions_come_in_the_order_of_the_data(make_finetune, tokens):
    trainer = make_finetune(max_steps=1)
    found = trainer.predict(tokens["validation"])
    assert found.label_ids.tolist() == tokens["validation"]["labels"][:]
    assert len(set(tokens["validation"]["length"])) > 5
