"""The generic adapter beside its proofs: shards, counts, configurations, errors, hooks, the table."""

import json

import pytest
import torch
from click.testing import CliRunner
from msmoe.formats.native import Left, native_layout, whole
from safetensors.torch import load_file, save_file
from test_generic_proofs import write
from tiny_decoders import build, outputs, tokens

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.families.generic import GENERIC
from msmoe.layer.expert import Expert


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


def test_a_merged_expert_goes_where_the_family_reads_it(tmp_path):
    _, checkpoint = saved("gpt_oss", tmp_path / "in")
    layers = GENERIC.layers(checkpoint)
    mean = {}

    def merge(layer, position):
        a, b = (GENERIC.load_expert(checkpoint, layer, e) for e in (position, position + 4))
        return mean.setdefault(
            (layer, position), a.like([(x + y) / 2 for x, y in zip(a.tensors, b.tensors, strict=True)])
        )

    left = {layer.name: [Left(e, None) for e in range(4)] for layer in layers}
    layout = native_layout(GENERIC, checkpoint, left)
    after = Checkpoint(write(layout, checkpoint, tmp_path / "out", merge))
    assert len(mean) == 4 * len(layers)
    for (layer, position), expert in mean.items():
        again = GENERIC.load_expert(after, layer, position)
        assert all(torch.equal(a, b) for a, b in zip(again.tensors, expert.tensors, strict=True))


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
    _, checkpoint = saved("qwen3_moe", tmp_path)
    both = checkpoint.config | {"num_experts": 8, "num_local_experts": 8}
    reduced = GENERIC.reduced_config(both, 4)
    assert (reduced["num_experts"], reduced["num_local_experts"]) == (4, 4)
    silent = {k: v for k, v in checkpoint.config.items() if k not in ("num_experts", "num_local_experts")}
    assert GENERIC.reduced_config(silent, 4) == silent | {"num_local_experts": 4}


def test_counts_that_a_grouped_router_cannot_hold_are_refused_with_those_that_it_can(tmp_path):
    _, checkpoint = saved("deepseek_v3", tmp_path)
    assert GENERIC.counts(checkpoint.config) == (4, 6, 8)
    assert GENERIC.counts(checkpoint.config, round_to=4) == (4, 8)
    with pytest.raises(UserError, match=r"cannot hold 5 experts .* choose one of 4, 6, 8 \(each token goes to 2, the"):
        GENERIC.check_count(checkpoint.config, 5)
    layer = GENERIC.layers(checkpoint)[0].name
    with pytest.raises(UserError, match=r"keeps \[3, 1\] experts of its 2 groups: .* the same number of each, 2"):
        GENERIC.check_count(checkpoint.config, 4, kept={layer: [0, 1, 2, 7]})
    with pytest.raises(UserError, match="cannot hold 1 experts in each layer: choose one of 2, 3"):
        GENERIC.check_count(saved("mixtral", tmp_path / "mixtral")[1].config, 1)


def test_layers_with_different_counts_are_refused(tmp_path):
    _, checkpoint = saved("mixtral", tmp_path)
    first, *_ = GENERIC.layers(checkpoint)
    with pytest.raises(UserError, match=r"keeps 8 experts, others 4: all must keep the same"):
        native_layout(GENERIC, checkpoint, {first.name: whole(4)})


def test_experts_of_an_attention_cannot_be_merged(tmp_path):
    _, checkpoint = saved("jetmoe", tmp_path)
    left = {layer.name: [Left(e, None) for e in range(4)] for layer in GENERIC.layers(checkpoint)}
    with pytest.raises(UserError, match="experts of an attention can be pruned only"):
        native_layout(GENERIC, checkpoint, left)


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

    result = CliRunner().invoke(app, ["families", "mixtral", "nllb-moe", "llama4_text", "--json"])
    assert result.exit_code == 0
    rows = {row["model_type"]: row for row in json.loads(result.stdout)}
    assert rows["mixtral"]["works"] == ["inspect", "native", "exact", "merge", "refit", "router"]
    assert rows["mixtral"]["stored"] == "per expert"
    assert rows["nllb-moe"]["works"] == []
    assert "experts 0 and 1" in rows["nllb-moe"]["limits"]
    assert "exact" not in rows["llama4_text"]["works"]
