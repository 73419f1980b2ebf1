"""Writing checkpoints: layout, shards, atomicity, resuming, and disks that refuse."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import bits

from msmoe.checkpoint import Checkpoint, TensorSpec
from msmoe.checkpoint.shards import plan_shards
from msmoe.checkpoint.writer import CheckpointWriter
from msmoe.errors import UserError

SPECS = [TensorSpec("a", "F32", (3, 4)), TensorSpec("b", "BF16", (2, 2, 3)), TensorSpec("c", "I64", (5,))]
VALUES = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(12.0).reshape(2, 2, 3).bfloat16(),
    "c": torch.arange(5),
}


def write_all(writer: CheckpointWriter) -> None:
    for name, value in VALUES.items():
        if name not in writer.done:
            writer.write(name, value)


def test_the_safetensors_library_reads_what_was_written(tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        write_all(writer)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in read.items()} == {
        name: bits(tensor) for name, tensor in VALUES.items()
    }


def test_the_order_of_writing_does_not_change_a_byte(tmp_path):
    for folder, names in (("one", "abc"), ("two", "cba")):
        with CheckpointWriter(tmp_path / folder, SPECS, identity="x") as writer:
            for name in names:
                writer.write(name, VALUES[name])
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_slices_fill_their_tensor_in_any_order(tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        write_all(writer)
        writer.write("b", VALUES["b"][1] * 2, index=1)
        writer.write("b", VALUES["b"][0] * 2, index=0)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], VALUES["b"] * 2)


def test_values_are_rounded_once_to_the_stored_dtype(tmp_path):
    value = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0))
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        write_all(writer)
        writer.write("b", value)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], value.bfloat16())


def test_copied_tensors_keep_their_bytes(switch, tmp_path):
    source = Checkpoint(switch)
    specs = [source.spec(name) for name in source]
    with CheckpointWriter(tmp_path / "out", specs, identity="x") as writer:
        for spec in specs:
            writer.copy(spec.name, source, spec.name)
        writer.write_text("config.json", (switch / "config.json").read_text())
    assert Checkpoint(tmp_path / "out").fingerprint == source.fingerprint


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_shards_keep_the_order_and_exceed_the_bound_only_with_a_single_tensor(sizes, bound):
    specs = [TensorSpec(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(specs, bound)
    assert [name for names in shards.values() for name in names] == [spec.name for spec in specs]
    for names in shards.values():
        assert len(names) == 1 or sum(sizes[int(name)] for name in names) <= bound


def test_shards_come_with_an_index_that_names_every_tensor(tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", max_shard_bytes=60) as writer:
        write_all(writer)
        writer.write_text("config.json", "{}")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    # 48 bytes of a; b has 24 and does not fit beside it, c has 40 and does not fit beside b
    assert index["weight_map"] == {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("abc", 1)}
    assert index["metadata"]["total_size"] == 48 + 24 + 40
    assert torch.equal(Checkpoint(tmp_path / "out").read("c"), VALUES["c"])


def test_the_output_appears_only_when_it_is_complete(tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        write_all(writer)
        assert not (tmp_path / "out").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_an_error_removes_the_partial_folder(tmp_path):
    with pytest.raises(RuntimeError, match="oops"), CheckpointWriter(tmp_path / "out", SPECS, identity="x"):
        raise RuntimeError("oops")
    assert not list(tmp_path.iterdir())


def test_a_forgotten_tensor_is_named_and_nothing_appears(tmp_path):
    with (  # noqa: PT012
        pytest.raises(ValueError, match="1 tensors were never written, c first"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer,
    ):
        writer.write("a", VALUES["a"])
        writer.write("b", VALUES["b"])
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a is laid out as \(3, 4\), got \(4, 3\)"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer,
    ):
        writer.write("a", VALUES["a"].T)


def interrupted(tmp_path, names: str = "ab", *, resume: bool = False) -> None:
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=resume) as writer,
    ):
        for name in names:
            writer.write(name, VALUES[name])
        raise KeyboardInterrupt


def test_a_resumed_writer_knows_what_is_done(tmp_path):
    interrupted(tmp_path)
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True) as writer:
        assert writer.done == {"a", "b"}
        writer.write("c", VALUES["c"])
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in read.items()} == {
        name: bits(tensor) for name, tensor in VALUES.items()
    }


def test_a_torn_last_line_of_the_journal_is_not_trusted(tmp_path):
    interrupted(tmp_path)
    journal = tmp_path / ".out.msmoe-partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-1])
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True) as writer:
        assert writer.done == {"a"}
        write_all(writer)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], VALUES["b"])


def test_a_line_after_a_torn_one_is_still_understood_by_the_next_resume(tmp_path):
    interrupted(tmp_path)
    journal = tmp_path / ".out.msmoe-partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-1] + b"zz")  # torn inside a name
    interrupted(tmp_path, "c", resume=True)
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True) as writer:
        assert writer.done == {"a", "c"}
        write_all(writer)


def test_an_interrupted_writer_lets_go_of_its_folder(tmp_path):
    kept = CheckpointWriter(tmp_path / "out", SPECS, identity="x")  # as a traceback in a notebook keeps it
    with pytest.raises(KeyboardInterrupt), kept:  # noqa: PT012
        kept.write("a", VALUES["a"])
        raise KeyboardInterrupt
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True) as writer:
        assert writer.done == {"a"}
        write_all(writer)


def test_a_sliced_tensor_is_not_done_before_it_is_finished(tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        writer.write("b", VALUES["b"][0], index=0)
        assert writer.done == set()
        writer.write("b", VALUES["b"][1], index=1)
        writer.finish("b")
        assert writer.done == {"b"}
        write_all(writer)


@pytest.mark.parametrize("other", [{"identity": "y"}, {"specs": SPECS[:2]}, {"max_shard_bytes": 60}])
def test_resuming_with_other_inputs_is_refused_and_keeps_the_partial_folder(other, tmp_path):
    interrupted(tmp_path)
    arguments = {"specs": SPECS, "identity": "x"} | other
    with pytest.raises(UserError, match="left by a run with other inputs; remove it or run without --resume"):
        CheckpointWriter(tmp_path / "out", resume=True, **arguments)
    assert (tmp_path / ".out.msmoe-partial" / "content" / "model.safetensors").exists()


def test_without_resume_a_partial_folder_is_started_afresh(tmp_path):
    interrupted(tmp_path)
    (tmp_path / ".out.msmoe-partial" / "content" / "leftover").touch()
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        assert writer.done == set()
        write_all(writer)
    assert not (tmp_path / "out" / "leftover").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_writer_of_the_same_folder_is_refused(resume, tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer:
        writer.write("a", VALUES["a"])
        with pytest.raises(UserError, match="another process is writing"):
            CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=resume)
        write_all(writer)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], VALUES["a"])


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists; use --force to replace it"):
        CheckpointWriter(tmp_path / "out", SPECS, identity="x")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with (  # noqa: PT012
        pytest.raises(UserError, match="appeared while it was being written"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer,
    ):
        write_all(writer)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert (tmp_path / "out" / "theirs").exists()


def test_force_replaces_the_old_folder_at_the_very_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "msmoe.json").touch()
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", force=True) as writer:
        write_all(writer)
        assert (tmp_path / "out" / "msmoe.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_too_little_room_is_reported_with_both_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="needs 112 bytes, the disk has 100 free"):  # 48 + 24 + 40
        CheckpointWriter(tmp_path / "out", SPECS, identity="x")
    assert not list(tmp_path.iterdir())


def test_too_little_room_for_a_resume_keeps_what_is_done(tmp_path, monkeypatch):
    interrupted(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="needs 40 bytes, the disk has 10 free"):  # only c is missing
        CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True)
    assert (tmp_path / ".out.msmoe-partial" / "content" / "model.safetensors").exists()


def test_a_disk_that_fills_up_while_writing_is_reported_in_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot write .*out: the disk is full"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs more rights")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk_leaves_nothing_behind(small_disk):
    spec = TensorSpec("t", "U8", (40_000,))
    with (  # noqa: PT012
        pytest.raises(UserError, match="the disk is full"),
        CheckpointWriter(small_disk / "out", [spec], identity="x") as writer,
    ):
        (small_disk / "other").write_bytes(b"x" * 40_000)
        writer.write("t", torch.ones(40_000, dtype=torch.uint8))
    assert [file.name for file in small_disk.iterdir()] == ["other"]


def test_a_folder_that_cannot_be_made_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*out: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "out", SPECS, identity="x")


# What a resumed run trusts


def weights_of(tmp_path):
    return tmp_path / ".out.msmoe-partial" / "content" / "model.safetensors"


def test_a_tensor_that_a_power_loss_zeroed_is_written_again(tmp_path):
    interrupted(tmp_path)
    weights = weights_of(tmp_path)
    size = weights.stat().st_size
    os.truncate(weights, size - 64)  # c has 40 bytes, b 24: b is gone
    os.truncate(weights, size)
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True) as writer:
        assert writer.done == {"a"}
        write_all(writer)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], VALUES["b"])


def test_what_is_said_of_a_tensor_is_trusted_with_it_or_not_at_all(tmp_path):
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer,
    ):
        for name in "ab":
            writer.write(name, VALUES[name], finish=False)
            writer.finish(name, notes={f"note {name}": {"of": name}})
        raise KeyboardInterrupt
    with weights_of(tmp_path).open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        stream.write(b"\0" * 24)
    with CheckpointWriter(tmp_path / "out", SPECS, identity="x", resume=True) as writer:
        assert writer.notes == {"note a": {"of": "a"}}
        write_all(writer)


def test_a_tensor_with_a_slice_missing_cannot_be_finished(tmp_path):
    with (  # noqa: PT012
        pytest.raises(ValueError, match="b has 2 slices, of which 1 were written"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer,
    ):
        writer.write("b", VALUES["b"][1], index=1)
        writer.finish("b")


# Values


@pytest.mark.parametrize(
    ("spec", "tensor", "complaint"),
    [
        (
            TensorSpec("t", "F16", (2,)),
            torch.tensor([1.0, 65520.0]),
            "tensor t holds 65520, which float16 cannot store",
        ),
        (
            TensorSpec("t", "F32", (1,)),
            torch.tensor([1e39], dtype=torch.float64),
            r"holds 1e\+39, which float32 cannot",
        ),
        (TensorSpec("t", "BF16", (1,)), torch.tensor([3.4e38]), "which bfloat16 cannot store"),
        (TensorSpec("t", "I32", (1,)), torch.tensor([2**31]), "which int32 cannot store"),
        (TensorSpec("t", "I64", (1,)), torch.tensor([2.5]), "holds 2.5, which int64 cannot store"),
        (TensorSpec("t", "F32", (2,)), torch.tensor([1.0, torch.nan]), "tensor t holds NaN or infinite values"),
        (TensorSpec("t", "F16", (1,)), torch.tensor([-torch.inf]), "tensor t holds NaN or infinite values"),
    ],
)
def test_a_value_that_the_file_would_not_give_back_is_named(spec, tensor, complaint, tmp_path):
    with (
        pytest.raises(UserError, match=complaint),
        CheckpointWriter(tmp_path / "out", [spec], identity="x") as writer,
    ):
        writer.write("t", tensor)
    assert not list(tmp_path.iterdir())


def test_large_finite_values_are_no_infinity_for_their_sum(tmp_path):
    values = torch.full((4,), 3e38)
    with CheckpointWriter(tmp_path / "out", [TensorSpec("t", "F32", (4,))], identity="x") as writer:
        writer.write("t", values)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["t"], values)


@pytest.fixture
def source(tmp_path):
    """Makes a checkpoint of one tensor `t`."""

    def make(tensor):
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"t": tensor}, folder / "model.safetensors", {"format": "pt"})
        return Checkpoint(folder)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_copied_tensor_with_nan_is_named(dtype, source, tmp_path):
    tensor = torch.zeros(3000, dtype=dtype)
    tensor[1500] = torch.nan
    checkpoint = source(tensor)
    with (
        pytest.raises(UserError, match=r"tensor t of .*source holds NaN or infinite values"),
        CheckpointWriter(tmp_path / "out", [checkpoint.spec("t")], identity="x") as writer,
    ):
        writer.copy("t", checkpoint, "t")


def test_a_tensor_copied_into_another_dtype_keeps_its_values(source, tmp_path):
    tensor = torch.tensor([[0.5, -2.0], [3.0, 4.0]])
    checkpoint = source(tensor.half())
    with CheckpointWriter(tmp_path / "out", [TensorSpec("s", "BF16", (1, 2, 2))], identity="x") as writer:
        writer.copy("s", checkpoint, "t", index=0)
        writer.finish("s")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["s"], tensor.bfloat16()[None])


def test_a_tensor_copied_into_another_shape_is_refused_with_both(source, tmp_path):
    checkpoint = source(torch.zeros(2, 3))
    with (
        pytest.raises(UserError, match=r"tensor t of .* has shape \(2, 3\), where \(3, 2\) is needed"),
        CheckpointWriter(tmp_path / "out", [TensorSpec("s", "F32", (3, 2))], identity="x") as writer,
    ):
        writer.copy("s", checkpoint, "t")


def test_a_complete_folder_that_its_check_refuses_gets_no_name(tmp_path):
    def check(folder):
        assert torch.equal(load_file(folder / "model.safetensors")["a"], VALUES["a"])
        raise UserError("no good")

    with (
        pytest.raises(UserError, match="no good"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x", check=check) as writer,
    ):
        write_all(writer)
    assert not list(tmp_path.iterdir())


def test_storage_that_gives_back_something_else_is_noticed(tmp_path):
    with (  # noqa: PT012
        pytest.raises(UserError, match=r"b read back from model.safetensors differs from what was written"),
        CheckpointWriter(tmp_path / "out", SPECS, identity="x") as writer,
    ):
        write_all(writer)
        with weights_of(tmp_path).open("r+b") as stream:
            stream.seek(-64, os.SEEK_END)
            stream.write(b"\1")
    assert not list(tmp_path.iterdir())
