"""EGKD under autocast: what runs in half precision, and what would drown in its rounding or underflow in it."""

import math

import pytest
import torch

UNDERFLOWS = 1e-7  # the gradient of a score, scaled by this, is 0 in fp16


@pytest.mark.parametrize("second_order", ["central_difference", "exact"])
def test_bf16_takes_differences_in_fp32_and_runs_the_rest_in_bf16(make_egkd, second_order):
    trainer = make_egkd(max_steps=3, bf16=True, second_order=second_order)
    seen = []
    trainer.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    trainer.train()
    assert seen.count(torch.float32) == 3 * (3 if second_order == "central_difference" else 0)
    assert seen.count(torch.bfloat16) == 3 * 3  # labels, one mask, selected tokens
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(math.isfinite(line["loss"]) and line["explanations_skipped"] == 0 for line in lines)


def scale_scores(model) -> None:
    with torch.no_grad():
        model.classifier.weight.mul_(UNDERFLOWS)


def in_fp16(trainer, monkeypatch) -> None:
    """The trainer's passes as on a GPU in fp16: accelerate has fp16 only there."""
    autocast = torch.autocast("cpu", torch.float16)
    monkeypatch.setattr(trainer.args, "fp16", True)
    monkeypatch.setattr(trainer.accelerator, "autocast", lambda: autocast)
    trainer.model._original_forward = trainer.model.forward
    trainer.model.forward = autocast(trainer.model.forward)
    trainer._explainable = None  # found before


def test_in_fp16_the_exact_form_explains_the_student_without_autocast(make_egkd, monkeypatch):
    """The loss has a scaler against underflow, the score that is explained has none."""
    trainer = make_egkd(branches={"gradient": 1.0}, second_order="exact", dropout=0.0, use_cpu=True)
    scale_scores(trainer.model.eval())
    [batch, *_] = trainer.get_train_dataloader()
    found = []
    for half in (False, True):
        if half:
            in_fp16(trainer, monkeypatch)
        terms, outputs = trainer.loss_terms(trainer.model, batch)
        assert outputs.logits.dtype == (torch.float16 if half else torch.float32)
        term = terms["gradient"]
        found.append([term.detach(), *torch.autograd.grad(term, list(trainer.model.bert.encoder.parameters()))])
    for expected, under_autocast in zip(*found, strict=True):
        assert expected.any() and torch.equal(under_autocast, expected)


def test_in_fp16_a_running_teacher_is_explained_without_autocast(make_egkd, make_teacher, monkeypatch):
    teacher = make_teacher(dropout=0.0)
    trainer = make_egkd(
        teacher=teacher, stored=False, branches={"gradient": 1.0}, dropout=0.0, max_steps=1, use_cpu=True
    )
    trainer.train()
    scale_scores(teacher)
    [batch, *_] = trainer.get_train_dataloader()
    expected = trainer.targets(batch)["gradient"]
    in_fp16(trainer, monkeypatch)
    given = trainer.targets(dict(batch))
    assert given["logits"].dtype == torch.float16
    assert expected.any() and torch.equal(given["gradient"], expected)
