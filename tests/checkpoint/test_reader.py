"""Reading checkpoints: the same tensors as the safetensors library, and every kind of damage."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import LAYERS, bits, load_tensors, save_switch

from msmoe.checkpoint import Checkpoint
from msmoe.checkpoint.reader import read_header
from msmoe.errors import UserError
from msmoe.families import family_of

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def raw_file(path, header, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start: int, stop: int, *, dtype="F32", shape=(1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers"}')
    return tmp_path


def test_every_tensor_reads_as_the_safetensors_library_reads_it(switch):
    checkpoint = Checkpoint(switch)
    for name, tensor in load_tensors(switch).items():
        assert bits(checkpoint.read(name)) == bits(tensor)
        assert checkpoint.read(name).shape == tensor.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_bit_for_bit(dtype, folder):
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "t": tensor}, folder / "model.safetensors")
    read = Checkpoint(folder).read("t")
    assert read.dtype == dtype
    assert bits(read) == bits(tensor)


def test_a_scalar_and_an_empty_tensor_read_with_their_shapes(folder):
    save_file({"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert checkpoint.read("scalar").item() == 2.5
    assert checkpoint.read("empty").shape == (0, 3)


def test_blocks_are_the_stored_bytes(switch):
    checkpoint = Checkpoint(switch)
    assert b"".join(checkpoint.blocks("shared.weight")) == bits(checkpoint.read("shared.weight"))


def test_sizes_are_those_of_the_tensors(switch):
    tensors = load_tensors(switch).values()
    assert Checkpoint(switch).num_parameters == sum(t.numel() for t in tensors)
    assert Checkpoint(switch).num_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_the_fingerprint_does_not_depend_on_sharding(switch, tmp_path):
    sharded = save_switch(tmp_path / "sharded", max_shard_size="20KB")
    assert Checkpoint(sharded).fingerprint == Checkpoint(switch).fingerprint


@pytest.mark.parametrize("where", [0, -1])
def test_the_fingerprint_sees_the_ends_of_a_tensor(where, copied):
    before = Checkpoint(copied).fingerprint
    tensors = load_tensors(copied)
    tensors["shared.weight"].view(-1)[where] += 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(copied).fingerprint != before


def test_the_fingerprint_sees_a_name(copied):
    before = Checkpoint(copied).fingerprint
    tensors = load_tensors(copied)
    tensors["shared.weight2"] = tensors.pop("shared.weight")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(copied).fingerprint != before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(bad, folder):
    save_file({"fine": torch.ones(3), "broken": torch.tensor([1.0, bad])}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert checkpoint.read_finite("fine").tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"tensor broken of .* holds NaN or infinite"):
        checkpoint.read_finite("broken")


def test_large_values_whose_sum_overflows_are_finite(folder):
    save_file({"t": torch.full((8,), 3e38)}, folder / "model.safetensors")
    assert Checkpoint(folder).read_finite("t").tolist() == torch.full((8,), 3e38).tolist()


def test_an_unknown_tensor_is_named(switch):
    with pytest.raises(UserError, match=r"has no tensor no.such.weight"):
        Checkpoint(switch).read("no.such.weight")


@pytest.mark.parametrize("lost", [1, 100, 20_000])
def test_a_truncated_file_is_refused_with_both_sizes(lost, copied):
    file = copied / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-lost])
    with pytest.raises(
        UserError, match=rf"truncated: its header asks for {len(content)} bytes, the file has {len(content) - lost}"
    ):
        Checkpoint(copied)


def test_bytes_after_the_end_are_refused(copied):
    with (copied / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(UserError, match="the file has"):
        Checkpoint(copied)


@pytest.mark.parametrize("content", [b"", b"1234", b"12345678", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 0)])
def test_a_file_without_header_is_refused(content, copied):
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        Checkpoint(copied)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe{}",
        b"[]",
        b"5",
        b"null",
        {"t": 5},
        {"t": None},
        {"t": {"dtype": "F32", "shape": [1]}},
        {"t": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"t": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"t": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F4", "shape": [4], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"t": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"t": entry(4, 8)},
        {"t": entry(0, 8)},
        {"a": entry(0, 4), "b": entry(0, 4)},
    ],
    ids=str,
)
def test_a_corrupted_header_is_refused(header, tmp_path):
    raw_file(tmp_path / "model.safetensors", header, b"\0" * 4)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_header(tmp_path / "model.safetensors")


VALID = json.dumps({"a": entry(0, 4), "b": entry(4, 12, shape=(2,)), "__metadata__": {"format": "pt"}}).encode()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(VALID) - 1), value=st.integers(0, 255))
@example(place=VALID.index(b"[1]") + 1, value=ord(" "))
def test_a_changed_byte_in_the_header_is_refused_or_harmless(place, value, tmp_path):
    header = bytearray(VALID)
    header[place] = value
    raw_file(tmp_path / "f.safetensors", bytes(header), b"\0" * 12)
    try:
        entries = read_header(tmp_path / "f.safetensors")
    except UserError:
        return
    assert sum(spec.num_bytes for spec, _ in entries.values()) == 12


def test_a_missing_shard_is_named(tmp_path):
    sharded = save_switch(tmp_path / "sharded", max_shard_size="20KB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"names the shard {lost.name}, which is missing"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded = save_switch(tmp_path / "sharded", max_shard_size="20KB")
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(UserError, match="is stored twice"):
        Checkpoint(sharded)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 5}', "{"])
def test_a_damaged_index_is_refused(index, tmp_path):
    sharded = save_switch(tmp_path / "sharded", max_shard_size="20KB")
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [(None, "has no config.json"), ("{", "not readable JSON"), ("[1]", "must hold a JSON object")],
)
def test_a_missing_or_damaged_configuration_is_refused(config, complaint, copied):
    (copied / "config.json").unlink()
    if config is not None:
        (copied / "config.json").write_text(config)
    with pytest.raises(UserError, match=complaint):
        Checkpoint(copied)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint folder at .*nowhere"):
        Checkpoint(tmp_path / "nowhere")


def test_layers_are_found_in_forward_order(switch):
    checkpoint = Checkpoint(switch)
    layers = family_of(checkpoint).layers(checkpoint)
    assert tuple(layer.name for layer in layers) == LAYERS
    assert {(layer.num_experts, layer.d_model, layer.d_ff) for layer in layers} == {(6, 16, 24)}
    assert all(layer.dtypes == {"wi": "F32", "output": "F32"} for layer in layers)


def test_blocks_beyond_ten_are_ordered_by_number(tmp_path):
    path = save_switch(
        tmp_path / "deep", num_layers=12, num_sparse_encoder_layers=6, d_model=8, d_kv=2, d_ff=4, num_experts=2
    )
    checkpoint = Checkpoint(path)
    encoder = [layer.name for layer in family_of(checkpoint).layers(checkpoint) if layer.name.startswith("encoder")]
    assert encoder == [f"encoder.block.{i}.layer.1.mlp" for i in (1, 3, 5, 7, 9, 11)]


def test_a_missing_expert_is_named(copied):
    tensors = load_tensors(copied)
    del tensors[f"{LAYERS[0]}.experts.expert_4.wo.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"has no tensor {LAYERS[0]}.experts.expert_4.wo.weight"):
        family_of(Checkpoint(copied))


def test_an_expert_of_another_shape_is_named(copied):
    tensors = load_tensors(copied)
    name = f"{LAYERS[0]}.experts.expert_4.wo.weight"
    tensors[name] = tensors[name][:, :5].contiguous()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has shape \[16, 5\], the configuration asks for \[16, 24\]"):
        family_of(Checkpoint(copied))


def test_a_pointer_of_git_lfs_says_how_to_get_the_weights(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors holds no weights: it is a git-lfs pointer"):
        Checkpoint(folder)
