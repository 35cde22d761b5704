"""`fastkd train` as a command: its exit status, and errors that are meant for people."""

import subprocess
import sys

import pandas as pd
import pytest

from fastkd.cli import main


@pytest.fixture
def data(tmp_path):
    for split in ("train", "validation"):
        frame = pd.DataFrame({"sentence": ["a good film", "a bad film"] * 4, "label": [1, 0] * 4})
        frame.to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def test_a_mistake_gives_one_line_and_status_2_in_a_process_of_its_own(data, tmp_path):
    words = ["train", "arc-sst2", "teacher=does/not/exist", f"data={data}", f"output_dir={tmp_path / 'run'}"]
    found = subprocess.run([sys.executable, "-m", "fastkd.cli", *words], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("fastkd train: teacher=does/not/exist is no model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.parquet", "validation.parquet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arc-sst3"], "fastkd train: no recipe 'arc-sst3'; shipped are arc-sst2"),
        (["arc-sst2", "teacher"], "fastkd train: 'teacher' is not of the form key=value"),
        (["arc-sst2"], "fastkd train: arc: teacher must be given"),
        (["arc-sst2", "teacher=x", "techer=y"], "fastkd train: arc: unknown key 'techer'; did you mean 'teacher'?"),
        (["arc-sst2", "teacher=x", "stage_a.maxsteps=1"], "stage_a: unknown key 'maxsteps'; did you mean 'max_steps'?"),
        (["arc-sst2", "teacher=x", "data=no/such/folder"], "the folder no/such/folder does not exist"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_recipe_the_command_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "usage: fastkd train" in capsys.readouterr().err


def test_help_shows_the_shipped_recipe_and_how_to_override(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "fastkd train arc-sst2 teacher=DIR_OR_HUB_ID data=DIR_OR_HUB_NAME" in said
    assert "overwrite=true" in said


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert "train" in capsys.readouterr().err
