"""LRC-BERT's general distillation: a student of any shape learns its teacher's hidden states from text."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import fastkd
from fastkd.recipes import LrcBertGeneralConfig, LrcBertGeneralTrainer
from fastkd.recipes.lrc_bert_student import PROJECTIONS, match_layers, sequence_ids


@pytest.fixture(scope="module")
def make_general(make_teacher, tokenizer, windows, settings):
    """make_general(student=.., ..): the trainer of a narrow student of two layers, from random weights."""

    def make(dropout=0.1, student=None, projections=None, **changes):
        teacher = make_teacher(dropout=dropout).bert
        shape = {"layers": 2, "hidden": 24, "heads": 4, "init": "random"}
        return LrcBertGeneralTrainer(
            student or fastkd.create_student(teacher, **shape),
            LrcBertGeneralConfig(**settings(**{"per_device_train_batch_size": 32} | changes)),
            teacher=teacher,
            processing_class=tokenizer,
            train_dataset=windows,
            projections=projections,
        )

    return make


def logged(trainer, name="loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize("pooling", ["cls", "mean", "token"])
def test_it_trains(make_general, pooling):
    trainer = make_general(max_steps=30, logging_steps=10, pooling=pooling)
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.3
    assert logged(trainer) == pytest.approx(logged(trainer, "loss_contrast"), abs=1e-5)


def test_the_encoder_is_left_with_its_maps_for_the_next_phase(make_general, tmp_path):
    trainer = make_general(max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path))
    saved = AutoModel.from_pretrained(tmp_path)
    for name, tensor in trainer.model.student.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    maps = load_file(tmp_path / PROJECTIONS)
    assert [tuple(tensor.shape) for tensor in maps.values()] == [(32, 24)] * 2
    following = make_general(projections=tmp_path)
    for name, tensor in following.model.contrast.state_dict().items():
        assert torch.equal(tensor, maps[name])


def test_nothing_above_the_last_matched_layer_runs_or_changes(make_general):
    trainer = make_general(max_steps=2, layer_pairs=[[1, 0]])
    above = trainer.model.student.encoder.layer[1]
    before = {name: tensor.clone() for name, tensor in above.state_dict().items()}
    above.register_forward_hook(lambda *_: pytest.fail("it ran"))
    trainer.train()
    for name, tensor in above.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_maps_of_other_widths_or_layers_are_refused(make_general, make_teacher, tmp_path):
    trainer = make_general(max_steps=1)
    trainer.save_model(str(tmp_path / "maps"))
    with pytest.raises(ValueError, match="holds 2 maps of 24 to 32, the matched layers ask for 1 of 24 to 32"):
        make_general(projections=tmp_path / "maps", layer_pairs=[[-1, -1]], output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=f"holds no {PROJECTIONS}"):
        make_general(projections=tmp_path, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("teacher", "student", "expected"), [(12, 4, [2, 5, 8, 11]), (6, 4, [0, 2, 3, 5]), (4, 1, [3])]
)
def test_layers_match_uniformly(make_teacher, teacher, student, expected):
    teacher = make_teacher(layers=teacher)
    pairs = match_layers(fastkd.create_student(teacher, layers=student), teacher, None)
    assert pairs == list(zip(expected, range(student), strict=True))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[4, -1]], r"layer_pairs, teacher.*layer 4 is out of range.*4 layers"),
        ([[-1, -3]], r"layer_pairs, student.*layer -3 is out of range.*2 layers"),
        ([[-1, -1, 1.0]], r"a list of \[teacher layer, student layer\] is needed"),
        ([], r"layer_pairs=\[\]"),
    ],
)
def test_layers_that_do_not_match_are_refused_before_a_folder_is_made(make_general, tmp_path, pairs, message):
    with pytest.raises(ValueError, match=message):
        make_general(layer_pairs=pairs, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_deeper_than_its_teacher_needs_pairs(make_general, make_teacher, tmp_path):
    student = fastkd.create_student(make_teacher(), layers=6, init="random")
    with pytest.raises(ValueError, match=r"the student has 6 layers, its teacher 4; .*layer_pairs="):
        make_general(student=student, output_dir=tmp_path / "run")
    make_general(student=student, layer_pairs=[[-1, -1], [0, 1]], max_steps=1).train()


def test_ids_tell_sequences_apart_however_they_are_padded():
    right = torch.tensor([[1, 5, 2, 0, 0], [1, 2, 5, 0, 0], [1, 5, 2, 7, 0]])
    left = torch.tensor([[0, 1, 5, 2], [0, 1, 2, 5], [1, 5, 2, 7]])
    ids = sequence_ids(right, right != 0)
    assert torch.equal(ids, sequence_ids(left, (left != 0).int()))
    assert len(set(ids.tolist())) == 3


def test_a_sentence_that_occurs_twice_is_no_negative_of_itself(make_general, tokens, tokenizer):
    trainer = make_general(dropout=0.0)
    ids = tokens["train"]["input_ids"][0]
    batch = dict(tokenizer.pad([{"input_ids": ids}] * 3, return_tensors="pt"))
    single = {name: tensor[:1] for name, tensor in batch.items()}
    three, one = (trainer.loss_terms(trainer.model, inputs)[0]["contrast"] for inputs in (batch, single))
    torch.testing.assert_close(three, one)
