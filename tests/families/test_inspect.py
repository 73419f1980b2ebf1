"""Counts from headers against those of the model that transformers loads."""

import json
import shutil
import struct
from collections import Counter

import pytest
import torch
from tiny import LAYERS, load_tensors, save_switch
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.errors import UserError
from msmoe.families.inspection import inspect
from msmoe.formats.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration

PARTS = {  # class of the outermost module that decides -> part
    "SwitchTransformersAttention": "attention",
    "SwitchTransformersTop1Router": "routers",
    "SwitchTransformersExperts": "experts",
    "GroupedExperts": "experts",
    "SwitchTransformersDenseActDense": "dense feed-forward",
    "SwitchTransformersLayerNorm": "norms",
    "Embedding": "embeddings",
    "Linear": "embeddings",  # the language modelling head: no other linear layer stands outside those above
}


def counts_by_module(model) -> Counter:
    """Parameters per part, told apart by the classes of the modules that hold them."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        path = name.split(".")[:-1]
        kinds = [type(model.get_submodule(".".join(path[:i]))).__name__ for i in range(1, len(path) + 1)]
        counts[next(PARTS[kind] for kind in kinds if kind in PARTS)] += parameter.numel()
    return counts


@pytest.mark.parametrize("which", ["switch", "native", "exact"])
def test_parameters_by_part_are_those_of_the_loaded_model(which, request):
    path = request.getfixturevalue(which)
    kind = MsmoeSwitchForConditionalGeneration if which == "exact" else SwitchTransformersForConditionalGeneration
    parts = {name: count for name, (count, _) in inspect(path).parts.items() if name != "expert maps"}
    assert parts == counts_by_module(kind.from_pretrained(path))


@pytest.mark.parametrize("options", [{"tie_word_embeddings": False}, {"num_layers": 2, "num_sparse_encoder_layers": 2}])
def test_other_layouts_are_counted_like_the_loaded_model(options, tmp_path):
    path = save_switch(tmp_path / "ckpt", **options)
    parts = {name: count for name, (count, _) in inspect(path).parts.items()}
    assert parts == counts_by_module(SwitchTransformersForConditionalGeneration.from_pretrained(path))


def test_the_map_of_an_exact_checkpoint_counts_as_bytes_not_as_parameters(exact):
    count, size = inspect(exact).parts["expert maps"]
    assert (count, size) == (0, len(LAYERS) * 6 * 8)  # four maps of six int64


@pytest.mark.parametrize("which", ["switch", "native", "exact"])
def test_bytes_are_those_of_the_stored_tensors(which, request):
    path = request.getfixturevalue(which)
    summary = inspect(path)
    size = sum(t.numel() * t.element_size() for t in load_tensors(path).values())
    assert summary.num_bytes == size == sum(size for _, size in summary.parts.values())


@pytest.mark.parametrize("which", ["switch", "native", "exact"])
def test_every_layer_is_listed_with_its_experts_and_their_weights(which, request):
    path = request.getfixturevalue(which)
    tensors = load_tensors(path)
    summary = inspect(path)
    assert tuple(layer.name for layer in summary.layers) == LAYERS
    for layer in summary.layers:
        stored = [t for name, t in tensors.items() if name.startswith(f"{layer.name}.experts.")]
        assert layer.num_experts == len(tensors[f"{layer.name}.router.classifier.weight"])
        assert (layer.d_model, layer.d_ff) == (16, 24)
        assert layer.num_parameters == sum(t.numel() for t in stored) == layer.num_stored * 2 * 16 * 24
        assert layer.num_bytes == 4 * layer.num_parameters


def test_an_exact_checkpoint_shows_router_rows_and_stored_experts(exact):
    plan = json.loads((exact / "plan.json").read_text())["layers"]
    for layer in inspect(exact).layers:
        groups = len(plan[layer.name]["groups"]) if layer.name in plan else 6
        assert (layer.num_experts, layer.num_stored) == (6, groups)


def test_a_half_precision_checkpoint_has_half_the_bytes(switch, tmp_path):
    half = inspect(save_switch(tmp_path / "half", dtype=torch.bfloat16))
    assert half.dtypes == ("BF16",)
    assert 2 * half.num_bytes == inspect(switch).num_bytes


def test_sharding_changes_nothing_but_the_path(switch, tmp_path):
    sharded = inspect(save_switch(tmp_path / "sharded", max_shard_size="20KB")).to_dict()
    assert sharded | {"path": ""} == inspect(switch).to_dict() | {"path": ""}


def test_weights_are_not_read(switch, tmp_path):
    """A copy with the same header, zeros for weights, and an embedding beyond any memory gives the same layers."""
    content = (switch / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    header["shared.weight"]["shape"][0] = rows = 2 * 10**9
    end = 0
    for entry in header.values():
        size = 4 * torch.Size(entry["shape"]).numel()
        entry["data_offsets"] = [end, end + size]
        end += size
    text = json.dumps(header).encode()
    shutil.copytree(switch, tmp_path / "huge")
    config = json.loads((switch / "config.json").read_text())
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    with (tmp_path / "huge" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole: 128 GB that take no room on the disk
    summary = inspect(tmp_path / "huge")
    assert summary.layers == inspect(switch).layers
    assert summary.parts["embeddings"] == (rows * 16, rows * 16 * 4)


def test_the_summary_is_json(exact):
    summary = inspect(exact)
    content = json.loads(json.dumps(summary.to_dict()))
    assert content["num_parameters"] == summary.num_parameters
    assert [layer["num_stored"] for layer in content["layers"]] == [layer.num_stored for layer in summary.layers]


def test_the_data_frame_has_a_row_per_layer(exact):
    summary = inspect(exact)
    frame = summary.to_frame()
    assert frame.to_dict("records") == list(summary.to_dict()["layers"])
    assert frame.name.tolist() == list(LAYERS)


def test_an_unknown_architecture_is_refused_by_name(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(UserError, match="architecture 'mixtral'; supported: switch_transformers"):
        inspect(copied)
