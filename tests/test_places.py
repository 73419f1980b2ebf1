"""Where an output may go: inputs and strangers' files are never written over."""

import os

import pytest

from msmoe.errors import UserError
from msmoe.places import CHECKPOINT, FILE, PARTIAL, STATISTICS, check_place, partial_of


@pytest.fixture
def ours(tmp_path):
    """A folder that looks like a checkpoint."""
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    return folder


def test_an_input_is_never_an_output_whatever_its_spelling(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(ours)
    for spelling in (ours, tmp_path / "x" / ".." / "ours", "ours", tmp_path / "link"):
        with pytest.raises(UserError, match="is what it would be made from: choose another --out"):
            check_place(tmp_path / spelling, CHECKPOINT, force=True, inputs=[ours])


def test_a_second_name_of_an_input_file_is_the_input(tmp_path):
    (tmp_path / "data.jsonl").touch()
    os.link(tmp_path / "data.jsonl", tmp_path / "results.json")
    with pytest.raises(UserError, match="is what it would be made from"):
        check_place(tmp_path / "results.json", FILE, force=True, inputs=[tmp_path / "data.jsonl"])


@pytest.mark.parametrize("inside", ["new", "deep/er", "link/new"])
def test_an_output_inside_an_input_is_refused(inside, ours, tmp_path):
    (tmp_path / "ours" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"lies inside .*ours, which it is made from"):
        check_place(ours / "new", CHECKPOINT, inputs=[ours])
    (tmp_path / "way").symlink_to(ours)
    with pytest.raises(UserError, match="lies inside"):
        check_place(tmp_path / "way" / inside.removeprefix("link/"), CHECKPOINT, inputs=[ours])


def test_an_output_around_an_input_is_refused(ours, tmp_path):
    with pytest.raises(UserError, match=r"holds .*ours, which it is made from"):
        check_place(tmp_path, CHECKPOINT, force=True, inputs=[ours])


def test_the_name_of_a_data_set_is_no_path(tmp_path):
    check_place(tmp_path / "new", CHECKPOINT, inputs=["allenai/c4"])


def test_force_replaces_outputs_of_the_same_kind_only(ours):
    check_place(ours, CHECKPOINT, force=True)
    with pytest.raises(UserError, match="ours is no statistics directory, so --force does not replace it"):
        check_place(ours, STATISTICS, force=True)


def test_force_does_not_replace_a_folder_with_folders_in_it(ours):
    (ours / "thesis").mkdir()
    with pytest.raises(UserError, match="ours holds the folder thesis, which no checkpoint does: move it away"):
        check_place(ours, CHECKPOINT, force=True)


def test_force_does_not_replace_the_current_folder(ours, monkeypatch):
    monkeypatch.chdir(ours)
    for spelling in (ours, "."):
        with pytest.raises(UserError, match="is a mount point or holds the current folder"):
            check_place(ours / spelling, CHECKPOINT, force=True)


def test_a_file_and_a_folder_do_not_replace_each_other(ours, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: give the name of a folder"):
        check_place(tmp_path / "file", CHECKPOINT, force=True)
    with pytest.raises(UserError, match="ours is a folder: give the name of a file"):
        check_place(ours, FILE, force=True)


def test_devices_and_pipes_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(UserError, match="is neither a file nor a folder"):
            check_place(name, FILE, force=True)


def test_a_link_to_nowhere_exists(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link exists; use --force"):
        check_place(tmp_path / "link", CHECKPOINT)


def test_a_name_too_long_for_the_disk_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: File name too long"):
        check_place(tmp_path / ("x" * 256), CHECKPOINT)


def test_the_longest_name_still_has_room_for_its_partial_folder(tmp_path):
    place = tmp_path / ("x" * 255)
    partial = partial_of(place)
    assert partial.parent == tmp_path
    assert len(partial.name) <= 255
    assert partial.name.endswith(PARTIAL)
