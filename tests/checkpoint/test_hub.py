"""Checkpoints by their id on the hub: a real client in a fresh process, and a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub import COMMIT, serve
from tiny import build_switch, weight_files

from msmoe.checkpoint import Checkpoint


@pytest.fixture
def pickled(tmp_path):
    """A repository as public Switch checkpoints are: `pytorch_model.bin`, and a format that is not read."""
    folder = tmp_path / "pickled"
    model = build_switch()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "flax_model.msgpack").write_bytes(b"x" * 10_000)
    return folder


def msmoe(*arguments, hub_url, cache, **environment):
    """Run the command in a fresh process whose hub is `hub_url` and whose caches are in `cache`."""
    settings = {
        "HF_ENDPOINT": hub_url, "HF_HOME": str(cache / "hf"), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "msmoe.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings | environment, timeout=120)


def test_inspect_of_a_repository_fetches_the_headers_of_safetensors_and_no_weight(switch, tmp_path):
    with serve({"google/switch": switch}) as hub:
        result = msmoe("inspect", "google/switch", "--json", hub_url=hub.url, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["path"], summary["num_bytes"]) == ("google/switch", Checkpoint(switch).num_bytes)
    assert not list((tmp_path / "hf").rglob("model.safetensors"))


def test_only_the_weights_that_are_read_are_downloaded_and_converted_bit_by_bit(pickled, tmp_path):
    with serve({"google/switch": pickled}) as hub:
        result = msmoe("convert", "google/switch", "--out", tmp_path / "out", hub_url=hub.url, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Checkpoint(tmp_path / "out").fingerprint == Checkpoint(pickled).fingerprint
    assert "flax_model.msgpack" not in hub.bytes_sent
    assert hub.bytes_sent["pytorch_model.bin"] == (pickled / "pytorch_model.bin").stat().st_size


def test_safetensors_are_taken_before_pickles(switch, pickled, tmp_path):
    shutil.copy(switch / "model.safetensors", pickled)
    with serve({"google/switch": pickled}) as hub:
        result = msmoe("convert", "google/switch", "--out", tmp_path / "out", hub_url=hub.url, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "pytorch_model.bin" not in hub.bytes_sent


def test_offline_the_cache_serves(switch, tmp_path):
    with serve({"google/switch": switch}) as hub:
        assert (
            msmoe("convert", "google/switch", "--out", tmp_path / "a", hub_url=hub.url, cache=tmp_path).returncode == 0
        )
    offline = {"HF_HUB_OFFLINE": "1", "hub_url": "http://127.0.0.1:9", "cache": tmp_path}
    result = msmoe("convert", "google/switch", "--out", tmp_path / "b", **offline)
    assert result.returncode == 0, result.stderr
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")


def test_without_a_network_the_cache_serves_too(switch, tmp_path):
    with serve({"google/switch": switch}) as hub:
        msmoe("convert", "google/switch", "--out", tmp_path / "a", hub_url=hub.url, cache=tmp_path)
    result = msmoe("convert", "google/switch", "--out", tmp_path / "b", hub_url="http://127.0.0.1:9", cache=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_and_cache_one_line_says_what_to_do(environment, tmp_path):
    result = msmoe("inspect", "google/switch", hub_url="http://127.0.0.1:9", cache=tmp_path, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "no folder google/switch, and the hub cannot be reached" in line
    assert "hf download google/switch --local-dir DIR" in line


def test_an_unknown_repository_and_an_unknown_revision_are_named(switch, tmp_path):
    with serve({"google/switch": switch}) as hub:
        unknown = msmoe("inspect", "google/other", hub_url=hub.url, cache=tmp_path)
        revision = msmoe("inspect", "google/switch", "--revision", "v9", hub_url=hub.url, cache=tmp_path)
        known = msmoe("inspect", "google/switch", "--revision", COMMIT, hub_url=hub.url, cache=tmp_path)
    assert "there is no folder google/other, and no such repository on the hub" in unknown.stderr
    assert "google/switch has no revision 'v9'" in revision.stderr
    assert [r.returncode for r in (unknown, revision, known)] == [2, 2, 0]


def test_a_repository_without_weights_that_can_be_read_is_refused(pickled, tmp_path):
    (pickled / "pytorch_model.bin").unlink()
    with serve({"google/switch": pickled}) as hub:
        result = msmoe("convert", "google/switch", "--out", tmp_path / "out", hub_url=hub.url, cache=tmp_path)
    assert result.returncode == 2
    assert "google/switch holds no weights that can be read" in result.stderr


def test_a_revision_of_a_folder_is_refused(switch, tmp_path):
    result = msmoe("inspect", switch, "--revision", "main", hub_url="http://127.0.0.1:9", cache=tmp_path)
    assert result.returncode == 2
    assert "--revision is of a repository on the hub" in result.stderr


def test_an_output_is_uploaded_as_it_is(switch, tmp_path):
    with serve({}) as hub:
        result = msmoe(
            "convert", switch, "--out", tmp_path / "out", "--push", "me/small", hub_url=hub.url, cache=tmp_path,
            HF_TOKEN="hf_token",
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"pushed to {hub.url}/me/small/commit/{COMMIT}" in result.stderr
    assert hub.uploaded["me/small"] == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("repository", "environment", "complaint"),
    [
        ("me/small", {"HF_TOKEN": ""}, "--push needs a token"),
        ("not a name", {"HF_TOKEN": "hf_token"}, "is no repository: give OWNER/NAME"),
        ("me/small", {"HF_TOKEN": "hf_token", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_any_work(repository, environment, complaint, switch, tmp_path):
    result = msmoe(
        "convert", switch, "--out", tmp_path / "out", "--push", repository, hub_url="http://127.0.0.1:9",
        cache=tmp_path, **environment,
    )  # fmt: skip
    assert result.returncode == 2
    assert complaint in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_take_the_output_leaves_it_complete(switch, tmp_path):
    result = msmoe(
        "convert", switch, "--out", tmp_path / "out", "--push", "me/small", hub_url="http://127.0.0.1:9",
        cache=tmp_path, HF_TOKEN="hf_token",
    )  # fmt: skip
    assert result.returncode == 2
    assert "which is complete" in result.stderr.splitlines()[-1]
    assert Checkpoint(tmp_path / "out").num_bytes == Checkpoint(switch).num_bytes
