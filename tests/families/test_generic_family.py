"""The generic adapter beside its proofs: shards, counts, configurations, errors, hooks, the table."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_decoders import DECODERS, NOT_RUN, REFUSED, build, outputs, tokens
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from msmoe.checkpoint.reader import Checkpoint
from msmoe.compression.apply import apply
from msmoe.errors import UserError
from msmoe.families.axes import with_count
from msmoe.families.blocks import fields_of
from msmoe.families.generic import GENERIC
from msmoe.families.table import rows
from msmoe.formats.build import build_export
from msmoe.layer.expert import Expert
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan


def saved(model_type, path, **more):
    model = build(model_type, **more)
    model.save_pretrained(path)
    return model, Checkpoint(path)


def edit_config(path, change):
    content = json.loads((path / "config.json").read_text())
    change(content)
    (path / "config.json").write_text(json.dumps(content))
    return Checkpoint(path)


def test_experts_are_read_across_shards(tmp_path):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    layer = GENERIC.layers(checkpoint)[2]
    expert = GENERIC.load_expert(checkpoint, layer.name, 7)
    assert torch.equal(expert.output, model.get_submodule(layer.name).experts.down_proj[7])


def halves(checkpoint, *, experts=8, **choices):
    """A plan that merges each expert of the first half of a layer with one of the second."""
    groups = tuple(Group(e, (e, e + experts // 2), (0.5, 0.5)) for e in range(experts // 2))
    layers = {layer.name: LayerPlan(experts, groups) for layer in GENERIC.layers(checkpoint)}
    source = {"model_type": checkpoint.model_type, "fingerprint": checkpoint.fingerprint}
    return Plan("m-smoe", Parameters(others="merge", align="none", **choices), 0, source, {}, layers)


def test_a_merged_expert_goes_where_the_family_reads_it(tmp_path):
    _, checkpoint = saved("gpt_oss", tmp_path / "in")
    apply(checkpoint.path, halves(checkpoint), tmp_path / "out", router="dominant")
    after = Checkpoint(tmp_path / "out")
    for layer in GENERIC.layers(checkpoint):
        for e in range(4):
            first, second = (GENERIC.load_expert(checkpoint, layer.name, i).weights for i in (e, e + 4))
            merged = GENERIC.load_expert(after, layer.name, e).weights
            assert set(merged) == {"gate", "up", "gate_bias", "up_bias", "output", "output_bias"}
            for role, weight in merged.items():
                torch.testing.assert_close(weight, (first[role] + second[role]) / 2)


def test_only_the_bytes_of_one_expert_are_read(tmp_path, monkeypatch):
    _, checkpoint = saved("gpt_oss", tmp_path)
    layer = GENERIC.layers(checkpoint)[0]
    sizes = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, **how: sizes.append((out := read(self, name, **how)).numel()) or out
    )
    expert = GENERIC.load_expert(checkpoint, layer.name, 5)
    assert isinstance(expert, Expert)
    assert sum(sizes) == sum(tensor.numel() for tensor in expert.tensors)


def test_both_names_of_the_count_are_changed_and_a_default_is_written_out(tmp_path):
    saved("qwen3_moe", tmp_path)
    checkpoint = edit_config(tmp_path, lambda c: c.update(num_experts=8, num_local_experts=8))
    reduced = GENERIC.native_config(checkpoint, 4)
    assert (reduced["num_experts"], reduced["num_local_experts"]) == (4, 4)
    silent = edit_config(tmp_path, lambda c: [c.pop(name) for name in ("num_experts", "num_local_experts")])
    assert with_count({"a": 1}, fields_of(silent.config, "config.json"), 4) == {"a": 1, "num_local_experts": 4}


def test_counts_that_a_grouped_router_cannot_hold_are_refused_with_those_that_it_can(tmp_path):
    _, checkpoint = saved("deepseek_v3", tmp_path)
    assert GENERIC.counts(checkpoint) == (4, 6, 8)
    assert GENERIC.counts(checkpoint, round_to=4) == (4, 8)
    with pytest.raises(UserError, match=r"cannot hold 5 experts .* choose one of 4, 6, 8 \(each token goes to 2, the"):
        GENERIC.check_count(checkpoint, 5)
    kept = {layer.name: [0, 1, 2, 7] for layer in GENERIC.layers(checkpoint)}
    with pytest.raises(
        UserError, match=r"keeps \[3, 1\] experts of its 2 groups: .* the same number in each, at least 2"
    ):
        GENERIC.check_export(checkpoint, "native", kept)
    with pytest.raises(UserError, match="cannot hold 1 experts in each layer: choose one of 2, 3"):
        GENERIC.check_count(saved("mixtral", tmp_path / "mixtral")[1], 1)


def test_layers_with_different_counts_are_refused(tmp_path):
    _, checkpoint = saved("mixtral", tmp_path)
    plan = halves(checkpoint)
    layers = dict(list(plan.layers.items())[:1])
    with pytest.raises(UserError, match=r"same number of experts in every MoE layer.*layers.0.mlp 4, .* 8"):
        build_export("native", GENERIC, checkpoint, replace(plan, layers=layers))


def test_experts_of_an_attention_cannot_be_merged(tmp_path):
    _, checkpoint = saved("jetmoe", tmp_path / "in")
    with pytest.raises(UserError, match=r"merges experts, but .*: experts of an attention can be pruned only"):
        apply(checkpoint.path, halves(checkpoint), tmp_path / "out", router="dominant")
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_causal_language_model_has_no_exact_export(tmp_path):
    _, checkpoint = saved("muse_spark_text", tmp_path)
    with pytest.raises(UserError, match="muse_spark_text has no exact export: it has no causal language model of its"):
        build_export("exact", GENERIC, checkpoint, halves(checkpoint))


def test_dense_unknown_and_refused_models_give_one_clear_line(tmp_path):
    saved("mixtral", tmp_path)
    for model_type, message in (
        ("llama", "LlamaForCausalLM has no experts"),
        ("nosuch", "model_type 'nosuch' is unknown to transformers"),
        ("nllb-moe", "nllb-moe is not supported: .* experts 0 and 1 get all tokens"),
        ("doge", "doge is not supported: it has no router over tokens"),
    ):
        changed = edit_config(tmp_path, lambda c, m=model_type: c.update(model_type=m, architectures=None))
        with pytest.raises(UserError, match=message):
            GENERIC.layers(changed)


def test_missing_experts_and_unread_quantisations_are_named(tmp_path):
    saved("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if ".experts.3.w1" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds 7 experts .* says 8: number 3 is missing"):
        GENERIC.layers(Checkpoint(tmp_path))
    packed = {n.replace(".weight", ".weight_packed") if ".experts." in n else n: t for n, t in tensors.items()}
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks .*; it holds .*weight_packed, of a quantisation that is not read"):
        GENERIC.layers(Checkpoint(tmp_path))


def test_hooks_are_gone_after_listening_even_when_the_listener_fails(tmp_path):
    model = build("qwen3_moe")

    def hear(name, routed):
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp"), GENERIC.listen(model, hear):
        outputs(model, tokens(model))
    assert not any(m._forward_pre_hooks or m._forward_hooks for n, m in model.named_modules() if ".mlp" in n)


def test_a_router_refuses_fewer_rows_than_each_token_goes_to(tmp_path):
    _, checkpoint = saved("mixtral", tmp_path)
    router = GENERIC.router(checkpoint, GENERIC.layers(checkpoint)[0].name)
    with pytest.raises(UserError, match="sends each token to 2 experts: keep at least as many router rows, got 1"):
        router.keeping([3])
    assert router.keeping([7, 5, 3]).keeping([2, 0]).num_experts == 2


def test_activations_say_whether_they_grow_with_up(tmp_path):
    scales = {}
    for model_type in ("mixtral", "gpt_oss", "nemotron_h"):
        _, checkpoint = saved(model_type, tmp_path / model_type)
        layer = GENERIC.layers(checkpoint)[0].name
        scales[model_type] = GENERIC.load_expert(checkpoint, layer, 0).activation.scales
    assert scales == {"mixtral": "up", "gpt_oss": "", "nemotron_h": ""}  # clamped and shifted; squared


def test_the_table_says_what_works_and_why_not():
    from msmoe.cli import app

    result = CliRunner().invoke(
        app, ["families", "mixtral", "nllb-moe", "llama4_text", "switch_transformers", "--json"]
    )
    assert result.exit_code == 0
    rows = {row["model_type"]: row for row in json.loads(result.stdout)}
    everything = ["inspect", "native", "exact", "factors", "constants", "merge", "refit", "router"]
    assert rows["mixtral"]["works"] == rows["switch_transformers"]["works"] == everything
    assert rows["mixtral"]["stored"] == rows["switch_transformers"]["stored"] == "per expert"
    assert rows["nllb-moe"]["works"] == []
    assert "experts 0 and 1" in rows["nllb-moe"]["limits"]
    assert rows["llama4_text"]["works"] == ["inspect", "native", "exact", "factors", "merge", "refit"]
    assert "constant outputs are not supported for Llama4TextExperts" in rows["llama4_text"]["limits"]


def test_the_table_has_a_row_for_every_type_and_each_says_something():
    found = {row.model_type: row for row in rows()}
    assert {*DECODERS, *REFUSED, *NOT_RUN, "switch_transformers"} <= found.keys()
    assert {name for name, row in found.items() if not row.works} == {*REFUSED, *NOT_RUN}
    for name in DECODERS:
        assert {"inspect", "native", "merge"} <= set(found[name].works)
        assert ("exact" in found[name].works) == (name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert [name for name in DECODERS if found[name].limits.startswith("factors:")] == [
        "dbrx",
        "jetmoe",
        "longcat_flash",
    ]
    groups = {name for name, row in found.items() if " groups" in row.router}
    assert {"deepseek_v3", "axk1", "bailing_hybrid"} <= groups
