"""What all trainers share: defaults, the order of batches, means, and the stop at a loss that is not finite."""

import itertools
import math

import pytest
import torch

from fastkd.recipes import DistillationArguments, NotFiniteError, training
from fastkd.recipes.training import LengthGroupedBatches, check_vocabulary, padding_share

LENGTHS = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()


def test_the_optimizer_is_fused_and_batches_are_grouped_by_length(tmp_path):
    arguments = DistillationArguments(output_dir=tmp_path)
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize("pays", [True, False])
def test_bf16_auto_is_what_the_machine_is_fast_at(monkeypatch, tmp_path, pays):
    monkeypatch.setattr(training, "bf16_pays", lambda: pays)
    assert DistillationArguments(output_dir=tmp_path).bf16 is pays
    assert DistillationArguments(output_dir=tmp_path, bf16=not pays).bf16 is not pays


def test_fp16_does_not_clash_with_bf16_auto(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "bf16_pays", lambda: True)
    arguments = DistillationArguments(output_dir=tmp_path, fp16=True)
    assert arguments.fp16 and not arguments.bf16


def test_another_word_for_bf16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bf16='yes'; allowed are true, false and auto"):
        DistillationArguments(output_dir=tmp_path, bf16="yes")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0; it must be 1 at least"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0; it must be 1 at least"),
        ({"per_device_eval_batch_size": -4}, "per_device_eval_batch_size=-4; it must be 1 at least"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; it must be 0 at least"),
        ({"learning_rate": math.nan}, "learning_rate=nan; it must be 0 at least"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1; it must be 0 at least"),
        ({"warmup_steps": -5}, "warmup_steps=-5; it must be 0 at least"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0; it must be 0 at least"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon=-1e-08; it must be 0 at least"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0; it must lie in \[0, 1\)"),
        ({"max_steps": 0}, "max_steps=0; it must be 1 at least, or -1: by num_train_epochs"),
        ({"max_steps": -7}, "max_steps=-7; it must be 1 at least, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 and max_steps=-1: nothing would be trained"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused_before_a_folder_is_made(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_rate_of_zero_and_steps_instead_of_epochs_are_allowed(tmp_path):
    DistillationArguments(output_dir=tmp_path, learning_rate=0, max_steps=3, num_train_epochs=0)


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [list(LengthGroupedBatches(LENGTHS, 32, 7, lambda e=epoch: e)) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert all(sorted(order) == list(range(1000)) for order in epochs)


def test_the_order_depends_on_seed_and_epoch_alone():
    first = list(LengthGroupedBatches(LENGTHS, 32, 7))
    torch.rand(5)
    assert list(LengthGroupedBatches(LENGTHS, 32, 7)) == first
    assert list(LengthGroupedBatches(LENGTHS, 32, 8)) != first


def test_grouping_by_length_saves_most_of_the_padding():
    assert padding_share(LENGTHS, 32, grouped=False) > 0.4
    assert padding_share(LENGTHS, 32, grouped=True) < 0.15


def test_batches_do_not_come_sorted_by_length():
    order = list(LengthGroupedBatches(LENGTHS, 32, 7))
    means = [sum(LENGTHS[i] for i in order[k : k + 32]) / 32 for k in range(0, 960, 32)]
    rising = sum(later > earlier for earlier, later in itertools.pairwise(means))
    assert 8 < rising < 21


def test_a_tokenizer_that_fits_passes(tokenizer, make_teacher):
    check_vocabulary(tokenizer, teacher=make_teacher(vocab_size=len(tokenizer)))
    with pytest.raises(ValueError, match=r"the tokenizer has .* tokens, the student's embedding 50 rows"):
        check_vocabulary(tokenizer, teacher=make_teacher(), student=make_teacher(vocab_size=50))


def test_a_logged_term_is_the_mean_since_the_last_log(make_finetune):
    every, fourth = (make_finetune(max_steps=4, logging_steps=steps, dropout=0.0) for steps in (1, 4))
    for trainer in (every, fourth):
        trainer.train()
    single = [line["loss_task"] for line in every.state.log_history if "loss" in line]
    assert fourth.state.log_history[0]["loss_task"] == pytest.approx(sum(single) / 4, rel=1e-5)


def test_several_gpus_in_one_process_are_refused(make_finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(DistillationArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs.*torchrun --nproc-per-node 2"):
        make_finetune(output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_nan_names_step_and_batch(make_finetune):
    trainer = make_finetune(max_steps=6, logging_steps=100)
    original, first_ids = trainer.loss_terms, []

    def loss_terms(model, inputs):
        terms, outputs = original(model, inputs)
        if trainer.state.global_step == 3:
            first_ids.append(inputs["input_ids"][0, :8].tolist())
            terms["task"] = terms["task"] * math.nan
        return terms, outputs

    trainer.loss_terms = loss_terms
    with pytest.raises(NotFiniteError, match="step 3, the batch whose first sequence begins with the ids") as caught:
        trainer.train()
    assert str(first_ids[0]) in str(caught.value)


def test_where_the_host_does_not_wait_the_first_bad_batch_is_named_at_the_next_log(make_finetune, monkeypatch):
    """As on a GPU: the loss is not looked at in each step."""
    trainer = make_finetune(max_steps=8, logging_steps=8)
    monkeypatch.setattr(trainer, "_reads_losses_at_once", lambda loss: False)
    original, steps = trainer.loss_terms, {}

    def loss_terms(model, inputs):
        steps[trainer.state.global_step] = inputs["input_ids"][0, :8].tolist()
        terms, outputs = original(model, inputs)
        if trainer.state.global_step >= 3:
            terms["task"] = terms["task"] * math.nan
        return terms, outputs

    trainer.loss_terms = loss_terms
    with pytest.raises(NotFiniteError, match="step 3, ") as caught:
        trainer.train()
    assert max(steps) == 7
    assert str(steps[3]) in str(caught.value)


def test_a_checkpoint_with_nan_takes_no_good_ones_place(make_finetune, tmp_path):
    """The loss of step 3 is finite, its update is not."""
    trainer = make_finetune(
        output_dir=tmp_path, max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=1, logging_steps=100
    )
    original = trainer.training_step

    def training_step(*args, **kwargs):
        loss = original(*args, **kwargs)
        if trainer.state.global_step == 3:
            trainer.model.classifier.bias.grad[0] = math.inf
        return loss

    trainer.training_step = training_step
    with pytest.raises(NotFiniteError, match=r"holds NaN or infinity after step 4: it is not saved"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make_finetune(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.isfinite(p).all() for p in resumed.model.parameters())
