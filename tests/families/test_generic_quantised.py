"""Quantised experts: pruning keeps their bytes, reading gives their values, merging quantises again.

Shapes: O outputs, I inputs.
"""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_decoder import VOCAB, byte_tokenizer
from tiny_decoders import build

from msmoe import apply, load, plan, profile
from msmoe.checkpoint.reader import Checkpoint
from msmoe.checkpoint.writer import CheckpointWriter
from msmoe.cli import app
from msmoe.errors import UserError
from msmoe.families.generic import GENERIC
from msmoe.families.quantised import fp8_values, mxfp4_values, read_values, scales_of, to_fp8, to_mxfp4
from msmoe.formats.build import build_export
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan
from msmoe.planning.planner import check_request


def rewrite(path, change, config=None):
    """Change the tensors and fields of a checkpoint folder."""
    tensors = load_file(path / "model.safetensors")
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, path / "model.safetensors", {"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | (config or {})))
    return Checkpoint(path)


def stored_quantised(path, model, quantise, config):
    """A folder of a model whose experts are quantised, with a tokenizer."""
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model, rewrite(path, quantise, config)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """DeepSeek-V3 with float8 experts in blocks of 16 x 16, and a layer for multi-token prediction behind."""

    def quantise(tensors):
        found = {}
        for name, tensor in tensors.items():
            if ".experts." in name:
                codes, scales = to_fp8(tensor, torch.float8_e4m3fn, (2, 2))
                found |= {name: codes, name + "_scale_inv": scales}
            else:
                found[name] = tensor
        copies = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in found.items() if "layers.2." in n}
        return found | copies

    model = build("deepseek_v3", vocab_size=VOCAB, moe_intermediate_size=32)
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    fields = {"num_nextn_predict_layers": 1, "quantization_config": quantisation}
    return stored_quantised(tmp_path_factory.mktemp("fp8") / "in", model, quantise, fields)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """gpt-oss whose matrices of experts are stored as MXFP4."""

    def quantise(tensors):
        found = {}
        for name, tensor in tensors.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                blocks, scales = to_mxfp4(tensor.mT)
                found |= {name + "_blocks": blocks, name + "_scales": scales}
            else:
                found[name] = tensor
        return found

    model = build("gpt_oss", hidden_size=64, intermediate_size=32, vocab_size=VOCAB)
    fields = {"quantization_config": {"quant_method": "mxfp4"}}
    return stored_quantised(tmp_path_factory.mktemp("mxfp4") / "in", model, quantise, fields)


@pytest.fixture(scope="module")
def statistics():
    """Statistics of a checkpoint, made once."""
    known = {}
    texts = [f"{word} {i} and {word[::-1]}" for i in range(12) for word in ("experts", "tokens", "gates")]
    return lambda checkpoint: known.setdefault(checkpoint.path, profile(checkpoint.path, texts))


def compressed(checkpoint, stats, out, **choices):
    """Plan and output of a method that keeps four experts."""
    made = plan(checkpoint.path, stats, experts=4, **choices)
    apply(checkpoint.path, made, out, stats=stats)
    return made, Checkpoint(out)


def kept(made):
    """Layer -> the experts that stay, in the order in which they are stored."""
    return {name: [layer.groups[g].dominant for g in layer.stored_order] for name, layer in made.layers.items()}


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("name", ["deepseek", "gpt_oss"])
def test_a_quantised_model_runs_with_the_values_that_its_experts_are_read_with(name, request):
    _, checkpoint = request.getfixturevalue(name)
    model = load(checkpoint.path)
    for layer in GENERIC.layers(checkpoint):
        for e in range(layer.num_experts):
            expert = GENERIC.load_expert(checkpoint, layer.name, e)
            for part in GENERIC.memory_parts(checkpoint, layer.name, e):
                assert torch.equal(part.place_in(model.get_parameter(part.key)), part.join(expert.weights))


def test_pruned_float8_experts_keep_bytes_and_scales_and_predicted_layers_go(deepseek, statistics, tmp_path):
    _, checkpoint = deepseek
    made, pruned = compressed(checkpoint, statistics(checkpoint), tmp_path / "out", method="frequency")
    before, after = load_file(checkpoint.path / "model.safetensors"), load_file(pruned.path / "model.safetensors")
    compared = 0
    for name, experts in kept(made).items():
        assert len({e // 4 for e in experts}) == 2  # two of each group of the router
        for position, e in enumerate(experts):
            for suffix in ("weight", "weight_scale_inv"):
                for role in ("gate", "up", "down"):
                    stored = f"{name}.experts.{{}}.{role}_proj.{suffix}"
                    assert same_bytes(after[stored.format(position)], before[stored.format(e)])
                    compared += 1
        assert torch.equal(after[f"{name}.gate.weight"], before[f"{name}.gate.weight"][experts])
    assert compared == 2 * 4 * 6
    predicted = {tensor for tensor in before if ".layers.3." in tensor}
    assert len(after) == len(before) - len(predicted) - compared
    assert (pruned.config["num_nextn_predict_layers"], pruned.config["n_routed_experts"]) == (0, 4)
    said = json.loads((pruned.path / "msmoe.json").read_text())["dropped"]
    assert said == {"a layer for multi-token prediction": len(predicted)}


def test_the_command_says_what_it_leaves_out(deepseek, statistics, tmp_path):
    _, checkpoint = deepseek
    stats = statistics(checkpoint)
    stats.save(tmp_path / "stats")
    plan(checkpoint.path, stats, experts=4, method="frequency").save(tmp_path / "plan.json")
    given = [str(checkpoint.path), "--plan", str(tmp_path / "plan.json"), "--stats", str(tmp_path / "stats")]
    printed = CliRunner().invoke(app, ["apply", *given, "--out", str(tmp_path / "out")])
    assert printed.exit_code == 0, printed.output
    predicted = sum(".layers.3." in name for name in checkpoint)
    assert f"left out {predicted} tensors: a layer for multi-token prediction" in printed.stdout
    as_json = CliRunner().invoke(app, ["apply", *given, "--out", str(tmp_path / "again"), "--json"])
    assert json.loads(as_json.stdout)["dropped"] == {"a layer for multi-token prediction": predicted}


def test_pruned_mxfp4_experts_keep_their_blocks_and_scales(gpt_oss, statistics, tmp_path):
    _, checkpoint = gpt_oss
    made, pruned = compressed(checkpoint, statistics(checkpoint), tmp_path / "out", method="frequency")
    before, after = load_file(checkpoint.path / "model.safetensors"), load_file(pruned.path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        experts = next((e for layer, e in kept(made).items() if name.startswith(layer + ".")), None)
        assert same_bytes(after[name], tensor if experts is None else tensor[experts])
    assert "dropped" not in json.loads((pruned.path / "msmoe.json").read_text())


def step(part, stored, values):
    """Largest error of each value when it is quantised, by the scales that were stored."""
    scales = scales_of(stored, part).float()
    if part.encoding == "mxfp4":  # between 4 and 6 the nearest is at most 1 away; up to 8 becomes 6
        scales = torch.exp2(scales - 127).repeat_interleave(32, -1)
        return torch.where(values.abs() > 6 * scales, 2 * scales, scales)
    spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.maximum(values.abs() / 16, spread * 2**-10) * (1 + 1e-5)  # 3 bits behind the point; 2**-9 the least


@pytest.mark.parametrize("name", ["deepseek", "gpt_oss"])
def test_merged_experts_are_quantised_again_to_within_the_step(name, request, statistics, tmp_path):
    _, checkpoint = request.getfixturevalue(name)
    made, merged = compressed(
        checkpoint, statistics(checkpoint), tmp_path / "out", method="m-smoe", export="native", align="none"
    )
    compared = 0
    for layer, planned in made.layers.items():
        for position, g in enumerate(planned.stored_order):
            group = planned.groups[g]
            members = [GENERIC.load_expert(checkpoint, layer, e).weights for e in group.members]
            mean = {
                role: sum(w * member[role] for w, member in zip(group.weights, members, strict=True))
                for role in members[0]
            }
            for part in GENERIC.parts(merged, layer, position):
                wanted, found = part.join(mean), read_values(merged, part)
                if part.encoding == "plain":
                    torch.testing.assert_close(found, wanted)
                elif len(group.members) == 1:
                    assert torch.equal(found, wanted)
                else:
                    assert bool(((found - wanted).abs() <= step(part, merged, wanted)).all())
                    compared += 1
    assert compared


def test_a_killed_merge_of_quantised_experts_goes_on_with_codes_and_scales_of_the_same_bytes(
    deepseek, statistics, tmp_path, monkeypatch
):
    _, checkpoint = deepseek
    stats = statistics(checkpoint)
    made = plan(checkpoint.path, stats, experts=4, method="m-smoe")
    apply(checkpoint.path, made, tmp_path / "whole", stats=stats)
    merged = build_export("native", GENERIC, checkpoint, made).merged
    codes = {part.key for parts in merged.values() for part in parts}
    finish = CheckpointWriter.finish

    def interrupted(self, *names, **how):
        finish(self, *names, **how)
        if codes & set(names):  # its scales are not written yet
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(checkpoint.path, made, tmp_path / "out", stats=stats)
    monkeypatch.undo()
    apply(checkpoint.path, made, tmp_path / "out", stats=stats, resume=True)
    whole, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out"))
    assert whole.keys() == again.keys()
    assert all(same_bytes(whole[name], again[name]) for name in whole)


@pytest.fixture
def other_quantisation(deepseek, tmp_path):
    """The same with scales of another name."""
    path = shutil.copytree(deepseek[1].path, tmp_path / "other")
    return rewrite(path, lambda tensors: {n.replace("_scale_inv", "_scale"): t for n, t in tensors.items()})


def test_float8_of_another_quantisation_can_be_pruned_but_not_read(other_quantisation):
    layer = GENERIC.layers(other_quantisation)[0]
    with pytest.raises(UserError, match=r"gate_proj.weight is F8_E4M3 .* pruned, but not read or merged"):
        GENERIC.load_expert(other_quantisation, layer.name, 0)
    assert "can be pruned, but not read or merged" in layer.merges
    check = {"export": None, "router": "fit", "keep_layers": None, "experts": 4}
    check_request(GENERIC, other_quantisation, method="frequency", **check)
    with pytest.raises(UserError, match=r"m-smoe merges experts, but .*layers.1.mlp: .* not read or merged"):
        check_request(GENERIC, other_quantisation, method="m-smoe", **check)


def test_experts_of_another_quantisation_are_pruned_byte_for_byte(other_quantisation, tmp_path):
    groups = tuple(Group(e, (e,), (1.0,)) for e in (1, 3, 4, 7))
    layers = {n.name: LayerPlan(8, groups, (0, 2, 5, 6)) for n in GENERIC.layers(other_quantisation)}
    source = {"model_type": "deepseek_v3", "fingerprint": other_quantisation.fingerprint}
    apply(
        other_quantisation.path, Plan("frequency", Parameters(others="remove"), 0, source, {}, layers), tmp_path / "out"
    )
    before, after = (load_file(p / "model.safetensors") for p in (other_quantisation.path, tmp_path / "out"))
    for layer in layers:
        for position, e in enumerate((1, 3, 4, 7)):
            for suffix in ("weight", "weight_scale"):
                stored = f"{layer}.experts.{{}}.up_proj.{suffix}"
                assert same_bytes(after[stored.format(position)], before[stored.format(e)])


def test_scales_that_are_exponents_beside_float8_are_not_taken_for_factors(deepseek, tmp_path):
    path = shutil.copytree(deepseek[1].path, tmp_path / "exponents")
    exponents = lambda n, t: torch.full(t.shape, 127, dtype=torch.uint8) if n.endswith("_scale_inv") else t
    changed = rewrite(path, lambda tensors: {n: exponents(n, t) for n, t in tensors.items()})
    with pytest.raises(UserError, match="of this quantisation experts can be pruned, but not read or merged"):
        GENERIC.load_expert(changed, GENERIC.layers(changed)[0].name, 0)


def test_weights_quantised_in_a_way_that_cannot_be_undone_are_not_profiled(deepseek, tmp_path):
    path = shutil.copytree(deepseek[1].path, tmp_path / "gptq")
    rewrite(path, lambda tensors: tensors, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UserError, match="weights quantised by 'gptq' cannot be run here; fp8, mxfp4 can"):
        profile(path, ["a text"])


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
