"""The tables of LRC-BERT, on models of a few kilobytes: cells that resume, equal steps, what is printed."""

import json
import sys

import numpy as np
import pytest

from fastkd.benchmarks.tables import glue, lrc_bert
from fastkd.benchmarks.tables.glue_page import difference
from fastkd.benchmarks.tables.lrc_bert import Table, sources_from
from fastkd.benchmarks.tables.lrc_bert_page import ROWS, show, show_held_out
from fastkd.benchmarks.tables.protocol import Cells


@pytest.fixture(scope="module")
def words(glue_folder, tmp_path_factory):
    """What the command is given."""
    teacher = glue_folder / "teacher"
    return [
        f"teacher={teacher}", f"data={glue_folder}", f"output_dir={tmp_path_factory.mktemp('run')}", "max_length=32",
        f"teachers={{sst2: {teacher}}}", "epochs={sst2: 1, mrpc: 1}", "general.max_steps=2",
        "3x384.student={layers: 2, init: first}",
        "4x312.student={layers: 1, hidden: 8, heads: 2, ffn: 8, init: random}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """Every row of SST-2 for one seed, and two of them for another."""
    cells = Cells(tmp_path_factory.mktemp("finished") / "cells.jsonl")
    table = Table(sources_from(words), cells)
    for seed, rows in ((0, ROWS), (1, ("3x384/plain", "3x384/lrc_bert"))):
        for row in rows:
            assert table.run("sst2", row, seed)
    return cells


def test_a_finished_cell_is_not_made_again_and_a_missing_one_comes_out_the_same(words, finished, tmp_path):
    table = Table(sources_from(words), finished)
    assert not any(table.run("sst2", row, 0) for row in ROWS)
    lines = finished.path.read_text().splitlines()
    [lost] = [line for line in lines if '"sst2/3x384/lrc_bert"' in line and json.loads(line)["seed"] == 1]
    (tmp_path / "cells.jsonl").write_text("".join(f"{line}\n" for line in lines if line != lost))
    cells = Cells(tmp_path / "cells.jsonl")
    elsewhere = sources_from([*words, f"output_dir={tmp_path / 'run'}"])
    assert Table(elsewhere, cells).run("sst2", "3x384/lrc_bert", 1)
    assert cells.all()[-1]["predictions"] == json.loads(lost)["predictions"]


def test_every_row_has_the_same_steps_and_says_its_settings(finished):
    found = {cell["row"].partition("/")[2]: cell["settings"] for cell in finished.all() if cell["seed"] == 0}
    assert found.keys() == {"teacher", *ROWS}
    assert {settings["epochs"] for row, settings in found.items() if row != "teacher"} == {1}
    assert found["3x384/plain"]["distil"]["contrast_weight"] == 0
    assert found["3x384/plain"]["distil"]["perturbation"] is None
    assert found["3x384/no_contrast"]["distil"]["contrast_only"] == 0
    assert found["3x384/lrc_bert"]["teacher"].keys() == {"given"}  # and the digest of its weights
    assert found["4x312/lrc_bert"]["student"]["hidden"] == 8


def test_other_settings_do_not_fill_the_same_table(words, finished):
    table = Table(sources_from([*words, "distil.temperature=3"]), finished)
    with pytest.raises(ValueError, match="holds 'sst2/3x384/lrc_bert'"):
        table.run("sst2", "3x384/lrc_bert", 0)


def test_another_text_or_another_teacher_is_another_table(words, finished, tmp_path):
    (tmp_path / "more.txt").write_text("a line of text\n")
    for other in (f"corpus=[{tmp_path / 'more.txt'}]", "seed=1", "teachers={}"):
        table = Table(sources_from([*words, other, f"output_dir={tmp_path / 'run'}"]), finished)
        with pytest.raises(ValueError, match="asked for are"):
            table.run("sst2", "3x384/lrc_bert", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher=/no/such/folder"], "teacher"),
        (["--seeds", "a"], "--seeds a: whole numbers"),
        (["x=1"], "unknown key 'x'"),
    ],
)
def test_the_command_says_what_it_cannot_take(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lrc_bert", *words])
    with pytest.raises(SystemExit):
        lrc_bert.main()
    assert message in capsys.readouterr().err


def test_sst2_is_a_fixed_part_of_its_examples(words, monkeypatch, tmp_path):
    monkeypatch.setattr(glue, "_SST2_EXAMPLES", 40)
    parts = [Table(sources_from(words), Cells(tmp_path / "c.jsonl")).train("sst2")["input_ids"][:] for _ in "12"]
    assert len(parts[0]) == 40 and parts[0] == parts[1]
    assert len(Table(sources_from(words), Cells(tmp_path / "c.jsonl")).train("mrpc")) == 96


def test_choices_never_read_the_validation_split_and_have_a_teacher_of_their_own(words, tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    table = Table(sources_from([*words, f"output_dir={tmp_path / 'run'}"]), cells, "held-out")
    for row in ("3x384/plain", "3x384/finetuned"):
        assert table.run("mrpc", row, 0)
    assert not table.run("mrpc", "3x384/plain", 0)
    tuned = sources_from([*words, f"output_dir={tmp_path / 'run'}", "3x384.distil.soft_weight=2.0"])
    assert Table(tuned, cells, "held-out").run("mrpc", "3x384/plain", 0)
    assert {cell["split"] for cell in cells.all()} == {"held-out"}
    assert all(len(cell["predictions"]) == 5 for cell in cells.all())  # 5 % of 96
    assert (tmp_path / "run" / "held-out" / "teacher-mrpc").is_dir()
    assert "distil.soft_weight=2.0" in show_held_out(cells)


def test_soft_labels_alone_can_have_settings_of_their_own(words, tmp_path):
    sources = sources_from([*words, "plain.learning_rate=1e-3", "4x312.plain.learning_rate=2e-3"])
    table = Table(sources, Cells(tmp_path / "cells.jsonl"))

    def rate(shape, row):
        return table.settings("sst2", f"{shape}/{row}", {})["distil"]["learning_rate"]

    assert (rate("3x384", "plain"), rate("4x312", "plain")) == (1e-3, 2e-3)
    assert rate("3x384", "lrc_bert") == rate("3x384", "no_contrast") == sources.recipes["3x384"].distil["learning_rate"]


def test_a_key_that_is_unknown_is_refused(words):
    with pytest.raises(ValueError, match="teachers: unknown key 'sst3'; did you mean 'sst2'"):
        sources_from([*words, "teachers={sst3: somewhere}"])
    with pytest.raises(ValueError, match="4x312: unknown key 'studnt'; did you mean 'student'"):
        sources_from([*words, "4x312.studnt={}"])


def test_a_difference_is_the_mean_over_the_seeds_that_both_rows_have(finished):
    value, distribution = difference(finished, "sst2", "3x384/lrc_bert", "3x384/plain")
    scores = {(c["row"], c["seed"]): 100 * c["score"] for c in finished.all()}
    by_seed = [scores["sst2/3x384/lrc_bert", s] - scores["sst2/3x384/plain", s] for s in (0, 1)]
    assert value == pytest.approx(np.mean(by_seed))
    assert distribution.shape == (10_000,) and distribution.min() <= value <= distribution.max()


def test_the_tables_show_what_is_there_and_what_is_not(finished, monkeypatch, capsys):
    text = show(finished)
    [row] = [line for line in text.splitlines() if line.startswith("| 3 x 384, LRC-BERT |")]
    assert " ± " in row and row.count("not run") == 5 and row.endswith("| 0, 1 |")
    assert text.count("| 3 x 384, LRC-BERT − soft labels |") == 1
    monkeypatch.setattr(lrc_bert, "RESULTS", finished.path)
    monkeypatch.setattr(sys, "argv", ["lrc_bert", "--show"])
    lrc_bert.main()
    assert capsys.readouterr().out.strip() == text
