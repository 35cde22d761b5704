"""Gradient perturbation: a step is taken from embeddings moved by a unit step up the gradient of its loss."""

import math

import pytest
import torch
from torch import nn

from fastkd.recipes import FineTuneConfig, NotFiniteError
from fastkd.recipes.perturbation import EmbeddingPerturbation, unit_step

LENGTHS = {"token": (-1,), "sequence": (-2, -1), "batch": (-3, -2, -1)}


@pytest.fixture
def batch(tokens, tokenizer):
    """Eight sentences of unequal length, with labels."""
    rows = tokens["train"].select(range(8))
    padded = tokenizer.pad([{"input_ids": ids} for ids in rows["input_ids"][:]], return_tensors="pt")
    return dict(padded) | {"labels": torch.tensor(rows["labels"][:])}


@pytest.mark.parametrize("norm", LENGTHS)
def test_a_step_has_length_one_per_token_sequence_or_batch(norm):
    gradient = torch.randn(3, 5, 8)
    step, finite = unit_step(gradient, None, norm)
    lengths = torch.linalg.vector_norm(step, dim=LENGTHS[norm])
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert finite and (step * gradient).sum() > 0


@pytest.mark.parametrize("norm", LENGTHS)
def test_the_scale_of_the_loss_does_not_matter(norm):
    gradient = torch.randn(3, 5, 8)
    torch.testing.assert_close(unit_step(65536 * gradient, None, norm)[0], unit_step(gradient / 128, None, norm)[0])


@pytest.mark.parametrize("norm", LENGTHS)
def test_padding_and_a_gradient_of_zero_stay_where_they_are(norm):
    gradient, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    gradient[0], mask[1, 3:] = 0, 0
    step, _ = unit_step(gradient, mask, norm)
    assert not step[0].any() and not step[1, 3:].any()
    assert step[1, :3].any() and step.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_gives_no_step(bad):
    gradient, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    gradient[2, 4, 0] = bad
    step, finite = unit_step(gradient, mask, "token")
    assert not finite and not step.any()
    mask[2, 4] = 0  # in padding it says nothing
    assert unit_step(gradient, mask, "token")[1]


def test_half_precision_gives_a_step_in_fp32():
    gradient = torch.full((1, 1, 512), 2e4, dtype=torch.float16)  # the square of one element overflows
    assert unit_step(gradient, None, "token")[0].norm().item() == pytest.approx(1)


def test_the_first_pass_leaves_no_gradient_and_the_second_starts_from_the_same_embeddings():
    embeddings, head, dropout = nn.Embedding(10, 4), nn.Linear(4, 1), nn.Dropout(0.5)
    ids, seen = torch.arange(6).view(2, 3), []

    def loss():
        out = embeddings_and_dropout(ids)
        seen.append(out)
        return head(out).square().mean()

    embeddings_and_dropout = nn.Sequential(embeddings, dropout)

    def second():
        assert all(p.grad is None for p in (*embeddings.parameters(), *head.parameters()))
        return loss()

    EmbeddingPerturbation("token")(embeddings_and_dropout, None, loss, second).backward()
    moved = torch.linalg.vector_norm(seen[1] - seen[0], dim=-1)
    torch.testing.assert_close(moved, torch.ones_like(moved))
    assert embeddings.weight.grad.abs().sum() > 0 and head.weight.grad is not None


def test_frozen_embeddings_are_perturbed_all_the_same():
    embeddings, head = nn.Embedding(10, 4).requires_grad_(False), nn.Linear(4, 1)
    seen = []

    def loss():
        seen.append(embeddings(torch.arange(6).view(2, 3)))
        return head(seen[-1]).square().mean()

    EmbeddingPerturbation("token")(embeddings, None, loss, loss).backward()
    assert not torch.equal(seen[0], seen[1])
    assert embeddings.weight.grad is None and head.weight.grad is not None


def test_embeddings_that_run_twice_in_a_pass_are_refused():
    embeddings = nn.Embedding(10, 4)

    def loss():
        return (embeddings(torch.arange(3)[None]) + embeddings(torch.arange(3)[None])).sum()

    with pytest.raises(RuntimeError, match="ran 2 times in one pass"):
        EmbeddingPerturbation("token")(embeddings, None, loss, loss)


def by_hand(model, batch, norm="token"):
    """The loss at e + g / ‖g‖ and its gradients, by the formula: embeddings in, no hooks."""
    encoder = model.bert
    inputs = {"input_ids": batch["input_ids"], "token_type_ids": batch.get("token_type_ids")}
    clean = encoder.embeddings(**{name: x for name, x in inputs.items() if x is not None})

    def loss(e):
        handle = encoder.embeddings.register_forward_hook(lambda *_: e)
        try:
            return model(**batch).loss
        finally:
            handle.remove()

    leaf = clean.detach().requires_grad_()
    loss(leaf).backward()
    length = torch.linalg.vector_norm(leaf.grad, dim=LENGTHS[norm], keepdim=True)
    step = leaf.grad / length.clamp(min=1e-12)
    model.zero_grad()
    value = loss(clean + step)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return value.item(), gradients


@pytest.mark.parametrize("norm", LENGTHS)
def test_any_recipe_takes_its_step_by_the_formula(make_finetune, batch, norm):
    trainer = make_finetune(dropout=0.0, perturbation="embedding", perturbation_norm=norm)
    trainer.model.train()
    value, gradients = by_hand(trainer.model, batch, norm)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert loss.item() > trainer.model(**batch).loss.item()  # it went up
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)


def test_fp16_scales_the_loss_of_the_first_pass(make_finetune, batch, monkeypatch):
    trainer = make_finetune(dropout=0.0, perturbation="embedding")
    trainer.model.train()
    plain = trainer.compute_loss(trainer.model, batch).item()
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**16))
    scaled, gradients = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, *a: scaled.append(loss.item()) or gradients(loss, *a))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(plain, rel=1e-5)
    assert scaled[0] > 1000


def test_skipped_steps_are_counted_in_the_log_and_trained_without(make_finetune, monkeypatch):
    trainer = make_finetune(max_steps=4, logging_steps=2, dropout=0.0, perturbation="embedding")
    exact = torch.autograd.grad

    def grad(loss, inputs):
        [gradient] = exact(loss, inputs)
        return [gradient * (math.nan if trainer.state.global_step == 2 else 1)]

    monkeypatch.setattr(torch.autograd, "grad", grad)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["perturbation_skipped"] for line in lines] == [0, 1]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_loss_that_is_nan_still_stops_by_name(make_finetune):
    trainer = make_finetune(max_steps=2, perturbation="embedding")
    original = trainer.loss_terms
    trainer.loss_terms = lambda model, inputs: ({"task": original(model, inputs)[0]["task"] * math.nan}, None)
    with pytest.raises(NotFiniteError, match="step 0, the batch whose first sequence"):
        trainer.train()


def test_the_teacher_runs_once_for_both_passes(make_stage_a, make_stage_b):
    stage_a = make_stage_a(max_steps=2, perturbation="embedding")
    stage_b = make_stage_b(max_steps=2, perturbation="embedding", soft_weight=0.5)
    for trainer, teacher in ((stage_a, stage_a.teacher), (stage_b, stage_b.encoder.predecessor)):
        runs = []
        teacher.bert.embeddings.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        trainer.train()
        assert len(runs) == 2, type(trainer).__name__


@pytest.mark.parametrize("train_head", [True, False])  # False: the embeddings are frozen
def test_replacement_is_perturbed_while_its_layers_change(make_stage_b, train_head):
    trainer = make_stage_b(max_steps=3, perturbation="embedding", train_head=train_head)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["perturbation_skipped"] for line in lines] == [0, 0, 0]


def test_accumulating_4_x_8_equals_1_x_32(make_finetune, assert_accumulation_changes_nothing):
    """Of a unit step per token; one per batch is of length 1 in every accumulated batch."""
    assert_accumulation_changes_nothing(lambda **changes: make_finetune(perturbation="embedding", **changes))


def test_bf16_trains(make_finetune):
    trainer = make_finetune(max_steps=3, bf16=True, perturbation="embedding")
    trainer.train()
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_gradient_checkpointing_changes_nothing(make_finetune, batch):
    losses = []
    for checkpointing in (False, True):
        trainer = make_finetune(dropout=0.0, perturbation="embedding")
        if checkpointing:
            trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append((loss.item(), trainer.model.bert.embeddings.word_embeddings.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    torch.testing.assert_close(losses[0][1], losses[1][1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"perturbation": "input"}, "perturbation='input'; allowed are embedding and null"),
        ({"perturbation_norm": "row"}, "perturbation_norm='row'; allowed are token, sequence, batch"),
        ({"perturbation": "embedding", "torch_compile": True}, "which torch_compile=true skips"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        FineTuneConfig(output_dir=str(tmp_path / "run"), **wrong)
    assert not (tmp_path / "run").exists()
