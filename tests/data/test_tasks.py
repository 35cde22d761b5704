import itertools

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from fastkd.data import TASKS, Task, load_task

WORDS = ("cat", "dog", "mat", "house", "late", "big", "red", "ran", "sat", "its")


def sentences(count):
    return [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS, 4), count)]


def single(texts, labels=None, **changes):
    labels = [i % 2 for i in range(len(texts))] if labels is None else labels
    data = Dataset.from_dict({"sentence": texts, "label": labels})
    return Task("sst2", data, data, ("sentence",), ("negative", "positive"), ("accuracy",), **changes)


def pairs(left, right):
    data = Dataset.from_dict({"sentence1": left, "sentence2": right, "label": [0] * len(left)})
    return Task("rte", data, data, ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",))


def write(folder, name="train", **columns):
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")


def write_sst2(folder, labels=(0, 1, 1), validation_labels=(1, 0, 0)):
    write(folder, "train", sentence=["a cat", "a dog", "a mat"], label=list(labels))
    write(folder, "validation", sentence=["the cat", "the dog", "the mat"], label=list(validation_labels))


# ---------------------------------------------------------------- what a task is


def test_glue_and_jglue_tasks_are_known():
    assert set(TASKS) == {
        *("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"),
        *("marc_ja", "jcola", "jsts", "jnli"),
    }


@pytest.mark.parametrize(
    ("name", "metrics", "num_labels"),
    [
        ("cola", "matthews", 2),
        ("sst2", "accuracy", 2),
        ("mrpc", "accuracy", 2),
        ("stsb", "pearson", 1),
        ("mnli", "accuracy", 3),
        ("jnli", "accuracy", 3),
        ("jsts", "pearson", 1),
    ],
)
def test_every_task_has_its_official_primary_metric(tmp_path, name, metrics, num_labels):
    texts = {column: ["a cat", "a dog"] for column in TASKS[name].text_columns}
    for split in ("train", "validation"):
        write(tmp_path, split, **texts, label=[0, 1])
    task = load_task(name, tmp_path)
    assert (task.metrics[0], task.num_labels) == (metrics, num_labels)
    assert task.regression == (num_labels == 1)


@pytest.mark.parametrize("kind", ["parquet", "tsv", "csv", "json", "jsonl"])
def test_every_file_format_gives_the_same_task(tmp_path, kind):
    data = Dataset.from_dict({"sentence": ["a cat, late", "None", "2.0"], "label": [0, 1, 1]})
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{kind}"
        match kind:
            case "parquet":
                data.to_parquet(path)
            case "tsv":
                path.write_text("sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in data))
            case "csv":
                data.to_csv(path, index=False)
            case _:
                data.to_json(path, lines=kind == "jsonl")
    train = load_task("sst2", tmp_path).train
    assert train["sentence"][:] == ["a cat, late", "None", "2.0"]
    assert train["label"][:] == [0, 1, 1]


def test_a_tsv_file_may_hold_single_quotation_marks_as_glue_does(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text('sentence\tlabel\n"a cat\t1\nthe " dog\t0\n')
    assert load_task("sst2", tmp_path).validation["sentence"][:] == ['"a cat', 'the " dog']


def test_the_parent_folder_may_be_given(tmp_path):
    write_sst2(tmp_path / "sst2")
    assert len(load_task("sst2", tmp_path).train) == 3


def test_the_sub_folder_may_have_glues_own_spelling(tmp_path):
    write_sst2(tmp_path / "SST-2")
    assert len(load_task("sst2", str(tmp_path)).train) == 3


def test_shards_of_a_split_are_put_together(tmp_path):
    for shard in range(2):
        write(tmp_path, f"train-0000{shard}-of-00002", sentence=[f"a cat {shard}"], label=[shard])
    write(tmp_path, "validation-00000-of-00001", sentence=["a dog"], label=[0])
    assert load_task("sst2", tmp_path).train["sentence"][:] == ["a cat 0", "a cat 1"]


def test_mnli_validates_on_matched_and_keeps_mismatched(tmp_path):
    for split in ("train", "validation_matched", "dev_mismatched", "test_matched"):
        write(tmp_path, split, premise=[split], hypothesis=["a cat"], label=[2])
    task = load_task("mnli", tmp_path)
    assert task.validation["premise"][:] == ["validation_matched"]
    assert {name: data["premise"][:] for name, data in task.extra.items()} == {
        "validation_mismatched": ["dev_mismatched"]
    }


def test_labels_may_be_class_names(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path, split, sentence1=["a", "b", "c"], sentence2=["x"] * 3, label=["neutral", "entailment", "2"])
    assert load_task("jnli", tmp_path).train["label"][:] == [2, 0, 2]


def test_class_labels_numbered_in_another_order_are_renumbered(tmp_path):
    for split in ("train", "validation"):
        data = Dataset.from_dict({"sentence": ["good", "bad"], "label": [0, 1]})
        data.cast_column("label", ClassLabel(names=["positive", "negative"])).to_parquet(tmp_path / f"{split}.parquet")
    assert load_task("sst2", tmp_path).train["label"][:] == [1, 0]


def test_other_columns_are_kept(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, split, idx=[7, 8], sentence=["a cat", "a dog"], label=[0, 1])
    assert load_task("sst2", tmp_path).train["idx"][:] == [7, 8]


# ---------------------------------------------------------------- the hub


def test_a_task_without_source_is_read_from_its_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        data = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [4.5]})
        return {"train": data, "validation": data, "test": data}

    monkeypatch.setattr("fastkd.data.sources.load_dataset", load_dataset)
    assert load_task("stsb").train["label"][:] == [4.5]
    load_task("jsts")
    load_task("stsb", "someone/glue")
    assert [arguments for arguments, _ in asked] == [
        ("nyu-mll/glue", "stsb"),
        ("shunk031/JGLUE", "JSTS"),
        ("someone/glue", "stsb"),
    ]


def test_a_hub_data_set_with_a_loading_script_is_read_from_its_parquet_branch(monkeypatch):
    data = Dataset.from_dict({"sentence": ["a"], "label": [0]})

    def load_dataset(repository, config, revision=None):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found JGLUE.py")
        assert revision == "refs/convert/parquet"
        return {"train": data, "validation": data}

    monkeypatch.setattr("fastkd.data.sources.load_dataset", load_dataset)
    assert len(load_task("jcola").train) == 1


def test_an_unreachable_hub_is_a_connection_error_that_offers_a_folder(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("fastkd.data.sources.load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"data/glue \(sst2\) is neither a folder .* no route.* Give a folder"):
        load_task("sst2", "data/glue")


# ---------------------------------------------------------------- bad input


def test_an_unknown_task_names_the_nearest_and_all_others():
    with pytest.raises(ValueError, match=r"unknown task 'SST-2' \(did you mean 'sst2'\?\); known tasks are cola, sst2"):
        load_task("SST-2")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"the folder {tmp_path}/nowhere does not exist"):
        load_task("sst2", tmp_path / "nowhere")


def test_a_folder_without_a_split_says_what_was_looked_for(tmp_path):
    write(tmp_path, "train", sentence=["a"], label=[0])
    with pytest.raises(
        ValueError, match=r"has no validation file for sst2: looked for validation\|valid\|val\|dev\{.par"
    ):
        load_task("sst2", tmp_path)


def test_two_files_for_one_split_are_ambiguous(tmp_path):
    write_sst2(tmp_path)
    (tmp_path / "train.csv").write_text("sentence,label\na,0\n")
    with pytest.raises(ValueError, match=r"train of sst2 is ambiguous in .*: train.csv, train.parquet"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_an_unreadable_file_is_named(tmp_path, kind):
    write(tmp_path, "validation", sentence=["a"], label=[0])
    (tmp_path / f"train.{kind}").write_bytes(b'\xff\xfe{"\n,,\n')
    with pytest.raises(ValueError, match=f"train.{kind} could not be read as {kind}"):
        load_task("sst2", tmp_path)


def test_a_missing_column_names_those_given_and_needed(tmp_path):
    write_sst2(tmp_path)
    write(tmp_path, "train", text=["a"], label=[0])
    with pytest.raises(
        ValueError, match="sst2 train lacks the column sentence; it has text, label, needed are sentence, label"
    ):
        load_task("sst2", tmp_path)


def test_an_empty_split_is_an_error(tmp_path):
    write_sst2(tmp_path)
    (tmp_path / "validation.parquet").unlink()
    (tmp_path / "validation.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(ValueError, match="sst2 validation is empty"):
        load_task("sst2", tmp_path)


def test_a_label_outside_the_range_names_row_value_and_range(tmp_path):
    write_sst2(tmp_path, labels=(0, 1, 2))
    with pytest.raises(
        ValueError, match=r"sst2 train: row 2 has the label 2; allowed are 0 \(negative\), 1 \(positive\)"
    ):
        load_task("sst2", tmp_path)


def test_the_hidden_labels_of_a_test_split_are_recognised(tmp_path):
    write_sst2(tmp_path, validation_labels=(-1, -1, -1))
    with pytest.raises(ValueError, match=r"validation: row 0 has the label -1; .*hidden labels of GLUE's test splits"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize("label", ["great", 0.5, None])
def test_a_label_that_is_no_class_is_an_error(tmp_path, label):
    write_sst2(tmp_path)
    write(tmp_path, "train", sentence=["a"], label=[label])
    with pytest.raises(ValueError, match=f"row 0 has the label {label!r}"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize(("label", "shown"), [(float("nan"), "nan"), (5.5, "5.5"), (-0.1, "-0.1")])
def test_a_score_outside_the_range_is_an_error(tmp_path, label, shown):
    for split in ("train", "validation"):
        write(tmp_path, split, sentence1=["a", "b"], sentence2=["a", "b"], label=[1.0, label])
    with pytest.raises(ValueError, match=f"stsb train: row 1 has the label {shown}; allowed are scores from 0 to 5"):
        load_task("stsb", tmp_path)


def test_a_missing_text_is_named_by_its_row(tmp_path):
    write_sst2(tmp_path)
    write(tmp_path, "train", sentence=["a", None], label=[0, 1])
    with pytest.raises(ValueError, match="sst2 train: row 1 has no sentence"):
        load_task("sst2", tmp_path)


# ---------------------------------------------------------------- scoring


def test_compute_metrics_takes_what_a_trainer_gives():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    task = single(["a"] * 3)
    assert task.compute_metrics(EvalPrediction(logits, np.array([0, 1, 1]))) == {"accuracy": pytest.approx(2 / 3)}
    with_hidden_states = EvalPrediction((logits, np.zeros((3, 5))), np.array([0, 1, 1]))
    assert task.compute_metrics(with_hidden_states) == {"accuracy": pytest.approx(2 / 3)}


def test_compute_metrics_of_a_regression_reads_the_one_output():
    data = Dataset.from_dict({"sentence": ["a"], "label": [1.0]})
    task = Task("stsb", data, data, ("sentence",), (), ("pearson", "spearman"))
    scores = task.compute_metrics(EvalPrediction(np.array([[0.1], [0.4], [0.9]]), np.array([1.0, 4.0, 9.0])))
    assert scores == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}


def test_logits_of_another_width_are_an_error():
    with pytest.raises(ValueError, match="gives 3 logits per example, sst2 has 2 labels"):
        single(["a"]).compute_metrics(EvalPrediction(np.zeros((4, 3)), np.zeros(4)))


def test_nan_logits_are_an_error_and_no_silent_class_zero():
    with pytest.raises(ValueError, match="logits of 1 of 2 examples are NaN"):
        single(["a"]).compute_metrics(EvalPrediction(np.array([[np.nan, 1], [0, 1]]), np.array([0, 1])))


# ---------------------------------------------------------------- tokens


def test_tokens_are_not_padded_and_carry_their_length(tokenizer):
    train = single(["the cat", "the cat sat on a mat"]).tokenize(tokenizer)["train"]
    assert train["length"][:] == [len(ids) for ids in train["input_ids"]] == [4, 8]
    assert set(train.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "length"}


def test_longer_examples_are_cut(tokenizer):
    assert single(["the cat sat on a mat"]).tokenize(tokenizer, max_length=5)["train"]["length"][:] == [5]


def test_the_second_text_of_a_pair_has_type_one(tokenizer):
    row = pairs(["the cat"], ["a dog"]).tokenize(tokenizer)["train"][0]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_extra_splits_are_tokenised_too(tokenizer):
    task = single(["a cat"], extra={"validation_mismatched": Dataset.from_dict({"sentence": ["a dog"], "label": [1]})})
    assert set(task.tokenize(tokenizer)) == {"train", "validation", "validation_mismatched"}


def test_a_padding_collator_makes_batches_of_it(tokenizer):
    rows = single(["the cat", "the cat sat on a mat"]).tokenize(tokenizer)["train"]
    batch = DataCollatorWithPadding(tokenizer)([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 8) and batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(("length", "message"), [(2, "at least 3"), (513, "at most 512")])
def test_a_max_length_the_model_cannot_have_is_an_error(tokenizer, length, message):
    with pytest.raises(ValueError, match=f"max_length={length}.*{message}"):
        single(["a cat"]).tokenize(tokenizer, max_length=length)


# ---------------------------------------------------------------- holding out


def test_hold_out_splits_train_and_leaves_the_official_validation_alone():
    task = single(sentences(200), extra={"validation_mismatched": Dataset.from_dict({"sentence": ["x"], "label": [0]})})
    held = task.hold_out(0.05)
    assert len(held.validation) == 10 and len(held.train) == 190
    assert set(held.train["sentence"]) | set(held.validation["sentence"]) == set(task.train["sentence"])
    assert not held.extra and held.metrics == task.metrics


def test_hold_out_depends_on_the_seed_alone():
    task = single(sentences(200))
    first, again, other = (task.hold_out(0.1, seed).validation["sentence"][:] for seed in (0, 0, 1))
    assert first == again != other


def test_identical_sentences_never_straddle_the_split():
    texts = sentences(100)
    held = single([*texts, *(f" {text.upper()} " for text in texts)]).hold_out(0.3)
    normal = [{text.strip().lower() for text in split["sentence"]} for split in (held.train, held.validation)]
    assert len(held.validation) == 60 and normal[0].isdisjoint(normal[1])


def test_pairs_that_share_a_sentence_on_either_side_stay_together():
    texts = sentences(200)
    left, right = texts[:100] * 2, texts[100:200] + [f"{text} again" for text in texts[100:200]]
    held = pairs(left + right[:50], right + [f"{text} more" for text in left[:50]]).hold_out(0.2)
    sides = [set(split["sentence1"]) | set(split["sentence2"]) for split in (held.train, held.validation)]
    assert len(held.validation) > 25 and sides[0].isdisjoint(sides[1])


def test_examples_of_one_origin_stay_together():
    task = single(sentences(120), group_column="module")
    data = task.train.add_column("module", [f"m{i // 3}" for i in range(120)])
    held = Task("docs", data, data, ("sentence",), task.label_names, ("accuracy",), group_column="module").hold_out(0.2)
    assert len(held.validation) == 24 and set(held.train["module"]).isdisjoint(held.validation["module"])


def test_one_large_group_never_fills_the_held_out_part():
    texts = ["the same"] * 9 + sentences(191)
    for seed in range(10):
        assert "the same" not in single(texts).hold_out(0.05, seed).validation["sentence"]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_outside_zero_to_one_is_an_error(fraction):
    with pytest.raises(ValueError, match=r"fraction=.*between 0 and 1"):
        single(sentences(20)).hold_out(fraction)


def test_too_few_examples_to_hold_any_out_is_an_error():
    with pytest.raises(ValueError, match=r"0\.05 of 4 sst2 examples is 0: too few"):
        single(sentences(4)).hold_out()
