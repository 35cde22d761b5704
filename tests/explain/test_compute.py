"""A teacher's results, computed in parts that a stopped run goes on from."""

import dataclasses

import pytest
import torch

from fastkd.explain import (
    Fingerprint,
    SelectorSettings,
    TeacherResults,
    compute,
    compute_results,
    gradient_attribution,
    train_selector,
)

FINGERPRINT = Fingerprint("teacher", "tokenizer", "data", {"gradient": {"steps": 1}})


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(compute, "_OF_A_PART", 4)


@pytest.fixture
def batches(batch):
    """Five of two examples: parts of two, two and one batches."""
    rows = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2], [0, 2]])
    return [{name: value[pair] for name, value in batch.items()} for pair in rows]


@pytest.fixture
def run(classifier, tmp_path):
    """run(batches, stop=n, ..): the results; `run.asked` counts the batches that were computed; the n-th stops it."""

    def compute_here(batches, stop=None, fingerprint=FINGERPRINT, parts=tmp_path / "parts", **how):
        def logits(inputs):
            if compute_here.asked == stop:
                raise KeyboardInterrupt
            compute_here.asked += 1
            return classifier.logits(inputs)

        def gradient(inputs):
            return gradient_attribution(classifier, inputs)

        compute_here.asked = 0
        given = {"per_example": {"logits": logits}, "per_token": {"gradient": gradient}}
        return compute_results(batches, fingerprint, **given, parts=parts, **how)

    return compute_here


def _files(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def _equal(one, other):
    pairs = [(one.tokens, other.tokens)]
    pairs += [(one.per_example[name], other.per_example[name]) for name in other.per_example]
    pairs += [(one.per_token[name], other.per_token[name]) for name in other.per_token]
    return one.fingerprint == other.fingerprint and all(torch.equal(*pair) for pair in pairs)


def test_a_stopped_run_goes_on_from_its_last_part_to_the_same_results(run, batches, tmp_path):
    whole = run(batches, parts=None)
    with pytest.raises(KeyboardInterrupt):
        run(batches, stop=3)
    assert _files(tmp_path) == ["00000.safetensors"]
    assert _equal(run(batches), whole) and run.asked == 3
    assert _files(tmp_path) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert _equal(run(batches), whole) and run.asked == 0


def test_the_results_name_what_they_belong_to_and_not_a_part(run, batches):
    assert run(batches).fingerprint == FINGERPRINT


def test_a_small_data_set_is_one_part(run, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "_OF_A_PART", 1024)
    run(batches)
    assert _files(tmp_path) == ["00000.safetensors"]


def test_without_a_folder_nothing_is_written(run, batches, tmp_path):
    run(batches, parts=None)
    assert _files(tmp_path) == []


def _other_batches(batches):
    return {"batches": [batches[1], batches[0], *batches[2:]]}


def _other_teacher(batches):
    return {"batches": batches, "fingerprint": dataclasses.replace(FINGERPRINT, teacher="another")}


def _other_settings(batches):
    return {"batches": batches, "fingerprint": dataclasses.replace(FINGERPRINT, settings={"gradient": {"steps": 2}})}


def _other_dtype(batches):
    return {"batches": batches, "dtype": torch.float64}


@pytest.mark.parametrize(
    ("other", "computed"), [(_other_batches, 2), (_other_teacher, 5), (_other_settings, 5), (_other_dtype, 5)]
)
def test_parts_of_something_else_are_computed_anew(run, batches, other, computed):
    run(batches)
    changed = other(batches)
    found = run(**changed)
    assert run.asked == computed and _equal(found, run(**changed, parts=None))


def test_a_part_that_was_cut_short_is_computed_anew(run, batches, tmp_path):
    whole = run(batches)
    part = tmp_path / "parts" / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    assert _equal(run(batches), whole) and run.asked == 2


def test_progress_is_shown_where_it_is_asked_for(run, classifier, batches, capsys):
    run(batches[:4])
    train_selector(classifier, batches, SelectorSettings(epochs=1, hidden=4))
    assert capsys.readouterr().err == ""
    run(batches, progress=True)
    assert "results: 100%" in (said := capsys.readouterr().err) and "5/5" in said
    train_selector(classifier, batches, SelectorSettings(epochs=2, hidden=4), progress=True)
    assert "selector: 100%" in (said := capsys.readouterr().err) and "10/10" in said


def test_a_file_is_saved_with_its_folder(run, batches, tmp_path):
    results = run(batches)
    results.save(tmp_path / "new" / "results.safetensors")
    assert _equal(TeacherResults.load(tmp_path / "new" / "results.safetensors", FINGERPRINT), results)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"per_token": {"a": lambda x: torch.ones(2, 8)}}, ValueError, r"a gives \(2, 8\).*\(2, 9\) or \(2, C, 9\)"),
        ({"per_token": {"a": lambda x: torch.ones(3, 9)}}, ValueError, r"a gives \(3, 9\)"),
        ({"per_example": {"a": lambda x: torch.ones(3, 2)}}, ValueError, r"a gives \(3, 2\).*\(2, \.\.\.\) is needed"),
        ({"per_example": {"a": lambda x: 1.0}}, TypeError, "a is of type float; a Tensor is needed"),
        ({"per_example": {"a": torch.ones(2)}}, TypeError, "a is of type Tensor; a function of a batch is needed"),
        ({"per_example": {"a": len}, "per_token": {"a": len}}, ValueError, "a: an explainer gives something for each"),
        ({"mask": lambda x: torch.ones(9)}, ValueError, r"mask is \(9,\)"),
    ],
)
def test_explainers_that_do_not_fit_are_named(given, error, message, batches):
    with pytest.raises(error, match=message):
        compute_results(batches, FINGERPRINT, **{"per_example": {}, "per_token": {}} | given)


def test_what_is_precise_is_stored_as_it_is(run, classifier, batches):
    """In fp16 two logits could tie, and another class be the largest."""
    found = run(batches, precise=["logits"])
    expected = torch.cat([classifier.logits(inputs).detach() for inputs in batches])
    assert torch.equal(found.per_example["logits"], expected)
    assert found.per_token["gradient"].dtype == torch.float16
    assert run(batches, parts=None).per_example["logits"].dtype == torch.float16
