"""A folder is written whole or not at all."""

import pytest

from fastkd.recipes.output_folder import check_out, check_place, whole_folder


def test_what_is_written_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_stood_there_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with whole_folder(out) as folder:
        (folder / "new").write_text("x")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(type(error)), whole_folder(out) as folder:
        (folder / "new").write_text("x")
        raise error
    assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_a_new_name_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        check_out(tmp_path / name, False, "hub/model")


def test_a_file_a_full_folder_and_the_source_are_not(tmp_path):
    (tmp_path / "full" / "below").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        check_out(tmp_path / "file", True, "hub/model")
    with pytest.raises(ValueError, match="full is not empty"):
        check_out(tmp_path / "full", False, "hub/model")
    check_out(tmp_path / "full", True, "hub/model")
    for out in ("full", "full/below", "full/new", "."):
        with pytest.raises(ValueError, match="stays as it is"):
            check_out(tmp_path / out, True, tmp_path / "full")


def test_folders_that_are_missing_can_be_made_and_are_not_made_yet(tmp_path):
    check_place("out", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for check in (lambda place: check_out(place, False, "hub/model"), lambda place: check_place("out", place)):
        with pytest.raises(ValueError, match=r"out=.*below/new cannot be written: .*file takes no files"):
            check(tmp_path / "file" / "below" / "new")
