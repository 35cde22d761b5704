"""The BiLSTM student: what padding cannot do to it, what it takes from its teacher, and its first two derivatives."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoModelForSequenceClassification

import fastkd
from fastkd.edge.artifact import open_artifact
from fastkd.explain import Classifier, GradientSettings, central_difference, distance, gradient_attribution
from fastkd.models import BiLstmConfig, BiLstmForSequenceClassification, create_bilstm
from fastkd.models.architectures import embeddings_of, layers_of
from fastkd.models.loading import load_model

LENGTHS = (7, 5, 1)


@pytest.fixture
def student():
    torch.manual_seed(0)
    config = BiLstmConfig(30, 6, 5, num_hidden_layers=2, num_labels=3, initializer_range=0.5)
    return BiLstmForSequenceClassification(config).double().eval()


@pytest.fixture
def sentences():
    """Ids of three sentences, of 7, 5 and 1 tokens, padded on the right."""
    ids = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _alone(student, sentences):
    rows = [sentences["input_ids"][row, None, :length] for row, length in enumerate(LENGTHS)]
    return torch.cat([student(row).logits for row in rows])


def test_it_is_torchs_bidirectional_lstm_over_packed_sequences(student, sentences):
    states = student.embeddings(sentences["input_ids"], None)
    for layer in layers_of(student):
        both = nn.LSTM(states.shape[2], 5, batch_first=True, bidirectional=True).double()
        state = dict(layer.forwards.named_parameters())
        state |= {f"{name}_reverse": weight for name, weight in layer.backwards.named_parameters()}
        both.load_state_dict(state)
        packed, _ = both(pack_padded_sequence(states, torch.tensor(LENGTHS), batch_first=True))
        states, _ = pad_packed_sequence(packed, batch_first=True)
    expected = student.classifier(states.sum(1) / torch.tensor(LENGTHS)[:, None])
    torch.testing.assert_close(student(**sentences).logits, expected)


def test_a_sentence_is_judged_as_if_it_were_alone(student, sentences):
    torch.testing.assert_close(student(**sentences).logits, _alone(student, sentences))


def test_padding_may_stand_on_the_left_and_in_the_middle(student, sentences):
    expected = _alone(student, sentences)
    left = {name: torch.stack([row.roll(7 - n) for row, n in zip(sentences[name], LENGTHS, strict=True)])
            for name in sentences}  # fmt: skip
    torch.testing.assert_close(student(**left).logits, expected)
    middle = {name: torch.stack([value, torch.zeros_like(value)], 2).flatten(1) for name, value in sentences.items()}
    torch.testing.assert_close(student(**middle).logits, expected)


def test_padding_has_no_influence_and_no_gradient(student, sentences):
    mask = sentences["attention_mask"]
    vectors = student.get_input_embeddings()(sentences["input_ids"]).detach()
    other = torch.where(mask[..., None] != 0, vectors, 1e3 * torch.randn_like(vectors)).requires_grad_()
    logits = student(inputs_embeds=other, attention_mask=mask).logits
    torch.testing.assert_close(logits, student(**sentences).logits, rtol=0, atol=0)
    logits.square().sum().backward()
    assert not other.grad[mask == 0].any() and other.grad[mask != 0].any(1).all()


def test_a_sequence_without_a_token_has_the_heads_bias(student, sentences):
    logits = student(sentences["input_ids"], torch.zeros(3, 7)).logits
    torch.testing.assert_close(logits, student.classifier.bias.expand(3, -1))


def test_without_a_mask_every_token_counts(student, sentences):
    ids = sentences["input_ids"]
    torch.testing.assert_close(student(ids).logits, student(ids, torch.ones(3, 7)).logits, rtol=0, atol=0)


def test_either_ids_or_embeddings_are_given(student, sentences):
    ids = sentences["input_ids"]
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        student(attention_mask=ids)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        student(ids, inputs_embeds=student.get_input_embeddings()(ids))


@pytest.mark.parametrize(
    ("labels", "classes", "loss"),
    [
        (torch.tensor([2, 0, 1]), 3, F.cross_entropy),
        (torch.tensor([0.5, 3.0, 4.5]), 1, lambda z, y: F.mse_loss(z[:, 0], y)),
        (torch.tensor([[1.0, 0], [0, 0], [1, 1]]), 2, F.binary_cross_entropy_with_logits),
    ],
    ids=["classes", "a score", "several labels"],
)
def test_the_loss_is_transformers_by_the_kind_of_labels(sentences, labels, classes, loss):
    student = BiLstmForSequenceClassification(BiLstmConfig(30, 6, 5, num_labels=classes)).eval()
    output = student(**sentences, labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


def test_a_step_of_training_reaches_every_parameter(student, sentences):
    student.train()(**sentences, labels=torch.tensor([2, 0, 1])).loss.backward()
    assert all(parameter.grad.any() for parameter in student.parameters())


# From a teacher


def test_words_labels_and_dtype_are_the_teachers(make_model):
    teacher = make_model().to(torch.bfloat16)
    teacher.config.id2label, teacher.config.label2id = {0: "no", 1: "so-so", 2: "yes"}, {"no": 0, "so-so": 1, "yes": 2}
    student = create_bilstm(teacher, layers=2, hidden=8)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert (student.dtype, student.config.id2label) == (torch.bfloat16, teacher.config.id2label)
    assert student.get_input_embeddings().padding_idx == teacher.config.pad_token_id
    assert (len(layers_of(student)), layers_of(student)[1].forwards.hidden_size) == (2, 8)
    student.get_input_embeddings().weight.data.zero_()
    assert teacher.get_input_embeddings().weight.any()


def test_narrower_words_keep_dot_products_as_well_as_that_width_can(make_model):
    teacher = make_model()
    words = teacher.get_input_embeddings().weight.detach().double()
    narrow = create_bilstm(teacher, layers=1, hidden=8, width=12).get_input_embeddings().weight.detach().double()
    lost = torch.linalg.svdvals(words)[12:]
    error = torch.linalg.matrix_norm(words @ words.T - narrow @ narrow.T)
    torch.testing.assert_close(error, lost.pow(4).sum().sqrt(), rtol=1e-5, atol=0)


def test_random_words_are_drawn_from_the_seed_alone(make_model):
    teacher = make_model()
    state = torch.get_rng_state()
    one, same, other = (create_bilstm(teacher, layers=1, hidden=8, init="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    words = [student.get_input_embeddings().weight for student in (one, other, teacher)]
    assert not torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])


def test_any_teacher_with_words_has_a_bilstm(architecture, make_model, batch):
    assert create_bilstm(make_model(architecture), layers=1, hidden=8, width=8)(**batch).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers=0: a positive whole number"),
        ({"hidden": 2.5}, "hidden=2.5: a positive whole number"),
        ({"width": 33}, "width=33: the teacher's embeddings are 32 wide; use init='random'"),
        ({"init": "first"}, 'init=\'first\': give "teacher" or "random"'),
        ({"dropout": 1.0}, "dropout=1.0: it must lie in"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make_model, settings, message):
    with pytest.raises(ValueError, match=message):
        create_bilstm(make_model(), **{"layers": 1, "hidden": 8} | settings)


def test_a_teacher_without_words_is_refused(make_model):
    with pytest.raises(TypeError, match="a transformers model is needed, got Linear"):
        create_bilstm(nn.Linear(2, 2), layers=1, hidden=8)
    teacher = make_model()
    teacher.set_input_embeddings(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="word embeddings are a Linear"):
        create_bilstm(teacher, layers=1, hidden=8)


# On disk


def test_it_is_loaded_as_it_was_saved(student, sentences, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is BiLstmForSequenceClassification and not loaded.training
    torch.testing.assert_close(loaded(**sentences).logits, student(**sentences).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "imports",
    [
        "import fastkd; from transformers import AutoModelForSequenceClassification as Auto",
        "from transformers import AutoModelForSequenceClassification as Auto; import fastkd",
    ],
    ids=["transformers later", "transformers before"],
)
def test_importing_fastkd_is_enough_to_load_one(student, tmp_path, imports):
    student.save_pretrained(tmp_path)
    program = f"{imports}; print(Auto.from_pretrained({str(tmp_path)!r}).num_labels)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr


def test_what_needs_a_transformer_refuses_it_by_name(student, tmp_path):
    with pytest.raises(ValueError, match="bilstm has no attention"), fastkd.tap(student, [-1]):
        pass
    with pytest.raises(ValueError, match="a student of a bilstm is not made from its layers; see create_bilstm"):
        fastkd.create_student(student, layers=1)
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BiLstmForSequenceClassification is not one of transformers"):
        load_model(tmp_path)  # as export and compress-embeddings load
    with pytest.raises(ValueError, match="is a BiLSTM; models of transformers are exported and measured"):
        open_artifact(tmp_path)  # as report and gate do


# Derivatives

TARGET = torch.tensor([2, 0, 1])


def _gradients(student, sentences, loss_of, dtype):
    """Of all parameters, of loss_of(student, batch)."""
    loss = loss_of(Classifier(student.to(dtype), embeddings_of(student)), sentences)
    gradients = torch.autograd.grad(loss, student.parameters(), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def _apart(scores, mask):
    """From scores that fall from the first token to the last."""
    wanted = torch.arange(7, 0, -1, dtype=scores.dtype) * mask
    return distance(scores, wanted / torch.linalg.vector_norm(wanted, dim=1, keepdim=True), mask)


def _exact(classifier, batch):
    scores = gradient_attribution(classifier, batch, GradientSettings(norm="l2"), target=TARGET, create_graph=True)
    return _apart(scores, batch["attention_mask"])


def _near(classifier, batch):
    return central_difference(
        classifier, batch, GradientSettings(norm="l2"), lambda a: _apart(a, batch["attention_mask"]), target=TARGET
    )


def test_both_derivatives_are_the_slopes(student, sentences):
    vectors = student.get_input_embeddings()(sentences["input_ids"]).detach().requires_grad_()

    def logits(vectors):
        return student(inputs_embeds=vectors, attention_mask=sentences["attention_mask"]).logits

    assert torch.autograd.gradcheck(logits, vectors, fast_mode=True)
    assert torch.autograd.gradgradcheck(logits, vectors, fast_mode=True)


def test_double_backward_and_central_difference_agree(student, sentences):
    exact, near = (_gradients(student, sentences, loss, torch.float64) for loss in (_exact, _near))
    error = torch.linalg.vector_norm(near - exact) / torch.linalg.vector_norm(exact)
    print(f"relative error of the gradient {error:.1e}")
    assert error < 1e-3


@pytest.mark.parametrize("loss", [_exact, _near], ids=["double backward", "central difference"])
def test_the_fused_lstm_of_fp32_has_the_same(student, sentences, loss):
    truth, found = (_gradients(student, sentences, loss, dtype) for dtype in (torch.float64, torch.float32))
    error = torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth)
    print(f"fp32: relative error of the gradient {error:.1e}")
    assert error < 2e-3


def test_dropout_is_drawn_alike_in_all_passes_of_a_difference(student, sentences):
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    found = []
    for step in (1e-2, 1e-3):
        torch.manual_seed(7)
        classifier = Classifier(student, embeddings_of(student))
        loss = central_difference(
            classifier, sentences, GradientSettings(), lambda a: a.square().sum(), target=TARGET, step=step
        )
        found.append(torch.autograd.grad(loss, student.classifier.weight)[0])
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-6)
