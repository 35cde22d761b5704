"""The tables of sparse-coded embeddings, on models of a few kilobytes: cells that resume, choices, what is printed."""

import json
import random
import sys

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fastkd.benchmarks.tables import sparse_embeddings
from fastkd.benchmarks.tables.protocol import Cells
from fastkd.benchmarks.tables.sparse_embeddings import Sources, Table
from fastkd.benchmarks.tables.sparse_embeddings_page import RATIOS, plot_scores, show
from fastkd.data.wordpiece import train_wordpiece


def sentences(count: int, seed: int) -> pd.DataFrame:
    draw = random.Random(seed)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ado", "eli", "iru", "ona", "upe")]
    rows = [(" ".join(draw.choices(words, k=draw.randint(3, 9))), row % 2) for row in range(count)]
    return pd.DataFrame(rows, columns=["sentence", "label"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A teacher of random weights that is also the fine-tuned one and the student, and two tasks."""
    folder = tmp_path_factory.mktemp("sources")
    for task, seed in (("sst2", 0), ("cola", 1)):
        (folder / task).mkdir()
        sentences(200, seed).to_parquet(folder / task / "train.parquet")
        sentences(40, seed + 2).to_parquet(folder / task / "validation.parquet")
    text = folder / "text.txt"
    text.write_text("\n".join(sentences(60, 9)["sentence"]))
    tokenizer = train_wordpiece(text.read_text().splitlines(), 120, max_length=128)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
        id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    place = str(folder / "teacher")
    return Sources(
        teacher=place, data=str(folder), text=str(text), student=place, japanese=str(text), sst2=place, epochs=1,
        japanese_steps=2, output_dir=str(folder / "run"),
    )  # fmt: skip


@pytest.fixture
def cells(tmp_path):
    return Cells(tmp_path / "cells.jsonl")


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """The cells of SST-2."""
    cells = Cells(tmp_path_factory.mktemp("finished") / "cells.jsonl")
    Table(sources, cells).run("sst2")
    return cells


def test_a_finished_row_is_not_made_again(sources, finished, monkeypatch):
    before = finished.path.read_text()
    monkeypatch.setattr(sparse_embeddings, "logits", lambda *args: pytest.fail("a model was read again"))
    Table(sources, finished).run("sst2")
    assert finished.path.read_text() == before


def test_only_missing_cells_are_made(sources, finished, cells):
    lines = finished.path.read_text().splitlines()
    lost = [line for line in lines if json.loads(line)["row"] in ("sst2/svd/14", "sst2/kept 0.3/8")]
    cells.path.write_text("".join(line + "\n" for line in lines if line not in lost))
    Table(sources, cells).run("sst2")
    added = cells.path.read_text().splitlines()[len(lines) - len(lost) :]
    assert len(lost) == 2
    assert [json.loads(line)["row"] for line in added] == ["sst2/kept 0.3/8", "sst2/svd/14"]
    for line, again in zip(sorted(lost), sorted(added), strict=True):
        assert json.loads(line)["predictions"] == json.loads(again)["predictions"]


def test_every_cell_holds_its_settings_and_keeps_to_its_budget(finished):
    found = [cell for cell in finished.all() if "budget" in cell["settings"]]
    assert {cell["split"] for cell in found} == {"validation", "held-out"}
    for cell in found:
        assert cell["bytes"] <= cell["settings"]["budget"]
        assert cell["row"].startswith("sst2/")


def test_validation_is_read_once_for_each_cell_and_never_to_choose(sources, cells, monkeypatch):
    table = Table(sources, cells)
    subject = table.subject("sst2")
    read = []
    exact = sparse_embeddings.logits
    monkeypatch.setattr(
        sparse_embeddings, "logits", lambda model, tokenizer, data: read.append(data) or exact(model, tokenizer, data)
    )
    setting = table.chosen(subject, "sparse", 3.9)
    assert len(read) > 1 and all(data is subject.held_out for data in read)
    tried = cells.find("sst2/sparse/3.9", "held-out")
    assert setting == min(tried, key=lambda cell: cell["distance"])["settings"]["setting"]


def test_other_subjects_take_what_was_chosen_on_sst2(sources, cells):
    table = Table(sources, cells)
    table.chosen(table.subject("arc"), "pq_rare", 0.5)
    assert {cell["row"] for cell in cells.all() if cell["split"] == "held-out"} == {"sst2/pq_rare/0.5"}


def test_a_small_task_is_fine_tuned_once(sources, cells):
    first = Table(sources, cells).subject("cola").table
    again = Table(sources, cells).subject("cola").table
    assert torch.equal(first, again)
    assert [cell["row"] for cell in cells.all()] == ["cola/dense"]
    assert cells.all()[0]["settings"]["finetune"]["num_train_epochs"] == 1


def test_counts_of_another_text_give_another_code(sources, cells):
    table = Table(sources, cells)
    for counted in ("task", "general text"):
        table.add_kept("sst2", 0.3, 4, counted)
    task, text = (cell for cell in cells.all() if "kept" in cell["row"])
    assert task["bytes"] == text["bytes"]
    assert task["error_in_validation"] != text["error_in_validation"]
    assert 0 < task["rare_share"] < 1


def test_the_japanese_encoder_is_compared_with_itself(sources, cells):
    Table(sources, cells).run("japanese")
    found = {cell["row"]: cell for cell in cells.all()}
    assert len(found) == 4
    for cell in found.values():
        assert cell["bytes"] < cell["dense_bytes"]
        assert 0 < cell["cosine"] < 1
    assert found["japanese/sparse/0.5"]["rare_share"] < found["japanese/sparse/0.1"]["rare_share"]


def test_a_table_without_cells_says_not_run(cells):
    text = show(cells)
    assert "not run" in text and "does not fit" not in text
    assert text.count("\n### ") + 1 == 6 + len(RATIOS)


def test_finished_cells_stand_in_the_tables_and_in_the_plot(finished, tmp_path):
    text = show(finished)
    [dense] = [cell for cell in finished.all() if cell["row"] == "sst2/dense"]
    assert f"| dense table | {100 * dense['score']:.1f} | not run |" in text
    assert "does not fit" in text  # a codebook in a table of some kilobytes
    plot_scores(finished, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_a_row_without_its_data_is_refused_before_any_work(sources, cells, monkeypatch, capsys):
    monkeypatch.setattr(sparse_embeddings, "RESULTS", cells.path)
    monkeypatch.setattr(sys, "argv", ["table", f"teacher={sources.teacher}", "--rows", "sst2,japanese"])
    with pytest.raises(SystemExit):
        sparse_embeddings.main()
    assert "--rows japanese needs japanese=DIR" in capsys.readouterr().err
    assert not cells.all()


def test_show_runs_nothing(finished, monkeypatch, capsys):
    monkeypatch.setattr(sparse_embeddings, "RESULTS", finished.path)
    monkeypatch.setattr(sys, "argv", ["table", "--show"])
    sparse_embeddings.main()
    assert "### Points lost" in capsys.readouterr().out
