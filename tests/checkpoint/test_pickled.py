"""`pytorch_model.bin`: read lazily, bit by bit, and never run."""

import json
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from tiny import LAYERS, build_switch, load_tensors, logits_of, random_records, save_switch

import msmoe
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.formats.convert import convert


@pytest.fixture
def pickled(tmp_path):
    """`switch` as its state dictionary: every tied embedding under its own name."""
    folder = tmp_path / "pickled"
    save_switch(folder)
    (folder / "model.safetensors").unlink()
    torch.save(build_switch().state_dict(), folder / "pytorch_model.bin")
    return folder


def write_bin(folder, content, **options):
    torch.save(content, folder / "pytorch_model.bin", **options)
    return folder


def test_every_tensor_reads_as_torch_reads_it(pickled):
    checkpoint, state = Checkpoint(pickled), build_switch().state_dict()
    for name in checkpoint:
        assert torch.equal(checkpoint.read(name), state[name])
        assert b"".join(checkpoint.blocks(name)) == state[name].numpy().tobytes()


def test_tied_weights_count_once_under_their_first_name(pickled, switch):
    assert set(Checkpoint(pickled)) == set(Checkpoint(switch))
    assert Checkpoint(pickled).num_bytes == Checkpoint(switch).num_bytes


def test_weights_that_are_not_tied_are_all_kept(pickled):
    edit_config(pickled, tie_word_embeddings=False)
    assert {"lm_head.weight", "shared.weight"} <= set(Checkpoint(pickled))


def test_fingerprint_and_statistics_are_those_of_the_safetensors(pickled, switch, data):
    assert Checkpoint(pickled).fingerprint == Checkpoint(switch).fingerprint
    assert msmoe.profile(pickled, data).digest == msmoe.profile(switch, data).digest


def test_shards_and_their_index_are_read(pickled, switch):
    state = list(build_switch().state_dict().items())
    weight_map = {}
    for number, part in enumerate((state[:20], state[20:]), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(dict(part), pickled / name)
        weight_map |= {tensor: name for tensor, _ in part}
    (pickled / "pytorch_model.bin").unlink()
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read = Checkpoint(pickled)
    reference = Checkpoint(switch)
    assert all(torch.equal(read.read(name), reference.read(name)) for name in reference)


def test_views_and_the_format_before_zip_files_are_read_too(pickled):
    state = {"w": torch.arange(12.0).view(3, 4).T, "half": torch.arange(8.0)[4:]}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        checkpoint = Checkpoint(write_bin(pickled, state, **options))
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
        assert torch.equal(checkpoint.read("w", index=1), state["w"][1])
        assert b"".join(checkpoint.blocks("w")) == state["w"].contiguous().numpy().tobytes()


class Command:
    """What a pickle must not do."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_by_name_and_not_run(protocol, pickled, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Command()}, protocol=protocol))
    with pytest.raises(UserError, match=r"pytorch_model.bin is refused: it holds .*(system|more than tensors)"):
        Checkpoint(pickled)
    torch.save({"w": Command()}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is refused: it holds (posix|os).system, not only tensors"):
        Checkpoint(pickled)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"epoch": 3, "w": torch.ones(2)}, "'epoch' is int, not a tensor"),
        ({"state_dict": {"w": torch.ones(2)}}, "'state_dict' is dict, not a tensor"),
        ({"w": torch.ones(2, device="meta")}, "tensor w was saved without its values"),
        ([torch.ones(2)], "it holds list, not named tensors"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "tensor w is torch.complex64"),
        ({"w": torch.ones(2, 2).to_sparse()}, "tensor w is torch.sparse_coo"),
    ],
)
def test_anything_but_named_dense_tensors_is_refused(content, complaint, pickled):
    with pytest.raises(UserError, match=complaint):
        Checkpoint(write_bin(pickled, content))


@pytest.mark.parametrize("length", [0, 3, 100, 5000, -1])
def test_a_truncated_file_is_refused(length, pickled):
    file = pickled / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"pytorch_model.bin is (truncated|refused)"):
        Checkpoint(pickled)


def test_a_pointer_of_git_lfs_says_how_to_get_the_weights(pickled):
    (pickled / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"holds no weights: it is a git-lfs pointer"):
        Checkpoint(pickled)


def test_the_whole_pipeline_runs_from_a_pickle(pickled, switch, stats, data, tmp_path):
    for source, name in ((pickled, "a"), (switch, "b")):
        plan = msmoe.plan(source, stats, experts=3)
        msmoe.apply(source, plan, tmp_path / name, stats=stats)
    first, second = load_tensors(tmp_path / "a"), load_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = random_records(4, seed=9)
    assert torch.equal(logits_of(load(pickled), records), logits_of(load(switch), records))


def test_converting_keeps_every_bit_and_what_else_is_in_the_folder(pickled, tmp_path):
    (pickled / "README.md").write_text("card")
    report = convert(pickled, tmp_path / "out")
    assert report.was_pickled
    assert Checkpoint(tmp_path / "out").fingerprint == Checkpoint(pickled).fingerprint
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip


def test_reading_takes_the_memory_of_a_tensor_not_of_the_file(tmp_path):
    """64 tensors of 4 MB are read one after the other in a process that may not have 256 MB more."""
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers"}')
    write_bin(tmp_path, {str(i): torch.full((2**20,), float(i)) for i in range(64)})
    code = f"""
import resource
from msmoe.checkpoint import Checkpoint
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = Checkpoint({str(tmp_path)!r})
assert sum(float(checkpoint.read(name)[0]) for name in checkpoint) == sum(range(64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(result.stdout) * unit < 64 * 2**20, resource.getpagesize()


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_experts_that_were_saved_as_one_are_all_there(pickled, tmp_path):
    state = build_switch().state_dict()
    experts = f"{LAYERS[0]}.experts.expert"
    for matrix in ("wi", "wo"):
        state[f"{experts}_1.{matrix}.weight"] = state[f"{experts}_0.{matrix}.weight"]
    write_bin(pickled, state)
    model = load(pickled)
    assert torch.equal(model.get_parameter(f"{experts}_1.wi.weight"), state[f"{experts}_0.wi.weight"])
    convert(pickled, tmp_path / "out")
    assert set(load_tensors(tmp_path / "out")) == set(state) - {
        "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    }  # fmt: skip
