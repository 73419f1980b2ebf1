"""Outputs: made beside their names, swapped by rename, cleared away by the next run, never a stranger's."""

import errno
import os
import resource

import pytest

from msmoe import files
from msmoe.errors import UserError
from msmoe.files import JOURNAL, Output, write_into, write_whole
from msmoe.places import CHECKPOINT, STATISTICS


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def write_folder(out, text="new", **options):
    with Output(out, CHECKPOINT, **options) as output:
        (output.content / "model.safetensors").write_text(text)
        output.commit()


@pytest.fixture
def old(tmp_path):
    write_folder(tmp_path / "out", "old")
    return tmp_path / "out"


def test_a_link_in_the_place_of_the_output_is_replaced_and_its_target_is_left_alone(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    write_folder(tmp_path / "link", force=True)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "model.safetensors").read_text() == "new"
    assert (old / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["link", "out"]


@pytest.mark.parametrize("make", ["folder", "file", "link"])
def test_a_strangers_thing_under_the_name_of_the_partial_folder_is_left_alone(make, tmp_path):
    partial = tmp_path / ".out.msmoe-partial"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("keep")
    if make == "folder":
        (tmp_path / "elsewhere").rename(partial)
    elif make == "file":
        partial.write_text("keep")
    else:
        partial.symlink_to(tmp_path / "elsewhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is in the way, and not of msmoe's making"):
        write_folder(tmp_path / "out")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_file_called_journal_does_not_make_a_folder_ours(tmp_path):
    (tmp_path / ".out.msmoe-partial").mkdir()
    (tmp_path / ".out.msmoe-partial" / JOURNAL).write_text("dear diary")
    with pytest.raises(UserError, match="not of msmoe's making"):
        write_folder(tmp_path / "out")
    assert (tmp_path / ".out.msmoe-partial" / JOURNAL).read_text() == "dear diary"


def test_folders_called_partial_and_replaced_are_the_users(old, tmp_path):
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    write_folder(old, force=True)
    assert names(tmp_path) == ["out", "out.partial", "out.replaced"]
    assert names(tmp_path / "out.partial") == names(tmp_path / "out.replaced") == ["precious"]


def test_a_living_process_keeps_others_out(tmp_path):
    with Output(tmp_path / "out", CHECKPOINT) as output:
        with pytest.raises(UserError, match=r"another process is writing .*\.out\.msmoe-partial"):
            Output(tmp_path / "out", CHECKPOINT)
        output.commit()
    assert names(tmp_path) == ["out"]


def test_an_error_removes_folders_made_for_the_output(tmp_path):
    with pytest.raises(RuntimeError), Output(tmp_path / "a" / "b" / "out", CHECKPOINT):
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing_of_what_cannot_be_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt), Output(tmp_path / "stats", STATISTICS):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_where_names_cannot_be_exchanged_the_old_output_goes_by_way_of_a_third(old, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EXCHANGE", 1 << 20)  # a flag that no kernel knows
    write_folder(old, force=True)
    assert (old / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(old, tmp_path):
    partial = tmp_path / ".out.msmoe-partial"
    output = Output(old, CHECKPOINT, force=True)
    (output.content / "model.safetensors").write_text("new")
    os.rename(old, partial / files.REPLACED)
    output.release()  # what the end of a process does
    with pytest.raises(UserError, match="out exists; use --force"):
        write_folder(old)
    assert (old / "model.safetensors").read_text() == "old"


def test_what_was_replaced_is_not_taken_for_what_is_to_be_resumed(old, tmp_path):
    output = Output(old, CHECKPOINT, force=True)
    (output.content / "model.safetensors").write_text("new")
    output.record("done")
    output.record({"commit": output.content.stat().st_ino})
    files.swap(output.content, output.place, aside=tmp_path / "unused")
    output.release()  # killed before the old output was removed
    with Output(old, CHECKPOINT, force=True, resume=True) as resumed:
        assert resumed.records == []
        assert names(resumed.content) == []
    assert (old / "model.safetensors").read_text() == "new"


def test_a_journal_is_trusted_up_to_its_first_line_that_is_none(tmp_path):
    output = Output(tmp_path / "out", CHECKPOINT)
    output.record(["one"])
    output.release()
    journal = tmp_path / ".out.msmoe-partial" / JOURNAL
    journal.write_bytes(journal.read_bytes() + b"\0\0\0\n" + b'["two"]\n')
    with Output(tmp_path / "out", CHECKPOINT, resume=True) as resumed:
        assert resumed.records == [["one"]]


def test_a_file_larger_than_the_process_may_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes
    try:
        with pytest.raises(UserError, match=r"cannot write .*file: the file would be larger than this process may"):
            write_whole(tmp_path / "file", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_files_are_written_beside_what_a_folder_holds(tmp_path):
    (tmp_path / "out" / "thesis").mkdir(parents=True)
    (tmp_path / "out" / "thesis" / "one.tex").write_text("mine")
    (tmp_path / "out" / "a.png").write_text("old")
    inode = (tmp_path / "out" / "thesis" / "one.tex").stat().st_ino
    with write_into(tmp_path / "out", ["a.png", "b.png"], force=True) as folder:
        (folder / "a.png").write_text("new")
    assert names(tmp_path / "out") == ["a.png", "thesis"]
    assert (tmp_path / "out" / "a.png").read_text() == "new"
    assert (tmp_path / "out" / "thesis" / "one.tex").stat().st_ino == inode
    assert names(tmp_path) == ["out"]


def test_files_that_cannot_all_be_written_leave_the_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_text("old")
    with (  # noqa: PT012
        pytest.raises(UserError, match=r"cannot write .*out: the disk is full"),
        write_into(tmp_path / "out", ["a.png", "b.png"], force=True) as folder,
    ):
        (folder / "a.png").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "out" / "a.png").read_text() == "old"
    assert names(tmp_path) == ["out"]
