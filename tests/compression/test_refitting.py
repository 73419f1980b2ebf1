"""Refits of whole checkpoints solve for the routing that the written model does."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny import LAYERS, compress, layer_plan, load_tensors, plan_for

from msmoe.checkpoint import Checkpoint
from msmoe.cli import main
from msmoe.compression.apply import apply
from msmoe.compression.group import Sources, merge_one
from msmoe.compression.layer_errors import layer_errors
from msmoe.compression.refitting import RefitTokens, planned_routing, refit_layers
from msmoe.compression.sequential import kept_router, moved_inputs
from msmoe.families.switch import SwitchFamily
from msmoe.formats.build import build_export
from msmoe.layer.expert import switch_expert
from msmoe.merge import refit_output
from msmoe.planning.plan import Group, LayerPlan, Plan

LAYER = LAYERS[2]
PRUNED = LayerPlan(6, tuple(Group(e, (e,), (1.0,)) for e in (4, 1, 3)), removed=(0, 2, 5))


def expert_of(tensors, layer, e):
    prefix = f"{layer}.experts.expert_{e}"
    return switch_expert(tensors[f"{prefix}.wi.weight"], tensors[f"{prefix}.wo.weight"])


def solved_by_hand(before, layer, merged, target, gate, stats):
    """`refit_output` on the tokens that a router sends somewhere, their targets one token at a time."""
    sample, weights = stats.tokens(), stats.tokens().weights(stats.dispatched)
    wanted = torch.zeros_like(sample.inputs)
    for t in range(len(sample)):
        wanted[t] = expert_of(before, layer, int(sample.expert[t, 0]))(sample.inputs[t : t + 1])[0] * sample.gate[t]
    found = []
    for g, expert in enumerate(merged):
        mine = target == g
        found.append(
            refit_output(expert, sample.inputs[mine], gate[mine], wanted[mine], weights[mine], sample.held_out[mine])
        )
    return found


def test_a_pruned_layer_is_solved_for_the_tokens_and_gates_of_the_rows_that_stay(switch, stats, tmp_path):
    plan = plan_for(Checkpoint(switch), {LAYER: PRUNED}, others="remove", refit="independent")
    report = apply(switch, plan, tmp_path / "out", stats=stats, workers=2)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    kept = [1, 3, 4]
    rows = before[f"{LAYER}.router.classifier.weight"][kept]
    gate, target = (stats.layers[LAYER].tokens().inputs @ rows.T).softmax(-1).max(-1)
    experts = [expert_of(before, LAYER, e) for e in kept]
    expected = solved_by_hand(before, LAYER, experts, target, gate, stats.layers[LAYER])
    for g, refit in enumerate(expected):
        torch.testing.assert_close(after[f"{LAYER}.experts.wo"][g], refit.output, rtol=1e-3, atol=1e-4)
        assert torch.equal(after[f"{LAYER}.experts.wi"][g], experts[g].inputs["wi"])
    assert any(refit.ridge is not None for refit in expected)
    assert len(report.groups) == 3


@pytest.mark.parametrize("router", ["fit", "dominant"])
def test_a_native_export_is_solved_for_the_tokens_and_gates_of_its_own_router(router, switch, stats, tmp_path):
    how = {"export": "native", "apply_options": {"router": router}, "experts": 3}
    compress(switch, stats, tmp_path / "plain", method="m-smoe", **how)
    compress(switch, stats, tmp_path / "refit", method="m-smoe-refit", **how)
    before, plain, after = (load_tensors(folder) for folder in (switch, tmp_path / "plain", tmp_path / "refit"))
    rows = after[f"{LAYER}.router.classifier.weight"]
    gate, target = (stats.layers[LAYER].tokens().inputs @ rows.T).softmax(-1).max(-1)
    merged = [expert_of(plain, LAYER, g) for g in range(3)]
    for g, refit in enumerate(solved_by_hand(before, LAYER, merged, target, gate, stats.layers[LAYER])):
        written = expert_of(after, LAYER, g)
        torch.testing.assert_close(written.output, refit.output, rtol=1e-3, atol=1e-4)
        assert torch.equal(written.inputs["wi"], merged[g].inputs["wi"])


@pytest.mark.parametrize(
    ("method", "export"),
    [("reap", "exact"), ("reap", "native"), ("ream", "exact"), ("hc-smoe", "native"), ("random-pruning", "exact")],
)
def test_refit_lowers_the_error_of_every_layer_as_exported(method, export, switch, stats, tmp_path):
    errors = []
    for refit in ("none", "independent"):
        out = tmp_path / refit
        compress(switch, stats, out, method=method, experts=3, export=export, refit=refit, keep_layers=["none"])
        errors.append(layer_errors(switch, out, stats, stable_ranks=False))
    assert all(errors[1][layer].error < errors[0][layer].error for layer in LAYERS)


def test_experts_whose_tokens_and_gates_stay_keep_their_bytes(switch, stats, tmp_path):
    plan = compress(switch, stats, tmp_path / "out", method="reap-refit", experts=3)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    alone = 0
    for layer, planned in plan.layers.items():
        for index, g in enumerate(planned.stored_order):
            if len(planned.groups[g].members) == 1:
                alone += 1
                kept = expert_of(before, layer, planned.groups[g].dominant)
                assert torch.equal(after[f"{layer}.experts.wo"][index], kept.output)
    assert alone


def test_kept_experts_beside_mean_outputs_keep_their_bytes(switch, stats, tmp_path):
    for refit in ("none", "independent"):
        compress(switch, stats, tmp_path / refit, method="mone", experts=3, refit=refit)
    one, other = (load_tensors(tmp_path / refit) for refit in ("none", "independent"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("export", ["exact", "native"])
def test_a_sequential_refit_of_a_pruned_model_begins_as_the_independent_one(export, switch, stats, data, tmp_path):
    how = {"method": "reap", "experts": 3, "export": export, "keep_layers": ["none"]}
    compress(switch, stats, tmp_path / "one", refit="independent", **how)
    compress(switch, stats, tmp_path / "two", refit="sequential", **how, apply_options={"data": data})
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    names = lambda layer: [name for name in one if name.startswith(f"{layer}.experts") and "wo" in name]
    for name in names(LAYERS[0]):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(one[name], two[name], rtol=1e-2) for name in names(LAYERS[-1]))


def test_a_narrowed_router_chooses_as_the_written_one(switch, stats, data, records):
    """What a sequential refit sees in the first layer is what the plan's routing says of it."""
    from msmoe.calibration.records import TokenRecord

    family, checkpoint, layer = SwitchFamily(), Checkpoint(switch), LAYERS[0]
    plan = plan_for(checkpoint, {layer: PRUNED}, others="remove", refit="sequential")
    sources, layout = Sources(family, checkpoint, plan, stats), build_export("exact", family, checkpoint, plan)
    model = family.load_model(switch, dtype=torch.float32)
    family.narrow_router(model, layer, *kept_router(sources, layer, None), config=layout.config)
    tokens = [TokenRecord(r["input_ids"], r["labels"]) for r in records]
    moved = moved_inputs(sources, model, layer, stats.layers[layer].tokens(), tokens, pad_id=0)
    expected = planned_routing(sources, layout, layer, None)
    assert torch.equal(torch.tensor(PRUNED.expert_map)[moved.expert], expected.experts)
    torch.testing.assert_close(moved.gate, expected.weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("flags", "refit"), [("--refit", "independent"), ("--no-refit", "none"), ("", "none"),
                                              ("--refit sequential", "sequential")])  # fmt: skip
def test_refit_is_a_flag_of_every_method(flags, refit, switch, stats, tmp_path, monkeypatch):
    stats.save(tmp_path / "stats")
    arguments = (
        f"msmoe plan {switch} --stats {tmp_path}/stats --out {tmp_path}/plan.json --method reap --experts 3 {flags}"
    )
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert Plan.load(tmp_path / "plan.json").parameters.refit == refit


def test_where_tokens_meet_two_groups_those_of_a_layer_are_refitted_together(switch, stats):
    """Each token goes to its expert and, at half the gate, to the next one; experts 0-1 and 2-3 are merged."""
    family, checkpoint, layer = SwitchFamily(), Checkpoint(switch), stats.layers[LAYER]
    one = layer.tokens()
    second = (one.expert + 1) % 6
    sample = replace(
        one, expert=torch.cat([one.expert, second], 1), gate=torch.cat([one.gate, one.gate / 2], 1),
        chance=torch.ones(len(one), 1, dtype=torch.float64),
    )  # fmt: skip
    both = replace(stats, layers={**stats.layers, LAYER: replace(layer, sample=sample)})
    planned = layer_plan(6, [0, 1], [2, 3], [4], [5])
    plan = plan_for(checkpoint, {LAYER: planned}, refit="independent")
    sources, layout = Sources(family, checkpoint, plan, both), build_export("exact", family, checkpoint, plan)
    before = load_tensors(switch)
    stored = [expert_of(before, LAYER, e) for e in (0, 2, 4, 5)]
    plain = list(stored)
    for g, (expert, report) in zip(
        (0, 1),
        refit_layers(sources, layout, list(layout.merged), RefitTokens(sources, layout, {}), workers=2),
        strict=True,
    ):
        stored[g] = expert
        plain[g] = merge_one(sources, layout, LAYER, g)[0]
        assert report.refit.ridge is not None
    places, error = torch.tensor(planned.expert_map), {"plain": 0.0, "refit": 0.0}
    for t in range(len(sample)):
        x, gates = sample.inputs[t : t + 1], sample.gate[t].tolist()
        chosen = list(zip(sample.expert[t].tolist(), gates, strict=True))
        wanted = sum(gate * expert_of(before, LAYER, e)(x) for e, gate in chosen)
        for name, experts in (("plain", plain), ("refit", stored)):
            given = sum(gate * experts[int(places[e])](x) for e, gate in chosen)
            error[name] += float((given - wanted).square().sum())
    assert error["refit"] < 0.7 * error["plain"]
