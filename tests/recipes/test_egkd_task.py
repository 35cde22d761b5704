"""EGKD on a task: labels, soft labels and branches of explanations, from stored results or beside a running teacher."""

import pytest
import torch
from datasets import Value

import fastkd
from fastkd.data.wordpiece import train_wordpiece
from fastkd.explain import distance, gradient_attribution
from fastkd.losses import soft_label_loss
from fastkd.recipes import EgkdConfig, EgkdTrainer
from fastkd.recipes.egkd_teacher import classifier_of

ALL = {"gradient": 10.0, "perturbation": 0.5, "selection": 0.5}


def lines_of(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


def batch_of(trainer, rows=range(12)) -> dict:
    """A batch of training examples as the trainer's collator makes it."""
    data = trainer.train_dataset.select_columns(["input_ids", "attention_mask", "labels", "example"])
    return trainer.data_collator([data[i] for i in rows])


@pytest.fixture(scope="module")
def trained_teacher(make_finetune):
    trainer = make_finetune(max_steps=80)
    trainer.train()
    return trainer.model.eval()


@pytest.mark.parametrize(
    ("branch", "weight"), [("gradient", 100.0), ("perturbation", 1.0), ("selection", 1.0)], ids=lambda value: str(value)
)
def test_a_branch_trains_and_its_student_beats_the_untrained_one(make_egkd, trained_teacher, task, branch, weight):
    trainer = make_egkd(teacher=trained_teacher, branches={branch: weight}, max_steps=40, learning_rate=5e-3)
    trainer.compute_metrics = task.compute_metrics
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    term = [line[f"loss_{branch}"] for line in lines_of(trainer)]
    assert sum(term[-6:]) < 0.7 * sum(term[:6])
    assert trainer.evaluate()["eval_accuracy"] > max(before, 0.9)


def test_every_term_is_logged_and_their_weighted_sum_is_the_loss(make_egkd):
    trainer = make_egkd(max_steps=2, soft_weight=0.6)
    trainer.train()
    weights = {"task": 0.4, "soft": 0.6, **ALL}
    for line in lines_of(trainer):
        terms = {name.removeprefix("loss_"): line[name] for name in line if name.startswith("loss_")}
        assert terms.keys() == weights.keys() and line["explanations_skipped"] == 0
        assert sum(weights[name] * term for name, term in terms.items()) == pytest.approx(line["loss"], abs=1e-6)


def test_branches_begin_after_their_share_of_the_steps_and_the_gradient_comes_every_other_step(make_egkd):
    trainer = make_egkd(max_steps=6, explain_after=0.3, explain_every=2)
    trainer.train()
    begun = [{name for name in ALL if f"loss_{name}" in line} for line in lines_of(trainer)]
    other = {"perturbation", "selection"}
    assert begun == [set(), set(), set(ALL), other, set(ALL), other]


def test_the_gradient_comes_every_other_step_from_the_first_one_with_branches_on(make_egkd):
    trainer = make_egkd(branches={"gradient": 1.0}, max_steps=6, explain_after=0.9, explain_every=2)
    trainer.train()
    assert ["loss_gradient" in line for line in lines_of(trainer)] == [False] * 5 + [True]


def test_scores_that_are_not_normalised_are_stored_as_they_are(make_egkd):
    """In fp16 a confident teacher's would be 0."""
    dtypes = [
        make_egkd(branches={"gradient": 1.0}, gradient={"norm": norm})._teacher.per_token["gradient"].dtype
        for norm in ("l2", None)
    ]
    assert dtypes == [torch.float16, torch.float32]


def test_training_data_without_labels_serves_soft_labels_alone(make_egkd, tokens):
    data = tokens["train"].remove_columns("labels")
    for how in ({}, {"soft_weight": 1.0, "target": "label", "stored": False}):
        with pytest.raises(ValueError, match=r"the training data has the columns .*; labels are needed"):
            make_egkd(data=data, **{"stored": False} | how)
    with pytest.raises(ValueError, match="target='label' needs labels; the data has the columns"):
        make_egkd(data=data, soft_weight=1.0, target="label")
    trainer = make_egkd(data=data, soft_weight=1.0, max_steps=1)
    trainer.train()
    [line] = lines_of(trainer)
    assert "loss_task" not in line and all(line[f"loss_{name}"] > 0 for name in ("soft", *ALL))


def test_without_a_branch_it_is_plain_distillation(make_egkd, make_teacher):
    trainer = make_egkd(branches={}, dropout=0.0, soft_weight=0.7, temperature=3.0)
    batch = batch_of(trainer)
    assert batch["teacher"].keys() == {"logits"} and "masks" not in batch
    terms, output = trainer.loss_terms(trainer.model.eval(), batch)
    with torch.no_grad():
        teacher = make_teacher()(batch["input_ids"], batch["attention_mask"])
    assert terms.keys() == trainer.weights.keys() == {"task", "soft"}
    torch.testing.assert_close(terms["task"], torch.nn.functional.cross_entropy(output.logits, batch["labels"]))
    torch.testing.assert_close(terms["soft"], soft_label_loss(output.logits, teacher.logits, 3.0), atol=1e-5, rtol=1e-2)


def test_plain_distillation_may_be_perturbed(make_egkd):
    trainer = make_egkd(branches={"gradient": 0.0}, perturbation="embedding", max_steps=2)
    trainer.train()
    assert all(line["perturbation_skipped"] == 0 and "loss_gradient" not in line for line in lines_of(trainer))


def test_attributions_of_every_class_are_stored_and_matched(make_egkd):
    stored, running = (
        make_egkd(branches={"gradient": 1.0}, target="all", stored=stored, dropout=0.0, max_steps=2)
        for stored in (True, False)
    )
    for trainer in (stored, running):
        trainer.train()
    for one, other in zip(lines_of(stored), lines_of(running), strict=True):
        assert one["loss_gradient"] == pytest.approx(other["loss_gradient"], rel=1e-2) and one["loss_gradient"] > 0


@pytest.mark.parametrize("target", ["predicted", "label", "all"])
def test_the_gradient_term_is_the_distance_of_the_attributions(make_egkd, make_teacher, tokenizer, target):
    """From a teacher that runs, so that nothing is rounded."""
    sections = {"gradient": {"method": "integrated_gradients", "steps": 3, "reduce": "sum", "norm": "l1"}}
    teacher = make_teacher(dropout=0.0)
    trainer = make_egkd(
        teacher=teacher, stored=False, branches={"gradient": 1.0}, dropout=0.0, target=target, max_steps=1, **sections
    )
    trainer.train()
    batch = batch_of(trainer)
    terms, _ = trainer.loss_terms(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    classes = {"predicted": teacher(**inputs).logits.argmax(1), "label": batch["labels"], "all": "all"}[target]
    scores = [
        gradient_attribution(classifier_of(model, tokenizer), inputs, trainer.args.explainer, target=classes)
        for model in (trainer.model, teacher)
    ]
    torch.testing.assert_close(terms["gradient"].detach(), distance(*scores, batch["attention_mask"]))
    assert terms["gradient"] > 0


def test_central_differences_and_double_backward_train_alike(make_egkd):
    """Plain SGD on the gradient branch alone, but for a trace of soft labels: parameters move by the same gradient."""
    moved = {}
    for form in ("exact", "central_difference"):
        trainer = make_egkd(
            branches={"gradient": 1e5}, soft_weight=1.0, dropout=0.0, second_order=form, optim="sgd",
            learning_rate=1e-2, max_grad_norm=0.0, max_steps=1,
        )  # fmt: skip
        start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train()
        moved[form] = torch.cat([(tensor - start[n]).flatten() for n, tensor in trainer.model.state_dict().items()])
    error = (moved["exact"] - moved["central_difference"]).norm() / moved["exact"].norm()
    print(f"relative error of the step: {error:.1e}")
    assert moved["exact"].norm() > 1e-4 and error < 1e-2


@pytest.mark.parametrize(("second_order", "forwards"), [("exact", 1), ("central_difference", 3)])
def test_the_forward_of_the_labels_serves_the_explanation_too(make_egkd, second_order, forwards):
    """Double backward needs no further forward, a central difference two."""
    trainer = make_egkd(branches={"gradient": 1.0}, max_steps=1, second_order=second_order)
    ran = []
    trainer.model.classifier.register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    assert len(ran) == forwards


def test_one_forward_of_a_running_teacher_gives_logits_and_attributions(make_egkd, make_teacher):
    teacher = make_teacher(dropout=0.0)
    trainer = make_egkd(teacher=teacher, stored=False, branches={"gradient": 1.0}, max_steps=2)
    ran = []
    teacher.classifier.register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    assert len(ran) == 2 and all(line["loss_gradient"] > 0 for line in lines_of(trainer))


@pytest.mark.parametrize("branch", ["perturbation", "selection"])
def test_masked_passes_have_the_embeddings_of_the_labels_forward(make_egkd, branch):
    """Their gradient reaches the word embeddings, a large table, in one backward."""
    trainer = make_egkd(branches={branch: 1.0}, max_steps=1)
    ran = []
    table = trainer.model.bert.embeddings.word_embeddings
    table.register_forward_hook(lambda module, ids, vectors: vectors.register_hook(lambda _: ran.append(1)) and None)
    trainer.train()
    assert len(ran) == 1


def test_the_last_step_of_the_shortest_run_has_branches(make_egkd):
    trainer = make_egkd(branches={"gradient": 1.0}, max_steps=1, explain_after=0.9)
    trainer.train()
    assert lines_of(trainer)[0]["loss_gradient"] > 0


def test_a_share_of_the_sequences_is_explained_and_the_sum_over_batches_is_their_mean(make_egkd):
    trainer = make_egkd(branches={"gradient": 1.0}, dropout=0.0, explain_share=0.25)
    whole = make_egkd(branches={"gradient": 1.0}, dropout=0.0)
    batch, [branch] = batch_of(trainer, range(16)), trainer.branches
    rows = []
    for trainer.state.global_step in range(4):
        trainer.state.max_steps = 100
        chosen = branch.rows(trainer._explained(batch, {}))
        alone, _ = whole.loss_terms(whole.model.eval(), batch_of(whole, chosen))
        terms, _ = trainer.loss_terms(trainer.model.eval(), batch)
        torch.testing.assert_close(terms["gradient"], alone["gradient"], rtol=1e-4, atol=1e-9)
        rows += chosen
    assert sorted(rows) == list(range(16))


def test_every_sequence_has_its_turn_where_not_every_step_explains(make_egkd):
    trainer = make_egkd(branches={"gradient": 1.0}, explain_share=0.25, explain_every=4)
    batch, [branch] = batch_of(trainer, range(16)), trainer.branches
    rows = []
    for trainer.state.global_step in range(0, 16, 4):
        rows += branch.rows(trainer._explained(batch, {}))
    assert sorted(rows) == list(range(16))


def test_masks_are_a_function_of_seed_step_and_example_and_differ_within_a_sequence(make_egkd):
    trainer = make_egkd(branches={"perturbation": 1.0}, masks=3)
    [branch] = trainer.branches
    one, other = batch_of(trainer, [5, 6, 7]), batch_of(trainer, [7, 5])
    drawn = []
    for trainer.state.global_step in range(40):
        here, there = (branch.which(trainer._explained(batch, {})) for batch in (one, other))
        assert torch.equal(here[2], there[0]) and torch.equal(here[0], there[1])
        assert all(len(set(row)) == 3 for row in here.tolist())
        drawn.append(here)
    counts = torch.stack(drawn).flatten().bincount(minlength=6)
    assert counts.min() > 0.5 * counts.max()


def test_the_perturbation_term_has_the_pools_masks_and_the_teachers_logits_under_them(make_egkd, make_teacher):
    stored = make_egkd(branches={"perturbation": 1.0}, dropout=0.0, masks=4, pool={"samples": 6})
    running = make_egkd(stored=False, branches={"perturbation": 1.0}, dropout=0.0, masks=4, max_steps=1)
    running.train()
    running.model.load_state_dict(stored.model.state_dict())
    terms = [trainer.loss_terms(trainer.model.eval(), batch_of(trainer))[0] for trainer in (stored, running)]
    stored.state.global_step = running.state.global_step
    terms[0] = stored.loss_terms(stored.model.eval(), batch_of(stored))[0]
    torch.testing.assert_close(terms[0]["perturbation"], terms[1]["perturbation"], rtol=2e-2, atol=1e-6)


@pytest.fixture(scope="module")
def make_regression(make_egkd, make_teacher, tokens):
    """make_regression(target=.., ..): the same labels as numbers, and heads of one column."""
    features = tokens["train"].features.copy()
    features["labels"] = Value("float32")
    data, one = tokens["train"].cast(features), {"num_labels": 1, "problem_type": "regression"}

    def make(**changes):
        teacher, student = (make_teacher(dropout=0.0, **one) for _ in range(2))
        return make_egkd(teacher=teacher, student=fastkd.create_student(student, layers=2), data=data, **changes)

    return make


def test_a_regression_has_squared_errors_and_explains_its_score(make_regression):
    trainer = make_regression(target="label", max_steps=2)
    batch = batch_of(trainer)
    terms, output = trainer.loss_terms(trainer.model.eval(), batch)
    scores = batch["teacher"]["logits"].float()
    torch.testing.assert_close(terms["soft"], (output.logits - scores).square().mean())
    torch.testing.assert_close(terms["task"], (output.logits[:, 0] - batch["labels"]).square().mean())
    trainer.train()
    assert all(line["loss_gradient"] > 0 for line in lines_of(trainer))


@pytest.mark.parametrize("second_order", ["exact", "central_difference"])
def test_a_regressions_one_score_is_explained_whatever_the_target(make_regression, second_order):
    losses = {}
    for target in ("predicted", "all", "label"):
        trainer = make_regression(
            target=target, second_order=second_order, branches={"gradient": 1e3}, max_steps=2, learning_rate=1e-4
        )
        trainer.train()
        losses[target] = [(line["loss"], line["loss_gradient"]) for line in lines_of(trainer)]
    assert losses["all"] == losses["predicted"] == losses["label"]
    assert all(term > 0 for _, term in losses["all"])


def test_step_0_says_what_is_about_to_happen_and_what_it_costs(make_egkd, capsys):
    make_egkd(max_steps=1, explain_every=3, explain_share=0.5).train()
    said = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "0.2 task + 0.8 soft + 10 gradient + 0.5 perturbation + 0.5 selection",
        "does not run: results of 330 examples are stored",
        "gradient_x_input of the log_probability, teacher's class; second order: exact; further passes: a forward, a "
        "backward to the embeddings and a double one of 50% of the sequences, on unfused attention",
        "1 of 6 lime masks for each sequence; further passes: 1 forward and backward",
        "30% of the tokens, chosen once; further passes: 1 forward and backward",
        "after 0% of the steps; gradient every 3 steps",
    ):
        assert phrase in said, said


def test_the_teacher_stays_as_it_is(make_egkd, make_teacher):
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    make_egkd(teacher=teacher, stored=False, max_steps=2).train()
    assert not teacher.training and all(torch.equal(tensor, before[n]) for n, tensor in teacher.state_dict().items())


def test_a_teacher_of_another_task_is_refused(make_egkd, make_teacher, tmp_path):
    with pytest.raises(ValueError, match="the teacher has 3 labels, the student 2"):
        make_egkd(teacher=make_teacher(num_labels=3), stored=False, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_results_of_another_tokenizers_tokens_are_refused(make_egkd, make_teacher, task, tokens):
    results = make_egkd(branches={"selection": 1.0})._teacher
    other = train_wordpiece(task.train["sentence"][:100], vocab_size=90, max_length=32)
    config = EgkdConfig(output_dir="/nowhere", branches={"selection": 1.0}, use_cpu=True)
    with pytest.raises(ValueError, match="the stored results are of another tokenizer's tokens"):
        EgkdTrainer(make_teacher(), config, teacher=results, processing_class=other, train_dataset=tokens["train"])


def test_a_label_out_of_range_is_refused(make_egkd, tokens, make_teacher, tmp_path):
    wrong = tokens["train"].remove_columns("labels").add_column("labels", [2] * len(tokens["train"]))
    with pytest.raises(ValueError, match="target class 2 is out of range; the model has 2 classes: 0 to 1"):
        make_egkd(teacher=make_teacher(), data=wrong, stored=False, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_results_of_other_data_or_without_a_branch_are_refused(make_egkd, make_teacher, tokenizer, tokens):
    trainer, data = make_egkd(branches={"selection": 1.0}), tokens["train"]
    some = trainer._teacher.select(torch.arange(20))
    without = EgkdConfig(output_dir="/nowhere", branches={"gradient": 1.0}, use_cpu=True)
    for results, message in (
        (some, "the stored results are of 20 examples, the data has 330"),
        (trainer._teacher.__class__(some.fingerprint, some.tokens, some.per_example, {}), "nothing for gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            EgkdTrainer(make_teacher(), without, teacher=results, processing_class=tokenizer, train_dataset=data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [("data", "both have 330 examples .* order"), ("settings", r"else; selection\.ratio: 0\.3 is stored, 0\.6 given$")],
)
def test_results_of_data_in_another_order_or_of_other_settings_are_refused(
    changed, message, make_egkd, make_teacher, tokenizer, tokens
):
    results, data = make_egkd(branches={"selection": 1.0})._teacher, tokens["train"]
    if changed == "data":
        data = data.select(range(len(data) - 1, -1, -1))
    selector = {"epochs": 1, "hidden": 8} | ({"ratio": 0.6} if changed == "settings" else {})
    config = EgkdConfig(output_dir="/nowhere", branches={"selection": 1.0}, selector=selector, use_cpu=True)
    with pytest.raises(ValueError, match=message):
        EgkdTrainer(make_teacher(), config, teacher=results, processing_class=tokenizer, train_dataset=data)
