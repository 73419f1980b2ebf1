"""Which files of a folder are read, and which never."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits_of, random_records, save_switch

import msmoe
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families.loading import load


@pytest.fixture
def sharded(tmp_path):
    return save_switch(tmp_path / "sharded", max_shard_size="20KB")


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_statistics_weights_and_model_come_from_the_same_files(sharded, data):
    """An old index with its shards beside a new single file: the single file is the checkpoint."""
    other = save_switch(sharded.parent / "other", seed=1)
    shutil.copy(other / "model.safetensors", sharded)
    records = random_records(4)
    assert Checkpoint(sharded).fingerprint == Checkpoint(other).fingerprint
    assert torch.equal(logits_of(load(sharded), records), logits_of(load(other), records))
    assert msmoe.profile(sharded, data).digest == msmoe.profile(other, data).digest


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b.bin", 7, None, "a\n"])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, sharded):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "other.safetensors")
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda content: content["weight_map"].update({"shared.weight": name}),
    )
    with pytest.raises(UserError, match=r"the file of 'shared.weight' (lies outside the folder|must be a file name)"):
        Checkpoint(sharded)


def test_a_link_out_of_the_folder_is_refused(sharded, tmp_path):
    file = next(sharded.glob("*.safetensors"))
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=r"is a link out of its folder, to .*elsewhere.safetensors"):
        Checkpoint(sharded)


def test_links_of_the_hubs_cache_are_followed(switch, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(switch.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert Checkpoint(snapshot).fingerprint == Checkpoint(switch).fingerprint


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_is_refused_without_waiting(name, copied):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(UserError, match=f"{name} is not .*regular file"):
        Checkpoint(copied)


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_refused(sharded):
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda content: content["weight_map"].update({"lost": next(iter(content["weight_map"].values()))}),
    )
    with pytest.raises(UserError, match="names tensor lost, which no shard holds"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', "\udc80", "{", ""]
)
def test_a_configuration_that_is_no_json_is_one_line(text, copied):
    (copied / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config.json is not a model's configuration: it") as caught:
        Checkpoint(copied)
    assert len(str(caught.value).splitlines()) == 1


def test_opening_needs_neither_torch_nor_numpy(switch):
    code = f"""
import sys
from msmoe.checkpoint.reader import Checkpoint
from msmoe.families import inspectable_family_of
checkpoint = Checkpoint({str(switch)!r})
assert len(inspectable_family_of(checkpoint).stored_layers(checkpoint)) == 4
assert not {{"torch", "numpy", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- fingerprints


@pytest.mark.parametrize("place", [0, 700, -1])
def test_the_fingerprint_sees_every_value(place, copied):
    before = Checkpoint(copied).fingerprint
    tensors = load_file(copied / "model.safetensors")
    name = "encoder.block.0.layer.1.mlp.wi.weight"
    tensors[name].view(-1)[place % tensors[name].numel()] += 1
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert Checkpoint(copied).fingerprint != before


def test_the_fingerprint_sees_the_configuration_but_not_who_wrote_it(copied):
    before = Checkpoint(copied).fingerprint
    edit_json(copied / "config.json", lambda config: config.update(transformers_version="9", _name_or_path="x"))
    assert Checkpoint(copied).fingerprint == before
    edit_json(copied / "config.json", lambda config: config.update(expert_capacity=3))
    assert Checkpoint(copied).fingerprint != before


def test_a_remembered_fingerprint_is_forgotten_when_a_file_changes(copied, monkeypatch, tmp_path):
    """The change keeps size and modification time, as `touch -r` and archives can."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("msmoe.checkpoint.fingerprint.SETTLED_NS", 0)
    before = Checkpoint(copied).fingerprint
    assert Checkpoint(copied).fingerprint == before
    assert len(json.loads((tmp_path / "cache" / "msmoe" / "fingerprints.json").read_text())) == 1
    file = copied / "model.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Checkpoint(copied).fingerprint != before


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 3}', ""])
def test_a_damaged_cache_is_no_cache(text, copied, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = Checkpoint(copied).fingerprint
    (tmp_path / "msmoe").mkdir(exist_ok=True)
    (tmp_path / "msmoe" / "fingerprints.json").write_text(text)
    assert Checkpoint(copied).fingerprint == before
