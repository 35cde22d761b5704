"""The tables of EGKD, on models of a few kilobytes: rows that differ in their branches, what is shared and printed."""

import sys

import pytest

from fastkd.benchmarks.tables import egkd
from fastkd.benchmarks.tables.egkd import Table, sources_from
from fastkd.benchmarks.tables.egkd_page import ROWS, show, show_held_out
from fastkd.benchmarks.tables.protocol import Cells


@pytest.fixture(scope="module")
def words(glue_folder, tmp_path_factory):
    """What the command is given."""
    teacher = glue_folder / "teacher"
    return [
        f"teacher={teacher}", f"data={glue_folder}", f"output_dir={tmp_path_factory.mktemp('run')}", "max_length=32",
        f"teachers={{sst2: {teacher}}}", "epochs={sst2: 1, stsb: 1}", "distil.pool={samples: 4}",
        "distil.selector={epochs: 1, hidden: 4}", "3x384.student={layers: 1}", "bilstm.student.hidden=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """Every row of SST-2."""
    cells = Cells(tmp_path_factory.mktemp("finished") / "cells.jsonl")
    table = Table(sources_from(words), cells)
    for row in ROWS:
        assert table.run("sst2", row, 0)
    return cells


def test_rows_differ_in_their_branches_alone(finished):
    found = {cell["row"].partition("/")[2]: cell["settings"] for cell in finished.all()}
    branches = {row: set(found[row]["distil"].pop("branches")) for row in ROWS}
    assert branches == {
        "3x384/plain": set(), "3x384/gradient": {"gradient"}, "3x384/perturbation": {"perturbation"},
        "3x384/selection": {"selection"}, "3x384/mix": {"gradient", "perturbation", "selection"},
        "bilstm/plain": set(), "bilstm/branch": {"gradient"},
    }  # fmt: skip
    assert all(found[row] == found["3x384/plain"] for row in ROWS if row.startswith("3x384/"))
    assert found["bilstm/branch"] == found["bilstm/plain"]


def test_a_finished_cell_is_not_made_again(words, finished):
    table = Table(sources_from(words), finished)
    assert not any(table.run("sst2", row, 0) for row in ROWS)
    with pytest.raises(ValueError, match="holds 'sst2/3x384/gradient'"):
        Table(sources_from([*words, "weights.gradient=3"]), finished).run("sst2", "3x384/gradient", 0)


def test_what_the_teacher_gives_is_computed_once_for_all_rows_and_seeds(words, finished, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("fastkd.recipes.egkd_teacher.compute_results", run)
    table = Table(sources_from(words), finished)
    settings = table.settings("sst2", "bilstm/branch", {})
    assert len(table.results("sst2", settings)) == 96


def test_every_student_says_how_far_it_explains_as_its_teacher(finished):
    for cell in finished.all():
        kinds = cell.get("consistency", {})
        assert set(kinds) == (set() if cell["row"].endswith("/teacher") else {"gradient", "perturbation"})
        assert all(-1 <= kind["cosine"] <= 1 for kind in kinds.values())


def test_every_student_says_what_a_step_took(finished):
    assert all(cell["ms_per_step"] > 0 for cell in finished.all() if not cell["row"].endswith("/teacher"))


def test_a_bilstm_is_trained_where_it_was_asked_for(words, finished):
    table = Table(sources_from(words), finished)
    assert not table.run("mrpc", "bilstm/plain", 0)


def test_seeds_of_a_bilstm_are_of_its_weights_too(words, finished):
    table = Table(sources_from(words), finished)
    teacher, _ = table.teacher("sst2")
    one, other = (table.student("bilstm", teacher, seed).get_parameter("classifier.weight") for seed in (0, 1))
    assert (one != other).any()


def test_choices_say_what_was_changed(words, tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    sources = sources_from([*words, f"output_dir={tmp_path / 'run'}", "distil.temperature=3"])
    assert Table(sources, cells, "held-out").run("sst2", "3x384/plain", 0)
    assert "distil.temperature=3" in show_held_out(cells)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("weights.gradints=1", "weights: unknown key 'gradints'"),
        ("bilstm.branch=x", "allowed are gradient, perturbation"),
    ],
)
def test_what_is_unknown_is_refused(words, word, message):
    with pytest.raises(ValueError, match=message):
        sources_from([*words, word])


def test_the_tables_show_what_is_there_and_what_is_not(finished, monkeypatch, capsys):
    text = show(finished)
    row = next(line for line in text.splitlines() if line.startswith("| 3 x 384, gradient branch |"))  # of the scores
    assert row.count("not run") == 5
    assert text.count("| 3 x 384, all three − soft labels |") == 1
    assert "| BiLSTM, the branch best on held-out data | STS-B | not run |" in text
    plain, mix = ("| 3 x 384, soft labels | SST-2 |", "| 3 x 384, all three | SST-2 |")
    agreement = {line[: line.index("SST-2 |") + 7]: line for line in text.splitlines() if "SST-2 |" in line}
    assert agreement[plain].endswith("| 1.00× |") and agreement[mix].count(" (") == 4
    monkeypatch.setattr(sys, "argv", ["egkd", "--show", "--results", str(finished.path)])
    egkd.main()
    assert capsys.readouterr().out.strip() == text
