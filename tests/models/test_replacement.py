import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import fastkd
from fastkd.models import ReplacementSchedule
from fastkd.models.architectures import layers_of
from fastkd.models.student import all_but_layers

ALWAYS = ReplacementSchedule("constant", 1.0, 0)
SOMETIMES = ReplacementSchedule("constant", 0.3, 10**6)


@pytest.fixture
def make_encoder(make_model):
    """A predecessor of 4 layers and a student of 2 with weights of their own and no dropout."""

    def make(architecture="bert", schedule=SOMETIMES, layers=2, head="sequence", **arguments):
        predecessor = make_model(architecture, head)
        student = fastkd.create_student(make_model(architecture, head, seed=1), layers=layers)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        return fastkd.ReplaceableEncoder(predecessor, student, schedule, **arguments)

    return make


@pytest.fixture
def labelled(batch):
    return batch | {"labels": torch.tensor([0, 2])}


def _force(encoder, draw):
    encoder._draw = lambda step: draw


def test_at_rate_one_training_runs_the_plain_student(architecture, make_encoder, labelled):
    encoder = make_encoder(architecture, ALWAYS).train()
    out, plain = encoder(**labelled), encoder.student(**labelled)
    torch.testing.assert_close(out.logits, plain.logits, rtol=0, atol=0)
    torch.testing.assert_close(out.loss, plain.loss, rtol=0, atol=0)


def test_without_any_replacement_training_runs_the_predecessor(architecture, make_encoder, labelled):
    encoder = make_encoder(architecture).train()
    _force(encoder, (False, False))
    expected = encoder.predecessor(**labelled)
    out = encoder(**labelled)
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=0)


def test_evaluation_runs_the_student_alone(architecture, make_encoder, labelled):
    encoder = make_encoder(architecture).eval()
    _force(encoder, (False, False))
    torch.testing.assert_close(encoder(**labelled).logits, encoder.student(**labelled).logits, rtol=0, atol=0)


def test_gradient_reaches_the_drawn_student_layers_only(architecture, make_encoder, labelled):
    encoder = make_encoder(architecture).train()
    _force(encoder, (True, False))
    encoder(**labelled).loss.backward()
    drawn, other = layers_of(encoder.student)
    assert all(parameter.grad is not None for parameter in drawn.parameters())
    assert {id(p) for p in encoder.parameters() if p.grad is not None} == {id(p) for p in drawn.parameters()}
    assert all(parameter.grad is None for parameter in other.parameters())


def test_only_the_chosen_branch_runs(make_encoder, labelled):
    encoder = make_encoder().train()
    _force(encoder, (False, True))
    ran = []
    for owner, model in (("predecessor", encoder.predecessor), ("student", encoder.student)):
        for i, layer in enumerate(layers_of(model)):
            layer.register_forward_pre_hook(lambda *_, name=f"{owner} {i}": ran.append(name))
    encoder(**labelled)
    assert ran == ["predecessor 0", "predecessor 1", "student 1"]


def test_the_students_own_layers_are_back_after_a_forward_and_after_an_error(make_encoder, labelled):
    encoder = make_encoder().train()
    own = layers_of(encoder.student)
    _force(encoder, (False, True))
    encoder(**labelled)
    assert layers_of(encoder.student) is own
    with pytest.raises(IndexError):
        encoder(input_ids=torch.tensor([[10**6]]))
    assert layers_of(encoder.student) is own


def test_the_predecessor_is_frozen_and_stays_in_eval_mode(make_encoder):
    encoder = make_encoder().train()
    assert encoder.student.training
    assert not any(module.training for module in encoder.predecessor.modules())
    assert not any(parameter.requires_grad for parameter in encoder.predecessor.parameters())


def test_the_students_embeddings_and_head_are_the_predecessors(architecture, make_encoder):
    encoder = make_encoder(architecture)
    given = all_but_layers(encoder.predecessor)
    assert all(torch.equal(tensor, given[name]) for name, tensor in all_but_layers(encoder.student).items())


def test_labels_and_problem_type_are_the_predecessors(make_model):
    predecessor, student = make_model(), fastkd.create_student(make_model(), layers=2)
    predecessor.config.id2label, predecessor.config.problem_type = {0: "a", 1: "b", 2: "c"}, "regression"
    encoder = fastkd.ReplaceableEncoder(predecessor, student, SOMETIMES)
    assert encoder.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert encoder.config.problem_type == "regression"


# -- draws -------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_step_alone(make_encoder):
    one, other, reseeded = make_encoder(layers=4), make_encoder(layers=4), make_encoder(layers=4, seed=1)

    def draws(encoder, steps):
        found = {}
        for step in steps:
            encoder.set_step(step)
            torch.rand(step)  # what the global generator did in between must not matter
            found[step] = encoder.draw
        return found

    forward = draws(one, range(60))
    assert draws(other, reversed(range(60))) == forward
    assert draws(other, range(30, 60)) == {step: forward[step] for step in range(30, 60)}
    assert draws(reseeded, range(60)) != forward


def test_the_micro_batches_of_a_step_share_its_draw(make_encoder, labelled):
    encoder = make_encoder(layers=4).train()
    encoder.set_step(7)
    first = encoder(**labelled).logits
    torch.testing.assert_close(encoder(**labelled).logits, first, rtol=0, atol=0)


def test_every_draw_has_a_replacement_and_their_mean_is_the_effective_rate(make_model):
    student = fastkd.create_student(make_model(), layers=3, init="random")
    encoder = fastkd.ReplaceableEncoder(make_model(), student, SOMETIMES)
    draws = torch.tensor([encoder._draw(step) for step in range(6000)]).float()
    assert (draws.sum(1) > 0).all()
    assert encoder.rate == 0.3
    assert encoder.effective_rate == pytest.approx(0.4566, abs=5e-5)
    assert draws.mean().item() == pytest.approx(encoder.effective_rate, abs=0.012)  # three standard errors


def test_the_rate_follows_the_schedule(make_encoder):
    encoder = make_encoder(schedule=ReplacementSchedule.from_slope(0.3, 6e-4))
    encoder.set_step(500)
    assert encoder.rate == pytest.approx(0.6, abs=1e-12)
    encoder.set_step(1167)
    assert encoder.draw == (True, True)


@pytest.mark.parametrize("rate", [0, 1.5])
def test_a_schedule_of_ones_own_may_not_leave_zero_to_one(make_encoder, rate):
    with pytest.raises(ValueError, match=r"at step 0: it must lie in \(0, 1\]"):
        _ = make_encoder(schedule=lambda step: rate).draw


# -- groups ------------------------------------------------------------------------------------------------------------


def test_equal_depth_is_one_to_one_and_unequal_depth_contiguous(make_encoder):
    assert make_encoder(layers=4).groups == [[0], [1], [2], [3]]
    assert make_encoder(layers=3).groups == [[0], [1], [2, 3]]


def test_groups_can_be_given(make_encoder, labelled):
    encoder = make_encoder(groups=[[0, 1, 2], [3]]).train()
    _force(encoder, (False, False))
    torch.testing.assert_close(encoder(**labelled).logits, encoder.predecessor(**labelled).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "groups", [[[0, 1], [2]], [[0, 1], [3, 2]], [[2, 3], [0, 1]], [[0, 1, 2, 3], []], [[0, 1], [1, 2, 3]]]
)
def test_groups_that_are_no_partition_in_order_are_refused(make_encoder, groups):
    with pytest.raises(ValueError, match="predecessor's layers 0 to 3, each once, in order"):
        make_encoder(groups=groups)


def test_a_number_of_groups_other_than_student_layers_is_refused(make_encoder):
    with pytest.raises(ValueError, match="1 groups for 2 student layers"):
        make_encoder(groups=[[0, 1, 2, 3]])


# -- what may be trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train_head", "early", "late"), [(False, 0, 0), (True, 1, 1), ("after", 0, 1)])
def test_embeddings_and_head_are_trained_when_asked(make_encoder, labelled, train_head, early, late):
    encoder = make_encoder(schedule=ReplacementSchedule("constant", 0.5, 10), train_head=train_head).train()
    shell = [p for p in all_but_layers(encoder.student).values() if isinstance(p, torch.nn.Parameter)]
    for step, trained in ((0, early), (9, early), (10, late)):
        encoder.set_step(step)
        encoder.zero_grad()
        encoder(**labelled).loss.backward()
        assert sum(p.grad is not None for p in shell) == trained * len(shell)


def test_an_optimizer_built_before_the_first_step_holds_a_head_that_is_trained_later(make_encoder):
    encoder = make_encoder(train_head="after")
    assert encoder.student.classifier.weight.requires_grad
    assert not make_encoder(train_head=False).student.classifier.weight.requires_grad


def test_an_unknown_train_head_is_refused(make_encoder):
    with pytest.raises(ValueError, match="True, False or 'after'"):
        make_encoder(train_head="later")


# -- pairs that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "shown"), [({"hidden": 16}, "(16, 4)"), ({"heads": 8}, "(32, 8)")])
def test_unequal_widths_are_refused(make_model, sizes, shown):
    student = fastkd.create_student(make_model(), layers=2, init="random", **sizes)
    with pytest.raises(ValueError, match=re.escape(f"predecessor are (32, 4), of the student {shown}")):
        fastkd.ReplaceableEncoder(make_model(), student, SOMETIMES)


def test_another_head_is_refused(make_model):
    student = fastkd.create_student(make_model(head="token"), layers=2)
    with pytest.raises(ValueError, match="BertForSequenceClassification, student a BertForTokenClassification"):
        fastkd.ReplaceableEncoder(make_model(), student, SOMETIMES)


def test_another_number_of_labels_is_refused_by_name(make_model):
    predecessor = make_model(num_labels=5)
    student = fastkd.create_student(make_model(), layers=2)
    with pytest.raises(ValueError, match=r"classifier\.bias is \(5,\).*\(3,\)"):
        fastkd.ReplaceableEncoder(predecessor, student, SOMETIMES)


def test_another_dtype_is_refused(make_model):
    student = fastkd.create_student(make_model(), layers=2).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.bfloat16"):
        fastkd.ReplaceableEncoder(make_model(), student, SOMETIMES)


def test_a_deeper_student_is_refused(make_model):
    student = fastkd.create_student(make_model(), layers=6, init="random")
    with pytest.raises(ValueError, match="student has 6 layers, its predecessor only 4"):
        fastkd.ReplaceableEncoder(make_model(), student, SOMETIMES)


def test_a_modernbert_student_without_one_of_the_attention_types_is_refused(make_model):
    student = fastkd.create_student(make_model("modernbert"), layers=2, init=[0, 2])
    with pytest.raises(ValueError, match="sliding_attention"):
        fastkd.ReplaceableEncoder(make_model("modernbert"), student, SOMETIMES)


def test_a_deberta_with_a_convolution_needs_its_first_layer_alone(make_model, labelled):
    predecessor = make_model("deberta-v2", conv_kernel_size=3)
    student = fastkd.create_student(predecessor, layers=2)
    with pytest.raises(ValueError, match=r"first group must be \[0\]"):
        fastkd.ReplaceableEncoder(predecessor, student, SOMETIMES)
    encoder = fastkd.ReplaceableEncoder(predecessor, student.eval(), SOMETIMES, groups=[[0], [1, 2, 3]])
    with encoder._mixed((False, False)):
        torch.testing.assert_close(encoder.student(**labelled).logits, predecessor(**labelled).logits)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_the_state_is_the_students_alone(make_encoder):
    encoder = make_encoder()
    assert encoder.state_dict().keys() == encoder.student.state_dict().keys()
    other = make_encoder(layers=2)
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in encoder.state_dict().items()})
    assert all((parameter == 0).all() for parameter in other.student.parameters())
    assert not all((parameter == 0).all() for parameter in other.predecessor.parameters())


def test_a_checkpoint_names_the_predecessor_and_continues_the_student(architecture, make_encoder, tmp_path):
    encoder = make_encoder(architecture)
    for parameter in layers_of(encoder.student).parameters():
        parameter.data.add_(1)
    encoder.predecessor.config.name_or_path = "some/predecessor"
    encoder.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "replacement.json").read_text())
    assert record["predecessor"] == encoder.predecessor.name_or_path
    resumed = make_encoder(architecture)
    resumed.load_checkpoint(tmp_path)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_resuming_with_another_predecessor_is_refused_and_changes_nothing(make_encoder, tmp_path):
    make_encoder().save_pretrained(tmp_path)
    other = make_encoder()
    other.predecessor.classifier.bias.data[0] += 1
    resumed = fastkd.ReplaceableEncoder(other.predecessor, other.student, SOMETIMES)
    before = {name: tensor.clone() for name, tensor in resumed.state_dict().items()}
    with pytest.raises(ValueError, match="trained with predecessor_fingerprint"):
        resumed.load_checkpoint(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("change", [{"seed": 3}, {"groups": [[0], [1, 2, 3]]}])
def test_resuming_with_another_seed_or_other_groups_is_refused(make_encoder, tmp_path, change):
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"trained with {next(iter(change))}"):
        make_encoder(**change).load_checkpoint(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(make_encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no replacement\.json"):
        make_encoder().load_checkpoint(tmp_path)


def test_the_exported_student_loads_where_fastkd_cannot_be_imported(make_encoder, batch, tmp_path):
    encoder = make_encoder().eval()
    encoder.student.save_pretrained(tmp_path / "student")
    torch.save(batch, tmp_path / "batch.pt")
    code = """
import sys
sys.modules["fastkd"] = None
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/student").eval()
torch.save(model(**torch.load(sys.argv[1] + "/batch.pt")).logits, sys.argv[1] + "/logits.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), encoder(**batch).logits, rtol=0, atol=0)


def test_every_architectures_export_is_a_plain_model(architecture, make_encoder, batch, tmp_path):
    encoder = make_encoder(architecture).eval()
    encoder.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(**batch).logits, encoder(**batch).logits, rtol=0, atol=0)


# -- inside the ecosystem ----------------------------------------------------------------------------------------------


def test_gradient_checkpointing_of_the_student_changes_no_gradient(make_encoder, labelled):
    def gradients(checkpointing):
        encoder = make_encoder().train()
        _force(encoder, (False, True))
        if checkpointing:
            encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        encoder(**labelled).loss.backward()
        return [parameter.grad for parameter in layers_of(encoder.student)[1].parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("head", ["token", "masked"])
def test_other_heads_are_replaced_the_same_way(make_encoder, batch, head):
    encoder = make_encoder(head=head).train()
    _force(encoder, (False, False))
    expected = encoder.predecessor(**batch).logits
    torch.testing.assert_close(encoder(**batch).logits, expected, rtol=0, atol=0)
