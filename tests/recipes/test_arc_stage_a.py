"""Stage A: a student learns its teacher's self-attention relations from text without labels."""

import math

import pytest
import torch

import fastkd
from fastkd.data import chunk_corpus, load_corpus
from fastkd.models.replacement import fingerprint
from fastkd.recipes import ArcStageAConfig, ArcStageATrainer


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_it_trains(make_stage_a):
    trainer = make_stage_a(max_steps=30, logging_steps=5)
    trainer.train()
    logged = losses(trainer)
    assert logged[-1] < 0.6 * logged[0]


def test_a_trained_student_has_relations_closer_to_the_teachers_on_other_text(make_stage_a, tokens, tokenizer):
    trainer = make_stage_a(max_steps=30)
    held_out = tokenizer.pad(
        [{"input_ids": ids} for ids in tokens["validation"]["input_ids"][:32]], return_tensors="pt"
    )

    def distance():
        trainer.model.eval()
        with torch.no_grad():
            terms, _ = trainer.loss_terms(trainer.model, {k: held_out[k] for k in ("input_ids", "attention_mask")})
        return sum(terms.values())

    before = distance()
    trainer.train()
    assert distance() < 0.5 * before


def test_every_relation_is_logged_under_its_name(make_stage_a):
    weights = {"query": 1.0, "key": 0.5, "value": 2.0}
    trainer = make_stage_a(max_steps=3, relations=weights)
    trainer.train()
    for line in trainer.state.log_history[:3]:
        assert sum(weight * line[f"loss_{name}"] for name, weight in weights.items()) == pytest.approx(
            line["loss"], abs=1e-5
        )
        assert all(line[f"loss_{name}"] > 0 for name in weights)


def test_several_layer_pairs_are_logged_one_by_one(make_stage_a):
    trainer = make_stage_a(max_steps=1, layer_pairs=[[1, 0, 1.0], [-1, -1, 0.5]], relations={"query": 1.0})
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss_query_1to0"] + 0.5 * line["loss_query_3to1"] == pytest.approx(line["loss"], abs=1e-5)


def test_a_resumed_run_repeats_every_loss_to_the_last_bit(make_stage_a, assert_resumes_exactly):
    assert_resumes_exactly(make_stage_a)


def test_accumulating_4_x_8_equals_1_x_32(make_stage_a, assert_accumulation_changes_nothing):
    assert_accumulation_changes_nothing(make_stage_a)


def test_a_student_of_another_width_can_learn(make_stage_a, make_teacher):
    teacher = make_teacher()
    student = fastkd.create_student(teacher, layers=2, hidden=16, heads=2, init="random")
    trainer = make_stage_a(teacher=teacher, student=student, relation_heads=8, max_steps=60, logging_steps=10)
    trainer.train()
    logged = losses(trainer)
    assert logged[-1] < 0.8 * logged[0]


def test_checkpointed_activations_change_no_loss(make_stage_a):
    runs = [make_stage_a(max_steps=3, dropout=0.0, activation_checkpointing=on) for on in (False, True)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-6)


def test_a_streamed_corpus_trains_and_resumes(make_teacher, tokenizer, settings, tmp_path):
    (tmp_path / "text.txt").write_text("the good film was a very bad plot\non a scene\n" * 80)
    text = chunk_corpus(load_corpus(tmp_path / "text.txt", streaming=True), tokenizer, 32)
    teacher = make_teacher()

    def make(**changes):
        config = ArcStageAConfig(**settings(relation_heads=8, max_steps=4, **changes))
        student = fastkd.create_student(teacher, layers=2)
        return ArcStageATrainer(student, config, teacher=teacher, processing_class=tokenizer, train_dataset=text)

    whole, resumed = make(save_strategy="steps", save_steps=2, save_total_limit=None), make()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert len(losses(whole)) == 4
    assert losses(resumed) == losses(whole)  # the first two stand in the checkpoint's history


def test_nothing_above_the_last_needed_projection_runs(make_stage_a):
    trainer = make_stage_a(max_steps=2, layer_pairs=[[2, 1, 1.0]])
    calls = {}

    def count(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for model, owner in ((trainer.teacher, "teacher"), (trainer.model, "student")):
        for name, module in model.named_modules():
            module.register_forward_pre_hook(count(f"{owner} {name}"))
    trainer.train()

    assert calls["teacher bert.encoder.layer.1"] == calls["student bert.encoder.layer.0"] == 2
    for last in ("teacher bert.encoder.layer.2", "student bert.encoder.layer.1"):
        assert calls[f"{last}.attention.self.value"] == 2
        assert f"{last}.attention.output" not in calls
        assert f"{last}.intermediate" not in calls
    assert "teacher bert.encoder.layer.3" not in calls
    assert not [name for name in calls if "pooler" in name or "classifier" in name]


def test_what_the_relations_do_not_reach_is_frozen_in_training_and_free_again_afterwards(make_stage_a):
    trainer = make_stage_a(max_steps=2)
    trainable = []
    original = trainer.training_step

    def training_step(*args, **kwargs):
        trainable.append({name for name, p in trainer.model.named_parameters() if p.requires_grad})
        return original(*args, **kwargs)

    trainer.training_step = training_step
    start = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):  # a second call of train() as well
        trainer.train()
    last = "bert.encoder.layer.1"
    for names in trainable:
        assert f"{last}.attention.self.query.weight" in names
        assert "bert.encoder.layer.0.output.dense.weight" in names
        above = [n for n in start if n.startswith((f"{last}.attention.output", f"{last}.output", "bert.pooler"))]
        assert above
        assert names.isdisjoint([*above, f"{last}.intermediate.dense.weight", "classifier.weight"])
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad
        if name not in trainable[0]:
            assert torch.equal(parameter, start[name])


def test_an_interrupted_run_leaves_a_trainable_student(make_stage_a):
    trainer = make_stage_a(max_steps=2)

    def interrupt(*_):
        raise KeyboardInterrupt

    trainer.loss_terms = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_embeddings_can_stay_the_teachers(make_stage_a):
    trainer = make_stage_a(max_steps=2, train_embeddings=False)
    before = trainer.model.get_input_embeddings().weight.clone()
    trainer.train()
    assert torch.equal(trainer.model.get_input_embeddings().weight, before)


def test_the_teacher_stays_as_it_is(make_stage_a, make_teacher):
    teacher = make_teacher(dropout=0.1)
    before = fingerprint(teacher)
    trainer = make_stage_a(teacher=teacher, max_steps=3)
    trainer.train()
    assert fingerprint(teacher) == before
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_dropout_never_runs_in_the_teacher(make_stage_a, tokens, tokenizer):
    """Twice the same loss for a student without dropout."""
    trainer = make_stage_a(teacher=None, dropout=0.5)
    trainer.model.eval()
    batch = tokenizer.pad([{"input_ids": ids} for ids in tokens["train"]["input_ids"][:8]], return_tensors="pt")
    first, second = (trainer.loss_terms(trainer.model, dict(batch))[0]["query"].item() for _ in range(2))
    assert first == second


def test_bf16_runs_in_both_models(make_stage_a):
    trainer = make_stage_a(max_steps=2, bf16=True)
    seen = []
    for model in (trainer.teacher, trainer.model):
        model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    trainer.train()
    assert seen == [torch.bfloat16] * 4
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_step_0_says_what_is_about_to_happen(make_stage_a, capsys):
    make_stage_a(max_steps=1, gradient_accumulation_steps=2).train()
    said = capsys.readouterr().out
    for phrase in (
        "teacher 4 layers x 32, student 2 layers x 32",
        "student layer 1 learns query, key, value of teacher layer 3",
        "8 heads",
        "relation_kl runs on",
        "64 sequences per optimizer step",
        "is padding",
        "1 query + 1 key + 1 value",
    ):
        assert phrase in " ".join(said.split()), said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"relation_heads": 12}, r"num_heads=12 does not divide the teacher's width 32; 8 and 16 divide both"),
        ({"layer_pairs": [[4, -1, 1.0]]}, r"layer_pairs, teacher.*layer 4 is out of range.*4 layers"),
        ({"layer_pairs": [[-1, -3, 1.0]]}, r"layer_pairs, student.*layer -3 is out of range.*2 layers"),
        (
            {"layer_pairs": [[-1, -1]]},
            r"layer_pairs=\[\[-1, -1\]\]: a list of \[teacher layer, student layer, weight\]",
        ),
        ({"layer_pairs": []}, r"layer_pairs=\[\]"),
        ({"relations": {"querry": 1.0}}, r"querry.*'query', 'key', 'value'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_a_folder_is_made(make_stage_a, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_stage_a(output_dir=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_relation_heads_must_divide_the_students_width_too(make_stage_a, make_teacher, tmp_path):
    teacher = make_teacher()
    student = fastkd.create_student(teacher, layers=2, hidden=24, heads=2, init="random")
    with pytest.raises(ValueError, match="num_heads=16 does not divide the student's width 24; 4 and 8 divide both"):
        make_stage_a(teacher=teacher, student=student, relation_heads=16, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(make_teacher, tokenizer, windows, settings, tmp_path):
    teacher = make_teacher(vocab_size=len(tokenizer) - 1)
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens, the teacher's embedding {len(tokenizer) - 1} rows"):
        ArcStageATrainer(
            fastkd.create_student(teacher, layers=2),
            ArcStageAConfig(**settings(output_dir=tmp_path / "run", relation_heads=8)),
            teacher=teacher,
            processing_class=tokenizer,
            train_dataset=windows,
        )
    assert not (tmp_path / "run").exists()


def test_nan_in_the_teacher_names_step_and_batch_and_the_last_good_checkpoint_stays(make_stage_a, tmp_path):
    """The teacher goes bad after four steps; the checkpoint of step 3 must be there and load."""
    trainer = make_stage_a(
        output_dir=tmp_path, save_strategy="steps", save_steps=3, save_total_limit=1, logging_steps=100, max_steps=12
    )
    original, first_ids = trainer.loss_terms, []

    def loss_terms(model, inputs):
        if trainer.state.global_step == 4:
            trainer.teacher.bert.encoder.layer[3].attention.self.key.weight.data[0, 0] = math.nan
            first_ids.append(inputs["input_ids"][0, :8].tolist())
        return original(model, inputs)

    trainer.loss_terms = loss_terms
    with pytest.raises(fastkd.recipes.NotFiniteError, match=r"step 4, .*teacher holds NaN") as caught:
        trainer.train()
    assert str(first_ids[0]) in str(caught.value)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = make_stage_a(max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
