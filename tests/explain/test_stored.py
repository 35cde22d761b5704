"""A teacher's results on disk, with what they belong to."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastkd.explain import (
    Fingerprint,
    GradientSettings,
    MaskPool,
    TeacherResults,
    compute_results,
    explanation_of_logits,
    gradient_attribution,
    hard_top_k,
    linear_explanation,
    masked_logits,
)
from fastkd.explain.fingerprint import of_data, of_teacher, of_tokenizer, of_weights
from fastkd.models import BiLstmConfig, BiLstmForSequenceClassification

POOL = MaskPool(samples=6)
SETTINGS = {"gradient": dataclasses.asdict(GradientSettings()), "pool": dataclasses.asdict(POOL)}


def _tokenizer(words=("[PAD]", "[UNK]", "good", "bad")):
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def _rows(batch):
    kept = [
        row[: int(mask.sum())].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return Dataset.from_dict({"input_ids": kept, "label": [0, 1, 2]})


@pytest.fixture
def fingerprint(bert, batch):
    return Fingerprint.of(bert, _tokenizer(), _rows(batch), SETTINGS)


@pytest.fixture
def results(classifier, batch, fingerprint):
    """Of three examples, computed in two batches."""
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    return compute_results(
        parts,
        fingerprint,
        per_example={
            "logits": classifier.logits,
            "pool_logits": lambda x: masked_logits(classifier, x, POOL.spread(classifier.maskable(x))),
        },
        per_token={
            "gradient": lambda x: gradient_attribution(classifier, x),
            "every": lambda x: gradient_attribution(classifier, x, target="all"),
            "selected": lambda x: hard_top_k(gradient_attribution(classifier, x), classifier.maskable(x), 0.3),
        },
        dtype=torch.float64,
    )


def test_what_is_read_is_what_was_computed(tmp_path, classifier, batch, results, fingerprint):
    results.save(tmp_path / "results.safetensors")
    stored = TeacherResults.load(tmp_path / "results.safetensors", fingerprint)
    assert len(stored) == 3
    found = stored.batch(torch.arange(3), batch["attention_mask"])
    torch.testing.assert_close(found["logits"], classifier.logits(batch).detach())
    torch.testing.assert_close(found["gradient"], gradient_attribution(classifier, batch))
    torch.testing.assert_close(found["every"], gradient_attribution(classifier, batch, target="all"))
    kept = hard_top_k(gradient_attribution(classifier, batch), classifier.maskable(batch), 0.3)
    assert torch.equal(found["selected"], kept & (batch["attention_mask"] != 0))
    torch.testing.assert_close(
        explanation_of_logits(found["pool_logits"], POOL, classifier.maskable(batch)),
        linear_explanation(classifier, batch, POOL).detach(),
    )


def test_examples_come_in_any_order_and_with_padding_on_any_side(batch, results):
    order = torch.tensor([2, 0])
    straight = results.batch(order, batch["attention_mask"][order])
    flipped = results.batch(order, batch["attention_mask"][order].flip(1))
    sequence = batch["attention_mask"][2] != 0
    assert torch.equal(flipped["gradient"][0][sequence.flip(0)], straight["gradient"][0][sequence])
    assert not flipped["gradient"][0][~sequence.flip(0)].any()


def test_scores_are_stored_in_fp16_unless_asked_otherwise(classifier, batch, fingerprint):
    given = {"gradient": lambda x: gradient_attribution(classifier, x)}
    results = compute_results([batch], fingerprint, per_example={}, per_token=given)
    assert results.per_token["gradient"].dtype == torch.float16
    torch.testing.assert_close(
        results.batch(torch.arange(3), batch["attention_mask"])["gradient"].double(),
        gradient_attribution(classifier, batch),
        rtol=1e-3,
        atol=1e-3,
    )


_TINY = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
_TEACHERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_TINY)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_TINY)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=30, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    ),
    "bilstm": lambda: BiLstmForSequenceClassification(BiLstmConfig(vocab_size=30, hidden_size=8)),
}


@pytest.mark.parametrize("architecture", _TEACHERS)
def test_a_saved_teacher_has_the_fingerprint_of_its_folder(tmp_path, architecture):
    teacher = _TEACHERS[architecture]()
    before = of_teacher(teacher)
    teacher.save_pretrained(tmp_path)
    assert of_teacher(tmp_path) == of_teacher(teacher) == of_teacher(type(teacher).from_pretrained(tmp_path)) == before


def test_an_activation_is_part_of_the_fingerprint():
    one, other = _TEACHERS["distilbert"](), _TEACHERS["distilbert"]()
    other.load_state_dict(one.state_dict())
    other.config.activation = "relu"
    assert of_weights(one) == of_weights(other) and of_teacher(one) != of_teacher(other)


def test_a_sharded_teacher_has_the_same_fingerprint(tmp_path, bert):
    bert.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert of_teacher(tmp_path) == of_teacher(bert)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors"):
        of_teacher(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        of_teacher(tmp_path / "none")


def test_padding_calls_do_not_change_a_tokenizer():
    tokenizer = _tokenizer()
    before = of_tokenizer(tokenizer)
    tokenizer(["good bad", "good"], padding=True, truncation=True, max_length=4)
    assert of_tokenizer(tokenizer) == before


def test_the_order_of_examples_and_where_one_ends_are_part_of_the_data():
    one, other = {"input_ids": [[1, 2], [3]]}, {"input_ids": [[1], [2, 3]]}
    assert len({of_data(one), of_data(other), of_data({"input_ids": [[3], [1, 2]]})}) == 3
    with pytest.raises(ValueError, match="input_ids is needed"):
        of_data({"text": ["a"]})


def _other_teacher(bert, batch):
    changed = copy.deepcopy(bert)
    with torch.no_grad():
        changed.classifier.bias[1] += 1e-6
    return Fingerprint.of(changed, _tokenizer(), _rows(batch), SETTINGS)


def _other_heads(bert, batch):
    """The same weights are another function."""
    changed = copy.deepcopy(bert)
    changed.config.num_attention_heads *= 2
    return Fingerprint.of(changed, _tokenizer(), _rows(batch), SETTINGS)


def _other_tokenizer(bert, batch):
    return Fingerprint.of(bert, _tokenizer(("[PAD]", "[UNK]", "bad", "good")), _rows(batch), SETTINGS)


def _other_roles(bert, batch):
    """The same special tokens: the two have changed places."""
    tokenizer = _tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = tokenizer.unk_token, tokenizer.pad_token
    return Fingerprint.of(bert, tokenizer, _rows(batch), SETTINGS)


def _other_data(bert, batch):
    return Fingerprint.of(bert, _tokenizer(), _rows(batch).select([1, 0, 2]), SETTINGS)


def _other_pool(bert, batch):
    other = SETTINGS | {"pool": dataclasses.asdict(MaskPool(samples=6, seed=1))}
    return Fingerprint.of(bert, _tokenizer(), _rows(batch), other)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (_other_teacher, r"the teacher \(its weights or configuration\): \w{12} is stored"),
        (_other_heads, r"the teacher \(its weights or configuration\): \w{12} is stored"),
        (_other_tokenizer, "the tokenizer: "),
        (_other_roles, "the tokenizer: "),
        (
            _other_data,
            r"the data: both have 3 examples of at most 9 tokens, but other ones or another order \(\w{12} is stored",
        ),
        (_other_pool, "; pool.seed: 0 is stored, 1 given. Delete it, or name another file$"),
    ],
)
def test_another_fingerprint_is_an_error_that_names_what_differs(tmp_path, bert, batch, results, other, named):
    results.save(tmp_path / "results.safetensors")
    with pytest.raises(ValueError, match=named) as caught:
        TeacherResults.load(tmp_path / "results.safetensors", other(bert, batch))
    assert str(caught.value).count("is stored") == 1


def test_data_of_another_size_is_told_by_its_size(results, bert, batch):
    fewer = Fingerprint.of(bert, _tokenizer(), _rows(batch).select([1, 2]), SETTINGS)
    [said] = results.fingerprint.differences(fewer)
    assert said.startswith("the data: 3 examples of at most 9 tokens are stored, 2 examples of at most 7 tokens given")
    unknown = dataclasses.replace(results.fingerprint, examples=None, longest=None)  # as files of before
    [said] = unknown.differences(fewer)
    assert said.startswith("the data: ") and "examples" not in said
    assert not unknown.differences(results.fingerprint)


def test_settings_that_are_not_stored_or_not_given_are_named_too(fingerprint):
    one = dataclasses.replace(fingerprint, settings={"pool": {"seed": 0}})
    other = dataclasses.replace(fingerprint, settings={"pool": {"samples": 4}, "selector": {"epochs": 1}})
    assert one.differences(other) == [
        "pool.samples: nothing is stored, 4 given",
        "pool.seed: 0 is stored, nothing given",
        "selector: nothing is stored, {'epochs': 1} given",
    ]


def test_settings_of_a_fingerprint_are_json_values(bert, batch):
    with pytest.raises(TypeError, match="settings of a fingerprint must be JSON values"):
        Fingerprint.of(bert, _tokenizer(), _rows(batch), {"pool": POOL})


def test_a_file_with_results_of_further_settings_serves_and_tells_its_fingerprint(tmp_path, bert, batch, results):
    results.save(tmp_path / "results.safetensors")
    fewer = Fingerprint.of(bert, _tokenizer(), _rows(batch), {"pool": SETTINGS["pool"]})
    assert len(TeacherResults.load(tmp_path / "results.safetensors", fewer)) == len(results)
    assert TeacherResults.fingerprint_of(tmp_path / "results.safetensors") == results.fingerprint


def test_a_teacher_that_is_still_to_come_agrees_with_any(results, batch):
    results.fingerprint.check(Fingerprint.of(None, _tokenizer(), _rows(batch), SETTINGS), "results.safetensors")


def test_examples_are_selected_in_the_order_in_which_they_are_named(batch, results):
    order = torch.tensor([2, 0])
    found = results.select(order).batch(torch.tensor([0, 1]), batch["attention_mask"][order])
    for name, values in results.batch(order, batch["attention_mask"][order]).items():
        assert torch.equal(found[name], values), name


def test_the_file_is_there_whole_or_not_at_all(tmp_path, results):
    path = tmp_path / "results.safetensors"
    results.save(path)
    whole = path.read_bytes()
    broken = dataclasses.replace(results, per_example={"logits": torch.full((3, 3), torch.nan)})
    with pytest.raises(ValueError, match="logits holds NaN or infinite values; nothing was written"):
        broken.save(path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_was_cut_short_or_is_another_is_refused(tmp_path, results, fingerprint):
    path = tmp_path / "results.safetensors"
    results.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="or not all of one"):
        TeacherResults.load(path, fingerprint)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no teacher results"):
        TeacherResults.load(path, fingerprint)
    save_file({"tokens": torch.ones(2)}, path, metadata={"format": "fastkd.teacher_results", "version": "1"})
    with pytest.raises(ValueError, match="was written by another version of fastkd"):
        TeacherResults.load(path, fingerprint)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        TeacherResults.load(tmp_path, fingerprint)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        results.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        TeacherResults.load(tmp_path / "none", fingerprint)


def test_nan_attributions_are_named_when_they_are_computed(classifier, bert, batch, fingerprint):
    with torch.no_grad():
        bert.bert.embeddings.word_embeddings.weight[batch["input_ids"][1, 5]] = torch.nan
    first = next(row for row in range(3) if batch["input_ids"][1, 5] in batch["input_ids"][row])
    given = {"gradient": lambda x: gradient_attribution(classifier, x, target=torch.tensor([0]))}
    parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    with pytest.raises(ValueError, match=f"gradient: example {first} has NaN"):
        compute_results(parts, fingerprint, per_example={}, per_token=given)


def test_a_value_too_large_for_fp16_is_refused(batch, fingerprint):
    given = {"logits": lambda x: torch.full((3, 3), 1e6)}
    with pytest.raises(ValueError, match=r"torch.float16 cannot hold values up to 1e\+06"):
        compute_results([batch], fingerprint, per_example=given, per_token={})


def test_an_example_that_was_cut_to_another_length_is_named(batch, results):
    with pytest.raises(ValueError, match="example 0 has 5 tokens here and 9 in the stored results"):
        results.batch(torch.tensor([0]), batch["attention_mask"][:1, :5])


@pytest.mark.parametrize("rows", [[3], [-1], [0.5], [[0]]])
def test_examples_that_there_are_not_are_named(rows, results):
    with pytest.raises(ValueError, match=r"there is no example|numbers"):
        results.select(torch.tensor(rows))


def test_a_mask_of_other_sequences_is_refused(batch, results):
    with pytest.raises(ValueError, match="the mask is of 3 sequences, 2 examples are asked for"):
        results.batch(torch.tensor([0, 1]), batch["attention_mask"])


def test_results_of_no_batches_are_refused(fingerprint):
    with pytest.raises(ValueError, match="no batches"):
        compute_results([], fingerprint, per_example={}, per_token={})
