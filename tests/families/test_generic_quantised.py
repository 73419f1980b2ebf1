"""Quantised experts: pruning keeps their bytes, reading gives their values, merging quantises again.

Shapes: O outputs, I inputs.
"""

import json

import pytest
import torch
from msmoe.formats.native import Left, native_layout
from safetensors.torch import load_file, save_file
from test_generic_proofs import write
from tiny_decoders import build

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.families.generic import GENERIC
from msmoe.families.quantised import fp8_values, mxfp4_values, to_fp8, to_mxfp4


def rewrite(path, change, config=None):
    """Change the tensors and fields of a checkpoint folder."""
    tensors = load_file(path / "model.safetensors")
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, path / "model.safetensors", {"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | (config or {})))
    return Checkpoint(path)


@pytest.fixture
def deepseek(tmp_path):
    """DeepSeek-V3 with float8 experts in blocks of 16 x 16, and a layer for multi-token prediction behind."""
    model = build("deepseek_v3", n_group=2, topk_group=1)
    model.save_pretrained(tmp_path / "fp8")

    def quantise(tensors):
        found = {}
        for name, tensor in tensors.items():
            if ".experts." in name:
                shape = tuple(-(-n // 16) for n in tensor.shape)
                codes, scales = to_fp8(tensor, torch.float8_e4m3fn, shape)
                found |= {name: codes, name + "_scale_inv": scales}
            else:
                found[name] = tensor
        copies = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in found.items() if "layers.2." in n}
        return found | copies

    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    fields = {"num_nextn_predict_layers": 1, "quantization_config": quantisation}
    return model, rewrite(tmp_path / "fp8", quantise, fields)


def test_pruned_float8_experts_keep_bytes_and_scales_and_predicted_layers_go(deepseek, tmp_path):
    _, checkpoint = deepseek
    kept = [1, 2, 4, 7]
    left = {layer.name: [Left(e, e) for e in kept] for layer in GENERIC.layers(checkpoint)}
    layout = native_layout(GENERIC, checkpoint, left)
    path = write(layout, checkpoint, tmp_path / "out")
    before, after = load_file(checkpoint.path / "model.safetensors"), load_file(path / "model.safetensors")
    assert layout.dropped
    assert all(".layers.3." in name for name in layout.dropped)
    assert layout.config["num_nextn_predict_layers"] == 0
    assert layout.config["n_routed_experts"] == 4
    compared = 0
    for position, e in enumerate(kept):
        for role in ("gate", "up", "down"):
            for suffix in ("weight", "weight_scale_inv"):
                name = "model.layers.{}.mlp.experts.{}." + f"{role}_proj.{suffix}"
                for i in (1, 2):
                    stored, original = after[name.format(i, position)], before[name.format(i, e)]
                    assert torch.equal(stored.view(torch.uint8), original.view(torch.uint8))
                    compared += 1
    assert compared == 48
    assert len(after) == len(before) - len(layout.dropped) - 48


def test_float8_experts_are_read_as_code_times_scale_and_merged_ones_are_quantised_again(deepseek, tmp_path):
    model, checkpoint = deepseek
    layers = GENERIC.layers(checkpoint)
    expert = GENERIC.load_expert(checkpoint, layers[0].name, 3)
    gate = model.get_submodule(layers[0].name).experts.gate_up_proj[3, : layers[0].d_ff]
    assert (expert.inputs["gate"] - gate).norm() < 0.04 * gate.norm()  # 3 bits behind the point: at most 1/16 each
    left = {layer.name: [Left(0, None), *(Left(e, e) for e in (1, 4, 5))] for layer in layers}
    layout = native_layout(GENERIC, checkpoint, left)
    assert len(layout.merged) == 2
    path = write(layout, checkpoint, tmp_path / "out", lambda layer, _: GENERIC.load_expert(checkpoint, layer, 3))
    again = GENERIC.load_expert(Checkpoint(path), layers[0].name, 0)
    torch.testing.assert_close(again.inputs["gate"], expert.inputs["gate"])


def test_float8_of_another_quantisation_can_be_pruned_but_not_read(deepseek, tmp_path):
    _, checkpoint = deepseek
    rename = lambda tensors: {name.replace("_scale_inv", "_scale"): tensor for name, tensor in tensors.items()}
    other = rewrite(checkpoint.path, rename)
    layer = GENERIC.layers(other)[0].name
    assert native_layout(GENERIC, other, {n.name: [Left(e, e) for e in (0, 1, 4, 5)] for n in GENERIC.layers(other)})
    with pytest.raises(UserError, match=r"gate_proj.weight is F8_E4M3 .* pruned, but not read or merged"):
        GENERIC.load_expert(other, layer, 0)


@pytest.fixture
def gpt_oss(tmp_path):
    """gpt-oss whose matrices of experts are stored as MXFP4."""
    model = build("gpt_oss", hidden_size=64, intermediate_size=32)
    model.save_pretrained(tmp_path / "mxfp4")

    def quantise(tensors):
        found = {}
        for name, tensor in tensors.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                blocks, scales = to_mxfp4(tensor.mT)
                found |= {name + "_blocks": blocks, name + "_scales": scales}
            else:
                found[name] = tensor
        return found

    return model, rewrite(tmp_path / "mxfp4", quantise, {"quantization_config": {"quant_method": "mxfp4"}})


def test_pruned_mxfp4_experts_keep_their_blocks_and_scales(gpt_oss, tmp_path):
    _, checkpoint = gpt_oss
    kept = [0, 2, 3, 5, 6]
    layout = native_layout(
        GENERIC, checkpoint, {n.name: [Left(e, e) for e in kept] for n in GENERIC.layers(checkpoint)}
    )
    path = write(layout, checkpoint, tmp_path / "out")
    before, after = load_file(checkpoint.path / "model.safetensors"), load_file(path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        per_expert = ".experts." in name or ".router." in name
        assert torch.equal(after[name], tensor[kept] if per_expert else tensor)


def test_mxfp4_experts_are_read_with_gate_and_up_apart(gpt_oss):
    model, checkpoint = gpt_oss
    layer = GENERIC.layers(checkpoint)[1]
    expert = GENERIC.load_expert(checkpoint, layer.name, 4)
    experts = model.get_submodule(layer.name).experts
    wanted = mxfp4_values(*to_mxfp4(experts.gate_up_proj[4].T))
    assert torch.equal(expert.inputs["gate"], wanted[::2])
    assert torch.equal(expert.inputs["up_bias"], experts.gate_up_proj_bias[4, 1::2])
    assert torch.equal(expert.output, mxfp4_values(*to_mxfp4(experts.down_proj[4].T)))


def test_mxfp4_codes_are_the_nearest_values_with_the_lower_half_of_a_byte_first():
    # largest 6 -> exponent 0 (127); 5 is midway between 4 and 6: the smaller; -0.7 -> -0.5 (code 9); 1.3 -> 1.5 (3)
    row = torch.zeros(32)
    row[:4] = torch.tensor([6.0, 5.0, -0.7, 1.3])
    blocks, scales = to_mxfp4(row[None])
    assert scales.tolist() == [[127]]
    assert blocks[0, 0, :2].tolist() == [7 + 16 * 6, 9 + 16 * 3]
    assert mxfp4_values(blocks, scales)[0, :4].tolist() == [6.0, 4.0, -0.5, 1.5]


def test_quantising_what_was_quantised_changes_no_code():
    values = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    blocks, scales = to_mxfp4(values)
    again = to_mxfp4(mxfp4_values(blocks, scales))
    assert torch.equal(mxfp4_values(*again), mxfp4_values(blocks, scales))
    codes, found = to_fp8(values, torch.float8_e4m3fn, (3, 4))
    assert torch.equal(to_fp8(fp8_values(codes, found), torch.float8_e4m3fn, (3, 4))[0].float(), codes.float())
