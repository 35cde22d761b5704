"""EGKD where teacher and student have tokenizers of their own: a RoBERTa teaches a BERT, on the words of the text."""

import copy
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import fastkd
from fastkd.cli import main
from fastkd.explain import (
    WordAlignment,
    distance,
    gradient_attribution,
    masked_logits,
    normalise,
    pad_words,
    tokens_of_words,
    word_mask,
    word_scores,
)
from fastkd.explain.fingerprint import of_tokenizer
from fastkd.losses import soft_label_loss
from fastkd.recipes import EgkdConfig, EgkdTrainer, FineTuneConfig, FineTuneTrainer, run_recipe, teacher_results
from fastkd.recipes.egkd_teacher import classifier_of
from fastkd.recipes.egkd_units import Words

ALL = {"gradient": 10.0, "perturbation": 0.5, "selection": 0.5}
SECTIONS = {"pool": {"samples": 6}, "selector": {"epochs": 1, "hidden": 8}}
LENGTH = 32  # some of the teacher's tokens, which are shorter, are cut


@pytest.fixture(scope="module")
def bpe(task, train_bpe):
    """Most words are several tokens."""
    tokenizer = train_bpe(task.train["sentence"], 300)
    tokenizer.model_max_length = LENGTH
    return tokenizer


@pytest.fixture(scope="module")
def roberta(bpe):
    """A teacher of two layers."""
    config = RobertaConfig(
        vocab_size=len(bpe), hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=LENGTH + 2, pad_token_id=bpe.pad_token_id, num_labels=2, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(12)
    return RobertaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def theirs(task, bpe):
    """The training data on the teacher's tokens; `tokens` is on the student's."""
    return task.tokenize(bpe, LENGTH)["train"]


@pytest.fixture(scope="module")
def alignment(task, bpe, tokenizer):
    return WordAlignment.of(bpe, tokenizer, task.train["sentence"], max_length=LENGTH)


@pytest.fixture(scope="module")
def results(roberta, bpe, theirs, alignment, settings, tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "results.safetensors"
    return teacher_results(roberta, bpe, theirs, EgkdConfig(**settings(branches=ALL, **SECTIONS)), file, alignment)


@pytest.fixture(scope="module")
def make_egkd(make_teacher, tokenizer, tokens, alignment, results, settings):
    """make_egkd(branches=.., ..): the trainer of a BERT of two layers, from the stored results of the RoBERTa."""
    usual = {"teacher": results, "alignment": alignment, "train_dataset": tokens["train"]}

    def make(dropout=0.1, branches=ALL, **changes):
        given = usual | {name: changes.pop(name) for name in usual if name in changes}
        config = EgkdConfig(**settings(**{"branches": branches, "explain_after": 0.0, **SECTIONS, **changes}))
        student = fastkd.create_student(make_teacher(dropout=dropout), layers=2)
        return EgkdTrainer(student, config, processing_class=tokenizer, eval_dataset=tokens["validation"], **given)

    return make


def lines_of(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


# A step on words


def test_the_texts_are_cut_and_words_are_several_tokens(alignment, theirs):
    """What the other tests take for granted."""
    tokens_of = [Counter(word for word in row if word >= 0) for row in alignment.teacher]
    assert sum(max(counts.values()) > 1 for counts in tokens_of) > 300
    assert sum(len(ids) == LENGTH for ids in theirs["input_ids"]) > 3


@pytest.mark.parametrize(
    ("second_order", "target"), [("exact", "predicted"), ("central_difference", "label"), ("exact", "all")]
)
def test_every_term_is_what_the_plain_functions_give_on_words(
    make_egkd, roberta, bpe, theirs, alignment, tokenizer, settings, tmp_path, second_order, target
):
    how = {"second_order": second_order, "target": target, "masks": 2, "dropout": 0.0}
    config = EgkdConfig(**settings(branches=ALL, target=target, **SECTIONS))
    results = teacher_results(roberta, bpe, theirs, config, tmp_path / "results.safetensors", alignment)
    trainer, rows = make_egkd(teacher=results, **how), list(range(40, 52))
    batch = trainer.data_collator([trainer.train_dataset.remove_columns("length")[i] for i in rows])
    terms, _ = trainer.loss_terms(trainer.model.eval(), batch)

    sides = {"teacher": (roberta, bpe, theirs), "student": (trainer.model, tokenizer, trainer.train_dataset)}
    models, inputs, words, scores = {}, {}, {}, {}
    for side, (model, own, data) in sides.items():
        models[side] = classifier_of(model, own)
        taken = data.select_columns(["input_ids", "attention_mask"]).select(rows)
        inputs[side] = DataCollatorWithPadding(own)(list(taken))
        words[side] = pad_words([getattr(alignment, side)[i] for i in rows], inputs[side]["attention_mask"])
    valid = word_mask(words["student"])
    logits = models["teacher"].logits(inputs["teacher"]).detach()
    classes = {"label": batch["labels"], "predicted": logits.argmax(1)}.get(target, target)
    plain = dataclasses.replace(trainer.args.explainer, norm=None)
    for side, model in models.items():
        by_token = gradient_attribution(model, inputs[side], plain, target=classes)
        scores[side] = normalise(word_scores(by_token, words[side]), "l2")
    close = {"rtol": 1e-2, "atol": 1e-6}  # results are stored in fp16
    torch.testing.assert_close(terms["gradient"].detach(), distance(*reversed(scores.values()), valid), **close)

    perturbation = next(branch for branch in trainer.branches if branch.name == "perturbation")
    kept = trainer.args.mask_pool.spread(valid, perturbation.which(trainer._explained(batch, {})))
    masked = [
        masked_logits(models[side], inputs[side], tokens_of_words(kept, words[side])).flatten(0, 1)
        for side in ("student", "teacher")
    ]
    torch.testing.assert_close(terms["perturbation"], soft_label_loss(*masked, 2.0), **close)

    selected = tokens_of_words(batch["teacher"]["selection"], words["student"])
    assert (selected.sum(1) < inputs["student"]["attention_mask"].sum(1)).any()
    left = masked_logits(models["student"], inputs["student"], selected[:, None])[:, 0]
    torch.testing.assert_close(terms["selection"], soft_label_loss(left, logits, 2.0), **close)


def test_a_word_is_selected_if_one_of_its_tokens_is():
    words = torch.tensor([[-1, 0, 0, 1, 2, -1]])
    units = Words(words, word_mask(words))
    assert units.selected(torch.tensor([[True, False, True, False, True, True]])).tolist() == [[True, False, True]]


def test_a_student_learns_from_explanations_of_words(
    make_egkd, roberta, bpe, theirs, alignment, task, settings, tmp_path
):
    teacher = FineTuneTrainer(
        copy.deepcopy(roberta).requires_grad_(),  # it was frozen
        FineTuneConfig(**settings(max_steps=80)),
        processing_class=bpe,
        train_dataset=theirs,
    )
    teacher.train()
    config = EgkdConfig(**settings(branches=ALL, **SECTIONS))
    results = teacher_results(teacher.model, bpe, theirs, config, tmp_path / "results.safetensors", alignment)
    trainer = make_egkd(teacher=results, max_steps=40, learning_rate=5e-3)
    trainer.compute_metrics = task.compute_metrics
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    for name in ALL:
        term = [line[f"loss_{name}"] for line in lines_of(trainer)]
        assert sum(term[-6:]) < 0.7 * sum(term[:6]), name  # measured: 0.1, 0.4, 0.3
    assert trainer.evaluate()["eval_accuracy"] > max(before, 0.9)


@pytest.mark.parametrize("second_order", ["exact", "central_difference"])
def test_a_resumed_run_repeats_every_loss_to_the_last_bit(make_egkd, assert_resumes_exactly, second_order):
    how = {"explain_after": 0.3, "masks": 2, "explain_share": 0.5, "second_order": second_order}
    assert_resumes_exactly(lambda **changes: make_egkd(**how, **changes))


@pytest.fixture(scope="module")
def bare(task):
    """A tokenizer that makes one token of each word, and none beside them."""
    words = sorted({word for sentence in task.train["sentence"] for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LENGTH
    )


@pytest.mark.parametrize(
    "how",
    [
        {"second_order": "exact", "masks": 2},
        {"second_order": "central_difference", "target": "all"},
        {"second_order": "exact", "target": "label", "explain_share": 0.5},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_words_of_one_token_each_are_learnt_as_tokens_are(bare, task, make_teacher, settings, tmp_path, how):
    data = task.tokenize(bare, LENGTH)["train"]
    teacher = make_teacher(dropout=0.0, vocab_size=len(bare))
    logged = []
    for alignment in (None, WordAlignment.of(bare, bare, task.train["sentence"], max_length=LENGTH)):
        config = EgkdConfig(**settings(branches=ALL, explain_after=0.0, max_steps=3, **SECTIONS, **how))
        trainer = EgkdTrainer(
            fastkd.create_student(make_teacher(vocab_size=len(bare)), layers=2),
            config,
            teacher=teacher_results(teacher, bare, data, config, tmp_path / f"{alignment is None}.file", alignment),
            processing_class=bare,
            alignment=alignment,
            train_dataset=data,
        )
        trainer.train()
        logged.append(lines_of(trainer))
    for of_tokens, of_words in zip(*logged, strict=True):
        assert of_tokens["loss_gradient"] > 0
        for name in ("task", "soft", *ALL):
            assert of_words[f"loss_{name}"] == pytest.approx(of_tokens[f"loss_{name}"], rel=1e-3, abs=1e-7), name


# What does not go together


def test_results_of_words_are_refused_by_a_trainer_on_tokens_and_the_reverse(
    make_egkd, make_teacher, task, tokenizer, tokens, settings, results, tmp_path
):
    config = EgkdConfig(**settings(branches={"gradient": 1.0}))
    file = tmp_path / "results.safetensors"
    of_tokens = teacher_results(make_teacher(), tokenizer, tokens["train"], config, file)
    with pytest.raises(ValueError, match=r"results are of words \(align=words\), and this run compares tokens"):
        make_egkd(teacher=results, alignment=None)
    with pytest.raises(ValueError, match=r"results are of tokens, and this run compares words \(align=words\)"):
        make_egkd(teacher=of_tokens, branches={"gradient": 1.0})
    same = WordAlignment.of(tokenizer, tokenizer, task.train["sentence"], max_length=LENGTH)
    with pytest.raises(
        ValueError, match=r"results\.safetensors: these results are of tokens, and this run compares wor"
    ):
        teacher_results(make_teacher(), tokenizer, tokens["train"], config, file, same)


def test_results_of_another_alignment_are_refused(make_egkd, task, bpe, tokenizer):
    shorter = WordAlignment.of(bpe, tokenizer, task.train["sentence"], max_length=12)
    with pytest.raises(ValueError, match="of words by another alignment: of other texts, other tokenizers or another"):
        make_egkd(alignment=shorter)


def test_data_that_was_cut_to_another_length_or_stands_in_another_order_is_refused(make_egkd, task, tokens, tokenizer):
    with pytest.raises(
        ValueError, match=r"example \d+ of the student's data has 12 tokens, its alignment \d+: .*max_l"
    ):
        make_egkd(train_dataset=task.tokenize(tokenizer, 12)["train"])
    lengths = tokens["train"]["length"][:]
    one, other = next((i, j) for i in range(20) for j in range(i + 2, 40, 2) if lengths[i] == lengths[j])
    order = list(range(len(lengths)))
    order[one], order[other] = other, one
    with pytest.raises(ValueError, match="the student's data are not the tokens that are aligned: they stand in anoth"):
        make_egkd(train_dataset=tokens["train"].select(order))


def test_a_teacher_that_runs_at_every_step_is_refused(make_egkd, roberta):
    with pytest.raises(ValueError, match="alignment: words are compared with stored results"):
        make_egkd(teacher=roberta)


# The recipe, and the same in one's own code


def test_the_example_of_the_page_runs(roberta, bpe, teacher_folder, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastkd.data, "load_task", lambda name: task)
    roberta.save_pretrained("teacher")
    bpe.save_pretrained("teacher")
    page = Path(__file__).parents[2] / "docs" / "methods" / "egkd_cross_architecture.md"
    example = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[-1]
    for given, smaller in {
        "runs/egkd-sst2/teacher": "teacher",
        "google-bert/bert-base-uncased": str(teacher_folder),
        "max_length=128": f"max_length={LENGTH}",
        "EgkdConfig(": "EgkdConfig(max_steps=2, ",
    }.items():
        assert given in example
        example = example.replace(given, smaller)
    names = {}
    exec(example, names)
    assert len(names["results"]) == len(task.train)


@pytest.fixture(scope="module")
def recipe(roberta, bpe, teacher_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    roberta.roberta.save_pretrained(folder)
    bpe.save_pretrained(folder)
    step = {"bf16": False, "learning_rate": 2e-3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return {
        "recipe": "egkd",
        "teacher": str(folder),
        "task": "sst2",
        "data": str(data_folder),
        "max_length": LENGTH,
        "align": "words",
        "student": {"pretrained": str(teacher_folder), "layers": 2, "init": "spaced"},
        "finetune": step | {"max_steps": 4},
        "distil": step | {"max_steps": 4, "branches": ALL, "explain_after": 0.0, **SECTIONS},
    }


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(recipe | {"output_dir": str(folder)})
    return folder


@pytest.fixture
def train(recipe, tmp_path):
    """train("key=value", ..): the command on a file of one's own; returns its exit status."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / "run")}))
    return lambda *words: main(["train", str(tmp_path / "mine.yaml"), *words])


def test_a_roberta_teaches_a_bert_whose_folder_has_its_own_tokenizer(finished, tokenizer, bpe):
    log = json.loads((finished / "student" / "done.json").read_text())["log"]
    for line in log[:-1]:
        assert all(line[f"loss_{name}"] > 0 for name in ALL) and line["explanations_skipped"] == 0
    student = AutoModelForSequenceClassification.from_pretrained(finished / "student")
    assert student.config.model_type == "bert" and student.config.num_hidden_layers == 2
    assert student.config.id2label == {0: "negative", 1: "positive"}
    for step, own in (("teacher", bpe), ("student", tokenizer)):
        assert of_tokenizer(AutoTokenizer.from_pretrained(finished / step)) == of_tokenizer(own)


def test_each_is_evaluated_with_its_own_tokenizer_and_they_are_compared_on_words(finished, task):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == {"teacher", "student", "consistency"}
    assert all(0 <= results[side]["accuracy"] <= 1 for side in ("teacher", "student"))
    for found in results["consistency"].values():
        assert found["sequences"] == 96 and -1 <= found["cosine"] <= 1 and 0 <= found["overlap"] <= 1
    page = (finished / "explanations.html").read_text()
    for sentence in task.validation["sentence"][:12]:
        assert all(f">{word}</span>" in page for word in sentence.split())


def test_a_student_begins_with_layers_of_its_own_encoder_and_results_of_words_serve_it_too(
    train, finished, teacher_folder, tmp_path
):
    shared = f"results={finished / 'teacher_results' / 'results.safetensors'}"
    assert train(shared, "distil.branches={selection: 1.0}", "distil.max_steps=1", "distil.learning_rate=0") == 0
    begun, encoder = (
        AutoModel.from_pretrained(folder).encoder.layer for folder in (tmp_path / "run" / "student", teacher_folder)
    )
    for layer, source in zip(begun, (encoder[1], encoder[3]), strict=True):  # of four, spaced
        for name, tensor in source.state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor), name


def test_results_of_words_are_refused_by_a_run_on_tokens_before_any_work(train, finished, tmp_path, capsys):
    shared = f"results={finished / 'teacher_results' / 'results.safetensors'}"
    assert train(shared, "align=null", "student={layers: 1}") == 2
    assert "these results are of words (align=words), and this run compares tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["align=null"], "have different vocabularies: explanations of other tokens cannot be compared. align=words"),
        (["align=sentences"], "align='sentences'; allowed are null and words"),
        (["stored=false"], "align=words and stored=false: words are compared with stored results alone"),
        (["student.pretrained=does/not/exist"], "student.pretrained=does/not/exist is no model: no such folder"),
        (["student.pretrained=3"], "student.pretrained=3; the folder or hub id of an encoder is needed"),
        (["student.layers=9"], "layers=9: there are 4 to copy"),
        (["student.kind=bilstm"], "student: unknown key 'pretrained'"),
        (["student.pretraind=x"], "student: unknown key 'pretraind'; did you mean 'pretrained'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_work(train, tmp_path, capsys, words, message):
    assert train(*words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
