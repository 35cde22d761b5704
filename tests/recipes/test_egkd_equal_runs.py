"""What changes how EGKD runs and not what it learns: resuming, accumulation, workers, gradient checkpointing."""

import pytest
import torch

FORMS = ["exact", "central_difference"]


def losses_of(trainer) -> list[dict[str, float]]:
    """The loss and every term of each step."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name.startswith("loss")} for line in lines]


@pytest.mark.parametrize("second_order", FORMS)
def test_a_resumed_run_repeats_every_loss_to_the_last_bit(make_egkd, assert_resumes_exactly, second_order):
    """With dropout, all branches, two masks, and a gradient branch that begins in the middle."""
    how = {"explain_after": 0.3, "masks": 2, "explain_every": 2, "second_order": second_order}
    assert_resumes_exactly(lambda **changes: make_egkd(**how, **changes))


@pytest.mark.parametrize("second_order", FORMS)
@pytest.mark.parametrize("share", [0.5, 1.0], ids=["half the sequences", "the labels' forward"])
def test_accumulating_4_x_8_equals_1_x_32(make_egkd, assert_accumulation_changes_nothing, second_order, share):
    how = {"second_order": second_order, "explain_share": share}
    # A central difference is one of two numbers nearly alike, whose rounding is another in a part of a batch.
    atol = 1e-5 if second_order == "central_difference" else 1e-6
    assert_accumulation_changes_nothing(lambda **changes: make_egkd(**how, **changes), atol)


def test_workers_load_what_the_trainer_loads_itself(make_egkd):
    alone, workers = (make_egkd(max_steps=2, dropout=0.0, dataloader_num_workers=count) for count in (0, 1))
    for trainer in (alone, workers):
        trainer.train()
    assert losses_of(alone) == losses_of(workers)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_central_differences_are_the_same_with_gradient_checkpointing(make_egkd, dropout):
    """Layers that run again draw the dropout of the pass that they belong to."""
    trained = []
    for checkpointing in (False, True):
        trainer = make_egkd(
            branches={"gradient": 1e3}, second_order="central_difference", dropout=dropout, max_steps=3,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        ran = []
        trainer.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(
            lambda *_, ran=ran: ran.append(1)
        )
        trainer.train()
        trained.append((losses_of(trainer), trainer.model.state_dict(), len(ran)))
    (plain, expected, forwards), (checkpointed, found, with_repeats) = trained
    assert checkpointed == plain and with_repeats > forwards
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
