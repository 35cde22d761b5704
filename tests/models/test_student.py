import pytest
import torch
from transformers import AutoModelForSequenceClassification

import fastkd
from fastkd.models.architectures import layers_of
from fastkd.models.student import all_but_layers, contiguous_groups


def _equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("init", "chosen"), [("first", [0, 1]), ("spaced", [1, 3]), ([0, 3], [0, 3]), ([2, -1], [2, 3])]
)
def test_layers_embeddings_and_head_are_the_teachers(architecture, init, chosen, make_model, batch):
    teacher = make_model(architecture)
    student = fastkd.create_student(teacher, layers=2, init=init)
    shell, teacher_shell = all_but_layers(student), all_but_layers(teacher)
    assert all(torch.equal(tensor, teacher_shell[name]) for name, tensor in shell.items())
    for target, source in zip(layers_of(student), chosen, strict=True):
        given, wanted = layers_of(teacher)[source].state_dict(), target.state_dict()
        assert all(torch.equal(tensor, given[name]) for name, tensor in wanted.items())
    assert student(**batch).logits.shape == (2, 3)


def test_a_student_of_full_depth_is_the_teacher(architecture, make_model, batch):
    teacher = make_model(architecture)
    student = fastkd.create_student(teacher, layers=4)
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("teacher", "student", "groups"),
    [
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (6, 6, [[0], [1], [2], [3], [4], [5]]),
        (6, 4, [[0], [1, 2], [3], [4, 5]]),
        (12, 1, [list(range(12))]),
    ],
)
def test_groups_are_contiguous_and_as_even_as_possible(teacher, student, groups):
    assert contiguous_groups(teacher, student) == groups


def test_spaced_takes_1_3_5_of_6(make_model):
    teacher = make_model(num_hidden_layers=6)
    student = fastkd.create_student(teacher, layers=3, init="spaced")
    for layer, source in zip(layers_of(student), (1, 3, 5), strict=True):
        assert _equal(layer, layers_of(teacher)[source])


@pytest.mark.parametrize("head", ["sequence", "token", "answer", "masked", "bare"])
def test_the_student_has_the_teachers_class_labels_and_dtype(architecture, head, make_model):
    teacher = make_model(architecture, head).to(torch.bfloat16)
    names = {i: f"class {i}" for i in range(teacher.config.num_labels)}
    teacher.config.id2label = names
    student = fastkd.create_student(teacher, layers=1)
    assert type(student) is type(teacher)
    assert student.dtype == torch.bfloat16
    assert student.config.id2label == names
    assert not student.training


def test_the_teacher_is_not_changed(architecture, make_model):
    teacher, same = make_model(architecture), make_model(architecture)
    student = fastkd.create_student(teacher, layers=2, init="spaced")
    for parameter in student.parameters():
        parameter.data.zero_()
    assert _equal(teacher, same)
    assert teacher.config.num_hidden_layers == 4
    assert len(layers_of(teacher)) == 4


def test_a_narrower_student_has_the_asked_sizes(architecture, make_model, batch):
    student = fastkd.create_student(make_model(architecture), layers=3, hidden=24, heads=3, ffn=40, init="random")
    with fastkd.tap(student, [2]) as taps:
        assert student(**batch).logits.shape == (2, 3)
    assert len(layers_of(student)) == 3
    assert taps[2]["key"].shape == (2, 11, 24)


def test_a_narrower_students_feed_forward_keeps_the_teachers_proportion(architecture, make_model):
    config = fastkd.create_student(make_model(architecture), layers=1, hidden=16, init="random").config
    assert (config.hidden_dim if architecture == "distilbert" else config.intermediate_size) == 24


def test_a_random_student_may_be_deeper(architecture, make_model, batch):
    student = fastkd.create_student(make_model(architecture), layers=6, init="random")
    assert len(layers_of(student)) == 6
    assert student(**batch).logits.shape == (2, 3)


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone(make_model):
    teacher = make_model()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (fastkd.create_student(teacher, layers=2, init="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert _equal(one, same)
    assert not _equal(one, other)


def test_a_modernbert_student_keeps_the_attention_type_of_each_copied_layer(make_model):
    student = fastkd.create_student(make_model("modernbert"), layers=2, init=[1, 2])
    assert [layer.attention_type for layer in layers_of(student)] == ["sliding_attention", "full_attention"]
    assert student.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_bare_encoder_without_a_pooler_gives_a_student_without_one(make_model, batch):
    teacher = make_model(head="bare")
    teacher.pooler = None
    student = fastkd.create_student(teacher, layers=2)
    assert student(**batch).pooler_output is None


def test_a_tied_masked_lm_head_stays_tied(make_model):
    student = fastkd.create_student(make_model(head="masked"), layers=2)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_a_saved_student_loads_as_a_plain_model(architecture, make_model, batch, tmp_path):
    student = fastkd.create_student(make_model(architecture), layers=2, init="spaced")
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"layers": 2.0}, "whole number of layers"),
        ({"layers": 5}, "there are 4 to copy"),
        ({"layers": 2, "init": "last"}, '"first", "spaced", "random"'),
        ({"layers": 2, "init": [0, 4]}, "layer 4 is out of range; this model has 4 layers: 0 to 3"),
        ({"layers": 2, "init": [0, 1, 2]}, "names 3 layers for a student of 2"),
        ({"layers": 2, "hidden": 16}, r"differ from the teacher's \(32, 4, 48\).*init='random'"),
        ({"layers": 2, "ffn": 16}, "init='random'"),
        ({"layers": 2, "hidden": 30, "init": "random"}, "heads=4 does not divide hidden=30; possible: 1, 2, 3, 5, 6"),
        ({"layers": 2, "heads": 0, "init": "random"}, "heads=0: a positive whole number"),
    ],
)
def test_impossible_students_are_refused_with_what_is_allowed(arguments, message, make_model):
    with pytest.raises(ValueError, match=message):
        fastkd.create_student(make_model(), **arguments)


def test_a_teacher_that_is_no_transformers_model_is_refused():
    with pytest.raises(TypeError, match="transformers model is needed, got Linear"):
        fastkd.create_student(torch.nn.Linear(1, 1), layers=1)


def test_a_student_drawn_anew_from_a_compressed_teacher_is_dense(make_model, tmp_path):
    teacher = make_model()
    teacher.config.quantization_config = {"quant_method": "sparse_embedding"}
    student = fastkd.create_student(teacher, layers=1, init="random")
    student.save_pretrained(tmp_path)
    assert _equal(student, AutoModelForSequenceClassification.from_pretrained(tmp_path))
