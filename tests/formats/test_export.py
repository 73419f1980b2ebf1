"""Exports: predicted sizes, and that plain transformers in a fresh process computes what the merged weights say."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import (
    LAYERS,
    batch_of,
    build_switch,
    compress,
    layer_plan,
    load_tensors,
    logits_of,
    plan_for,
    profile_small,
    random_records,
    save_switch,
    with_merged_experts,
)
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.formats.build import EXPORTS, build_export
from msmoe.planning.plan import LayerPlan
from msmoe.planning.planner import plan as make_plan

BATCH = random_records(5, seed=9, longest=20)

VARIANTS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "sharded": {"max_shard_size": "20KB"},
    "untied": {"tie_word_embeddings": False},
    "every block sparse": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4},
    "uneven stacks": {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 4},
    "small capacity": {"expert_capacity": 2},
    "router bias": {"router_bias": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, data, tmp_path_factory):
    """A checkpoint of every kind, with its statistics."""
    path = save_switch(tmp_path_factory.mktemp("variant") / "ckpt", **VARIANTS[request.param])
    return path, profile_small(path, data), request.param


def size_of(folder) -> int:
    return sum(t.numel() * t.element_size() for t in load_tensors(folder).values())


@pytest.mark.parametrize("export", EXPORTS)
def test_predicted_bytes_and_parameters_are_exactly_those_written(export, variant, tmp_path):
    checkpoint, stats, kind = variant
    if (export, kind) == ("native", "router bias"):
        return  # refused, which has a test of its own
    experts = 1 if export == "dense" else 3
    plan = compress(
        checkpoint, stats, tmp_path / "out", experts=experts, export=export, apply_options={"router": "dominant"}
    )
    tensors = load_tensors(tmp_path / "out")
    maps = sum(t.numel() for name, t in tensors.items() if name.endswith("expert_map"))
    assert plan.predicted["bytes"] == size_of(tmp_path / "out")
    assert plan.predicted["num_parameters"] == sum(t.numel() for t in tensors.values()) - maps


def test_a_file_is_its_predicted_bytes_and_a_header(exact):
    file = exact / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + json.loads((exact / "plan.json").read_text())["predicted"]["bytes"]


@pytest.mark.parametrize("export", ["exact", "native"])
def test_keeping_every_expert_reproduces_every_tensor_bit_for_bit(export, variant, tmp_path):
    checkpoint, stats, kind = variant
    if (export, kind) == ("native", "router bias"):
        return  # refused, which has a test of its own
    compress(checkpoint, stats, tmp_path / "out", experts=6, export=export)
    before, after = load_tensors(checkpoint), load_tensors(tmp_path / "out")
    if export == "exact":
        for name in {n.partition(".experts.")[0] for n in before if ".experts." in n}:
            assert after.pop(f"{name}.expert_map").tolist() == list(range(6))
            for part in ("wi", "wo"):
                for e, weight in enumerate(after.pop(f"{name}.experts.{part}")):
                    after[f"{name}.experts.expert_{e}.{part}.weight"] = weight
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


def test_keeping_every_expert_leaves_the_native_configuration_alone(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", experts=6, export="native")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (switch / "config.json").read_text()
    )


def test_the_exact_model_computes_what_the_stock_model_does_with_merged_experts(variant, tmp_path):
    from msmoe.formats.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration

    checkpoint, stats, _ = variant
    compress(checkpoint, stats, tmp_path / "out", experts=2.5)
    ours = MsmoeSwitchForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    stock = with_merged_experts(checkpoint, tmp_path / "out")
    dtype = next(ours.parameters()).dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    scale = float(logits_of(stock, BATCH).abs().max())
    torch.testing.assert_close(logits_of(ours, BATCH), logits_of(stock, BATCH), rtol=0, atol=tolerance * scale)


FRESH = """
    import sys, torch
    from transformers import AutoModelForSeq2SeqLM
    batch, out, *folders = sys.argv[1:]
    results = {}
    for folder in folders:
        trust = {"trust_remote_code": True} if folder.endswith("exact") else {}
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **trust).eval()
        with torch.inference_mode():
            results[folder] = [type(model).__name__, model(**torch.load(batch, weights_only=True)).logits]
    assert not any(name.partition(".")[0] == "msmoe" for name in sys.modules)
    torch.save(results, out)
"""


@pytest.fixture(scope="module")
def fresh(switch, exact, native, dropping_switch, dropping_stats, stats, data, tmp_path_factory):
    """Exports, as a process sees them that imports transformers only: name -> (folder, class name, logits on `BATCH`).

    The process starts away from our code.
    """
    work = tmp_path_factory.mktemp("fresh")
    compress(dropping_switch, dropping_stats, work / "exact")
    for name, tied in (("tied", True), ("untied", False)):
        source = switch if tied else save_switch(work / "untied-ckpt", tie_word_embeddings=False)
        its_stats = stats if tied else profile_small(source, data)
        options = {"router": "dominant"}
        plan = compress(
            source, its_stats, work / f"{name}-one", experts=1, method="m-smoe", export="native", apply_options=options
        )
        apply(source, plan, work / f"{name}-dense", stats=its_stats, export="dense")
    factorize(exact, work / "factors-exact", stats=stats, rank=4)
    factorize(native, work / "factors-native", stats=stats, rank=4, export="native")
    factorize(native, work / "stored-exact", stats=stats, rank=4)
    folders = {"exact": work / "exact", "native": native, "tied": work / "tied-dense", "untied": work / "untied-dense"}
    folders |= {name: work / name for name in ("factors-exact", "factors-native", "stored-exact")}
    torch.save(batch_of(BATCH), work / "batch.pt")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FRESH), work / "batch.pt", work / "logits.pt", *folders.values()],
        capture_output=True, text=True, cwd=work, env=os.environ | settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = torch.load(work / "logits.pt", weights_only=True)
    return {name: (folder, *results[str(folder)]) for name, folder in folders.items()}


def test_plain_transformers_loads_the_exact_export_in_a_fresh_process(fresh, dropping_switch):
    folder, name, logits = fresh["exact"]
    assert name == "MsmoeSwitchForConditionalGeneration"
    stock = with_merged_experts(dropping_switch, folder)
    torch.testing.assert_close(logits, logits_of(stock, BATCH), rtol=0, atol=1e-4)


def test_plain_transformers_loads_factors_in_a_fresh_process(fresh, switch):
    folder, kind, ours = fresh["factors-exact"]
    assert kind == "MsmoeSwitchForConditionalGeneration"
    assert f"{LAYERS[1]}.experts.wi.U" in load_tensors(folder)
    torch.testing.assert_close(ours, logits_of(with_merged_experts(switch, folder), BATCH), rtol=1e-4, atol=1e-4)


def test_factors_multiplied_out_are_a_stock_checkpoint_that_computes_the_same(fresh):
    _, kind, ours = fresh["factors-native"]
    assert kind == "SwitchTransformersForConditionalGeneration"
    torch.testing.assert_close(ours, fresh["stored-exact"][2], rtol=1e-4, atol=1e-4)


def test_the_stock_class_loads_the_native_export_in_a_fresh_process(fresh):
    folder, name, logits = fresh["native"]
    model = build_switch(num_experts=3, expert_capacity=128)  # 64 * 6 / 3
    missing = model.load_state_dict(load_tensors(folder), strict=False).missing_keys
    assert all("embed_tokens" in key or key == "lm_head.weight" for key in missing)  # tied to the shared embedding
    model.tie_weights()
    assert name == "SwitchTransformersForConditionalGeneration"
    torch.testing.assert_close(logits, logits_of(model, BATCH), rtol=0, atol=1e-4)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_t5_loads_the_dense_export_in_a_fresh_process(embeddings, fresh, stats, data):
    folder, name, logits = fresh[embeddings]
    if embeddings == "untied":
        stats = profile_small(folder.with_name("untied-ckpt"), data)
    # one expert has gate 1: the Switch model with wo times the mean gate is the dense model
    stock = SwitchTransformersForConditionalGeneration.from_pretrained(folder.with_name(f"{embeddings}-one")).eval()
    with torch.no_grad():
        for layer in LAYERS:
            gate = float(stats.layers[layer].gate_mass.sum()) / stats.layers[layer].num_tokens
            stock.get_parameter(f"{layer}.experts.expert_0.wo.weight").mul_(gate)
    assert name == "T5ForConditionalGeneration"
    torch.testing.assert_close(logits, logits_of(stock, BATCH), rtol=1e-4, atol=1e-4)


def test_the_native_export_has_capacity_for_the_same_number_of_tokens(dropping_switch, dropping_stats, tmp_path):
    options = {"router": "dominant"}
    compress(dropping_switch, dropping_stats, tmp_path / "out", experts=4, export="native", apply_options=options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts"], config["expert_capacity"]) == (4, 3)  # 2 * 6 / 4


def test_the_exact_configuration_counts_the_groups_of_every_layer(switch, stats, exact):
    plan = json.loads((exact / "plan.json").read_text())
    config = json.loads((exact / "config.json").read_text())
    counts = {name: len(layer["groups"]) for name, layer in plan["layers"].items()}
    assert config["moe_layers"] == {LAYERS[0]: 6} | counts
    assert config["num_experts"] == 6


def layout(checkpoint, export, layers):
    source = Checkpoint(checkpoint)
    return build_export(export, family_of(source), source, plan_for(source, layers))


def test_native_refuses_unequal_numbers_and_says_what_to_do(switch):
    with pytest.raises(UserError, match=r"--budget uniform --keep-layer none .*encoder.block.1.layer.1.mlp 2"):
        layout(switch, "native", {LAYERS[0]: layer_plan(6, [0, 1, 2], [3, 4, 5])})


def test_native_refuses_router_biases(data, tmp_path):
    source = save_switch(tmp_path / "ckpt", router_bias=True)
    with pytest.raises(UserError, match="router biases: use --export exact"):
        layout(source, "native", {name: layer_plan(6, [0, 1, 2, 3, 4, 5]) for name in LAYERS})


def test_dense_refuses_more_than_one_expert(switch):
    with pytest.raises(UserError, match="dense needs one expert in every MoE layer: plan with --experts 1"):
        layout(switch, "dense", {name: layer_plan(6, [0, 1, 2], [3, 4, 5]) for name in LAYERS})


def test_dense_needs_statistics_for_its_mean_gate(switch, stats, tmp_path):
    plan = make_plan(switch, stats, method="m-smoe", experts=1, keep_layers=["none"], export="dense")
    with pytest.raises(UserError, match="needs --stats for the mean gate"):
        apply(switch, plan, tmp_path / "out", export="dense")


def test_an_unknown_export_lists_the_choices(switch):
    with pytest.raises(UserError, match="unknown export 'onnx'; choose one of exact, native, dense"):
        layout(switch, "onnx", {})


@pytest.mark.parametrize("export", EXPORTS)
def test_every_tensor_of_a_layout_is_filled_from_exactly_one_place(export, switch):
    groups = ([0, 1, 2, 3, 4, 5],) if export == "dense" else ([0, 1, 2], [3], [4, 5])
    result = layout(switch, export, {name: layer_plan(6, *groups) for name in LAYERS})
    places = [copy.target for copy in result.copies] + [p.places[0] for parts in result.merged.values() for p in parts]
    slots = [(place.tensor, place.index) for place in places]
    expected = []
    for spec in result.tensors:
        if ".experts.w" in spec.name:  # stacked
            expected += [(spec.name, index) for index in range(spec.shape[0])]
        elif spec.name not in {*result.maps.values(), *result.routers.values()}:
            expected.append((spec.name, None))
    assert sorted(map(str, slots)) == sorted(map(str, expected))


def test_a_plan_without_layers_copies_the_model(switch):
    result = layout(switch, "exact", {})
    assert result.merged == {}
    assert result.num_parameters == Checkpoint(switch).num_parameters


def test_one_group_holds_the_parameters_of_one_expert(switch):
    before = Checkpoint(switch).num_parameters
    after = layout(switch, "exact", {LAYERS[0]: layer_plan(6, [0, 1, 2, 3, 4, 5])}).num_parameters
    assert before - after == 5 * 2 * 16 * 24  # five experts of two 16 x 24 matrices


def test_a_group_per_expert_is_the_identity_whatever_its_order(switch, tmp_path):
    shuffled = LayerPlan(6, layer_plan(6, [3], [5], [0], [1], [4], [2]).groups)
    apply(switch, plan_for(Checkpoint(switch), {LAYERS[2]: shuffled}), tmp_path / "out")
    assert load_tensors(tmp_path / "out")[f"{LAYERS[2]}.expert_map"].tolist() == [0, 1, 2, 3, 4, 5]
