import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastkd.data import bag_of_words_baseline, docstrings, fit_bag_of_words, load_docstring_task, score

NAMES = re.compile(r"torch|numpy|transformers|hugging|python|\bnp\b|\bhf\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("docstrings")


@pytest.fixture(scope="module")
def task(cache):
    return load_docstring_task(cache)


def sentences(docstring):
    return list(docstrings.sentences_of(docstring))


# ---------------------------------------------------------------- sentences


def test_prose_is_split_into_sentences_across_lines():
    text = """Return the size of the file. If it does
        not exist, an error is raised by the system.

        This applies to every (local) path.
        """
    assert sentences(text) == [
        "Return the size of the file.",
        "If it does not exist, an error is raised by the system.",
        "This applies to every (local) path.",
    ]


@pytest.mark.parametrize(
    "block",
    [
        ">>> print(the_size_of_the_file)\nThis is the output of the code.",
        "```\nThis is the code in a fence.\n```",
        ".. note:: This is in the markup of a note.",
        ":param x: This is the size of the file.",
        "Args:\n    x: This is the size of the file.",
        "    This is an indented block in the text.",
        "- This is one item of the list.",
        "1. This is one item of the list.",
        "See https://example.org for the size of the file.",
    ],
)
def test_what_is_no_prose_is_left_out(block):
    assert sentences(f"\nReturn the size of the file.\n\n{block}\n") == ["Return the size of the file."]


def test_a_numpy_section_keeps_its_text_but_not_its_title_or_parameters():
    text = (
        "Notes\n-----\nThis is the first of the notes.\n\nParameters\n----------\nx : int\n    This is its size here.\n"
    )
    assert sentences(text) == ["This is the first of the notes."]


def test_markup_is_removed():
    assert sentences("Return the :class:`~a.Tensor` that ``x`` and [`Model`] share in **this** case.") == [
        "Return the a.Tensor that x and Model share in this case."
    ]


@pytest.mark.parametrize("sentence", ["Return the size.", " ".join(["The", *["word"] * 40]) + "."])
def test_sentences_outside_5_to_40_words_are_left_out(sentence):
    assert sentences(sentence) == []


def test_what_is_no_english_sentence_is_left_out():
    assert sentences("Tensor shape dtype device layout.") == []
    assert sentences("x_1 = f(a_b) is y[0] + z_2 to w.") == []
    assert sentences("Return the size of the file") == []


@pytest.mark.parametrize(
    "name", ["torch", "PyTorch", "torch.nn", "numpy", "NumPy", "np", "transformers", "HuggingFace", "Hugging Face",
             "Python", "CPython", "libtorch_cpu", "hf"]
)  # fmt: skip
def test_package_names_are_masked_however_they_are_written(name):
    (sentence,) = sentences(f"This is the size of a {name} object in the memory.")
    assert not NAMES.search(sentence) and docstrings.MASK in sentence


def test_words_that_only_look_like_names_stay():
    assert sentences("This is an input of the snpe library.") == ["This is an input of the snpe library."]


# ---------------------------------------------------------------- the task


def test_it_has_the_size_the_issue_of_a_small_benchmark_needs(task):
    counts = Counter(task.train["label"]) + Counter(task.validation["label"])
    assert sum(counts.values()) >= 8000
    assert set(counts) == {0, 1, 2, 3} and max(counts.values()) <= 6000
    assert 0.1 < len(task.validation) / sum(counts.values()) < 0.3
    assert (task.num_labels, task.metrics[0]) == (4, "balanced_accuracy")


def test_no_module_and_no_sentence_is_on_both_sides(task):
    for column in ("module", "sentence"):
        assert set(task.train[column]).isdisjoint(task.validation[column])


def test_hold_out_splits_by_module_as_well(task):
    held = task.hold_out(0.1)
    assert set(held.train["module"]).isdisjoint(held.validation["module"])


def test_no_sentence_occurs_twice_whatever_its_digits_and_case(task):
    texts = [*task.train["sentence"], *task.validation["sentence"]]
    assert len({re.sub(r"[\W\d_]+", " ", text.lower()).strip() for text in texts}) == len(texts)


def test_the_label_is_the_package_of_the_module(task):
    for label, module in zip(task.train["label"], task.train["module"], strict=True):
        top = module.split("/")[0]
        package = top if top in docstrings.PACKAGES else "python"
        assert docstrings.PACKAGES[label] == package


def test_no_package_name_is_left(task):
    texts = [*task.train["sentence"], *task.validation["sentence"]]
    assert [text for text in texts if NAMES.search(text)] == []


def test_only_installed_sources_are_read_and_no_tests(task):
    standard = Path(sysconfig.get_paths()["stdlib"])
    recorded = {str(file) for name in docstrings.PACKAGES[1:] for file in importlib.metadata.files(name)}
    for module in {*task.train["module"], *task.validation["module"]}:
        assert module in recorded or (standard / module).is_file()
        assert not {"test", "tests", "testing", "site-packages"} & set(module.split("/"))


def test_a_bag_of_words_is_good_but_far_from_perfect(task):
    baseline = score(task.metrics, bag_of_words_baseline(task), np.array(task.validation["label"]))
    assert 0.65 < baseline["balanced_accuracy"] < 0.82


def test_no_word_gives_a_class_away(task):
    model = fit_bag_of_words(task)
    words = model[0].get_feature_names_out()
    assert [word for word in words if NAMES.search(word)] == []


# ---------------------------------------------------------------- cache and errors


def test_the_second_call_reads_the_cache(task, cache, monkeypatch):
    monkeypatch.setattr(docstrings, "_extract", lambda: pytest.fail("extracted again"))
    again = load_docstring_task(cache)
    assert again.train["sentence"][:] == task.train["sentence"][:]


def test_the_cache_is_one_file_named_after_every_version(task, cache):
    (file,) = cache.iterdir()
    for package in docstrings.PACKAGES[1:]:
        assert f"{package}{importlib.metadata.version(package)}" in file.name


def test_a_failed_extraction_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "_modules", lambda package: {})
    with pytest.raises(ValueError, match=r"needs 8000 sentences .* hold 0 \(python\), 0 \(numpy\)"):
        load_docstring_task(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("python", "no-such-package"))
    with pytest.raises(ValueError, match="no-such-package is not installed"):
        load_docstring_task(tmp_path)


def test_extraction_does_not_depend_on_the_order_of_sets(monkeypatch, capfd):
    some_modules = (
        "import hashlib; from fastkd.data import docstrings as d; d._MIN_TOTAL = 0; modules = d._modules;"
        "d._modules = lambda package: {k: v for k, v in modules(package).items() if d._uniform(k) < 0.05};"
        "print(hashlib.sha256(d._extract().to_csv().encode()).hexdigest())"
    )
    monkeypatch.setattr(docstrings, "_MIN_TOTAL", docstrings._MIN_TOTAL)
    monkeypatch.setattr(docstrings, "_modules", docstrings._modules)
    exec(some_modules, {})
    subprocess.run([sys.executable, "-c", some_modules], env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    here, there = capfd.readouterr().out.split()
    assert here == there


def test_sources_for_another_python_are_passed_over(tmp_path):
    (tmp_path / "new.py").write_text('"""This is the docstring of a module."""\nlet x = 1\n')
    assert list(docstrings._docstrings(tmp_path / "new.py")) == []


def test_nothing_that_is_read_is_imported(tmp_path):
    (tmp_path / "trap.py").write_text('"""This is the docstring of a module."""\nraise RuntimeError("imported")\n')
    assert list(docstrings._docstrings(tmp_path / "trap.py")) == ["This is the docstring of a module."]


def test_generated_files_are_passed_over(tmp_path):
    text = "# This file was automatically generated from a modular file.\n" + inspect.getsource(docstrings.sentences_of)
    (tmp_path / "generated.py").write_text(text)
    assert list(docstrings._docstrings(tmp_path / "generated.py")) == []
