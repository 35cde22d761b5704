"""The examples of docs/methods/egkd.md run as they stand there, with smaller models and fewer steps."""

import re
from pathlib import Path

import pytest

import fastkd.data

_PAGE = Path(__file__).parents[2] / "docs" / "methods" / "egkd.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)


def _run(example: str, **smaller: str) -> dict:
    """The names an example leaves; `smaller` replaces values by the name they are given to."""
    for name, value in smaller.items():
        example, count = re.subn(rf"(\b{name}\s?=\s?)[^,\s]+", lambda found, value=value: found[1] + value, example)
        assert count, name
    names = {}
    exec(example, names)
    return names


@pytest.fixture(autouse=True)
def offline_and_small(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastkd.data, "load_docstring_task", lambda: task)


def test_the_page_has_two_examples():
    assert len(EXAMPLES) == 2


def test_an_attribution_in_ones_own_loop(teacher_folder):
    found = _run(EXAMPLES[0], name=repr(str(teacher_folder)))
    assert found["scores"].shape == found["inputs"]["input_ids"].shape


def test_the_recipe_in_ones_own_code():
    found = _run(EXAMPLES[1], max_steps="2")
    assert len(found["results"]) == 300 and found["student"].config.num_hidden_layers == 2
