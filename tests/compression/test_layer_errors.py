"""Errors of compressed layers: hand-worked numbers, and the modules of the loaded models run on the same tokens."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    LAYERS,
    compress,
    layer_plan,
    load_tensors,
    plan_for,
    profile_small,
    random_records,
    save_switch,
    write_records,
)

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.compression.layer_errors import layer_errors, refit_errors, relative_errors
from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.lowrank.measures import stable_rank
from msmoe.planning.plan import LayerPlan

LAYER = LAYERS[1]
COMPRESSED = {
    "merged": {"method": "m-smoe"},
    "refit": {"method": "m-smoe-refit"},
    "native": {"method": "m-smoe", "export": "native"},
    "pruned": {"method": "frequency"},
    "pruned native": {"method": "reap", "export": "native"},
    "mean outputs": {"method": "mone"},
    "dominant rows": {"method": "ream"},
    "factorised": {"method": "mc-smoe", "rank": 4},
}


@pytest.fixture(scope="module")
def compressed(switch, stats, tmp_path_factory):
    """Name of a choice in `COMPRESSED` -> the checkpoint."""
    folder = tmp_path_factory.mktemp("compressed")

    def make(name):
        out = folder / name.replace(" ", "-")
        if not out.exists():
            compress(switch, stats, out, **COMPRESSED[name])
        return out

    return make


def evaluated(layer):
    """The tokens that an error is measured on: held out, at most 1024."""
    sample = layer.tokens()
    return sample.select(sample.held_out).drawn(1024, layer.num_experts)


def module_outputs(path, name, inputs):
    """What the loaded model's layer gives to tokens (T, D), each a sequence of its own, so that none is dropped."""
    with torch.inference_mode():
        return load(path).get_submodule(name)(inputs[:, None]).squeeze(1)


def with_sample(stats, choose):
    """Statistics whose samples hold the tokens that `choose(sample)` says."""
    layers = {n: replace(s, sample=s.tokens().select(choose(s.tokens()))) for n, s in stats.layers.items()}
    return replace(stats, layers=layers)


def test_hand_worked_errors_are_weighted_by_the_tokens_that_each_one_stands_for():
    wanted = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    change = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    error, by_expert = relative_errors(
        wanted, change, torch.tensor([1.0, 3.0, 2.0]).double(), torch.tensor([[0], [2], [2]]), 3
    )
    # (1 * 1 + 3 * 2 + 2 * 0) / (1 * 25 + 3 * 1 + 2 * 4) = 7 / 36; expert 0: 1 / 25; expert 2: 6 / 11
    assert error == pytest.approx(7 / 36)
    assert by_expert.tolist() == pytest.approx([1 / 25, float("nan"), 6 / 11], nan_ok=True)


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_error_is_that_of_the_modules_of_both_models_on_the_same_tokens(name, switch, stats, compressed):
    found = layer_errors(switch, compressed(name), stats)
    assert list(found) == list(LAYERS)
    for layer, result in found.items():
        sample = evaluated(stats.layers[layer])
        before, after = (module_outputs(path, layer, sample.inputs) for path in (switch, compressed(name)))
        weights = sample.weights(stats.layers[layer].dispatched)
        total = lambda y, w=weights: float(w @ y.double().square().sum(1))
        assert result.num_tokens == len(sample)
        assert result.error == pytest.approx(total(after - before) / total(before), rel=1e-4, abs=1e-9)
        for e, value in enumerate(result.by_expert.tolist()):
            mine = sample.expert[:, 0] == e
            expected = float((after - before)[mine].square().sum() / before[mine].square().sum())
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-9, nan_ok=True)


def test_layers_that_are_kept_have_no_error(switch, stats, compressed):
    assert layer_errors(switch, compressed("refit"), stats)[LAYERS[0]].error == 0


def test_the_original_and_an_identity_plan_have_no_error(switch, stats, tmp_path):
    plan = plan_for(Checkpoint(switch), {name: LayerPlan.identity(6) for name in LAYERS})
    apply(switch, plan, tmp_path / "out")
    for path in (switch, tmp_path / "out"):
        for result in layer_errors(Checkpoint(switch), Checkpoint(path), stats).values():
            assert (result.error, result.rerouted) == (0, 0)


def test_copies_of_one_expert_merge_without_error(data, tmp_path):
    source = save_switch(tmp_path / "ckpt")
    tensors, order = load_tensors(source), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for e in range(1, 6):  # the same function, with its neurons in another order
        wi, wo = (f"{LAYER}.experts.expert_{{}}.{part}.weight" for part in ("wi", "wo"))
        tensors[wi.format(e)] = tensors[wi.format(0)][order.roll(e)].contiguous()
        tensors[wo.format(e)] = tensors[wo.format(0)][:, order.roll(e)].contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    stats = profile_small(source, data)
    compress(source, stats, tmp_path / "out", experts=1, method="m-smoe")
    assert layer_errors(source, tmp_path / "out", stats)[LAYER].error < 1e-10


def test_experts_without_tokens_have_no_number(switch, stats, compressed):
    some = with_sample(stats, lambda sample: sample.expert[:, 0] != 2)
    result = layer_errors(switch, compressed("merged"), some)[LAYER]
    assert result.by_expert.isnan().tolist() == [False, False, True, False, False, False]
    none = with_sample(stats, lambda sample: torch.zeros(len(sample), dtype=torch.bool))
    result = layer_errors(switch, compressed("merged"), none)[LAYER]
    assert (result.num_tokens, str(result.error), str(result.rerouted)) == (0, "nan", "nan")


@pytest.mark.parametrize("name", ["merged", "refit", "mean outputs", "factorised"])
def test_no_token_is_rerouted_where_the_router_keeps_its_rows(name, switch, stats, compressed):
    assert {r.rerouted for r in layer_errors(switch, compressed(name), stats).values()} == {0}


def test_tokens_are_rerouted_where_gate_or_target_change(switch, stats, tmp_path):
    plan = replace(plan_for(Checkpoint(switch), {LAYER: layer_plan(6, [4, 0, 2], [1], [3, 5])}), seed=0)
    apply(switch, replace(plan, parameters=replace(plan.parameters, routing="dominant")), tmp_path / "out")
    layer = stats.layers[LAYER]
    sample = evaluated(layer)
    rows = load_tensors(switch)[f"{LAYER}.router.classifier.weight"]
    gate, choice = (sample.inputs @ rows[[1, 3, 4]].T).softmax(-1).max(-1)
    own = torch.tensor([2, 0, 2, 1, 2, 1])[sample.expert[:, 0]]  # dominant experts 1, 3, 4 are stored in this order
    moved = (choice != own) | ((gate - sample.gate[:, 0]).abs() > 1e-4 * sample.gate[:, 0])
    weights = sample.weights(layer.dispatched)
    result = layer_errors(switch, tmp_path / "out", stats)[LAYER]
    assert result.rerouted == pytest.approx(float(weights @ moved.double() / weights.sum()))
    assert result.rerouted > 0.5  # a softmax over three rows is another value


def test_without_a_plan_nobody_knows_what_stands_for_an_expert(switch, stats, compressed, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for file in compressed("native").iterdir():
        if file.name != "plan.json":
            (folder / file.name).write_bytes(file.read_bytes())
    result = layer_errors(switch, folder, stats)[LAYER]
    assert str(result.rerouted) == "nan"
    assert result.error == layer_errors(switch, compressed("native"), stats)[LAYER].error


def test_weights_that_were_solved_on_the_statistics_are_said_to_have_seen_them(switch, stats, compressed, tmp_path):
    others = profile_small(switch, write_records(tmp_path / "others.jsonl", random_records(40, seed=1)))
    seen = lambda name, given: [r.seen for r in layer_errors(switch, compressed(name), given).values()]
    assert seen("refit", stats) == [False, True, True, True]  # the first layer is kept
    assert seen("refit", others) == [False] * 4
    assert seen("merged", stats) == [False] * 4


def test_mean_outputs_and_fitted_routers_have_seen_their_statistics(switch, stats, compressed):
    for name in ("mean outputs", "native"):
        assert any(r.seen for r in layer_errors(switch, compressed(name), stats).values())


def test_a_sum_of_statistics_is_seen_where_a_part_of_it_was(switch, stats, compressed, tmp_path):
    other, third = (
        profile_small(switch, write_records(tmp_path / f"{seed}.jsonl", random_records(30, seed=seed)))
        for seed in (5, 6)
    )
    compress(switch, stats + other, tmp_path / "of-sum", method="m-smoe-refit")
    seen = lambda folder, given: layer_errors(switch, folder, given, stable_ranks=False)[LAYER].seen
    assert seen(compressed("refit"), stats + other)
    assert seen(tmp_path / "of-sum", other)
    assert not seen(tmp_path / "of-sum", third)


def test_factors_that_were_refitted_on_other_statistics_have_seen_those(switch, stats, compressed, tmp_path):
    other = profile_small(switch, write_records(tmp_path / "other.jsonl", random_records(30, seed=5)))
    factorize(compressed("merged"), tmp_path / "factors", stats=other, rank=4, refit=True, workers=1)
    seen = lambda given: layer_errors(switch, tmp_path / "factors", given, stable_ranks=False)[LAYER].seen
    assert seen(other)
    assert not seen(stats)


def test_every_token_may_be_used_up_to_a_limit(switch, stats, compressed):
    size = len(stats.layers[LAYER].tokens())
    measure = lambda **options: layer_errors(switch, compressed("merged"), stats, **options)[LAYER].num_tokens
    assert measure(every=True, tokens=10**6) == size
    assert measure() < size
    assert measure(tokens=20) == 20


def test_stable_ranks_are_means_over_original_and_stored_experts(switch, stats, compressed):
    result = layer_errors(switch, compressed("merged"), stats)[LAYER]
    before, after = load_tensors(switch), load_tensors(compressed("merged"))
    mean = lambda matrices: sum(map(stable_rank, matrices)) / len(matrices)
    for part, side in (("wi", "front"), ("wo", "output")):
        members = [before[f"{LAYER}.experts.expert_{e}.{part}.weight"] for e in range(6)]
        assert getattr(result.stable_rank_before, side) == pytest.approx(mean(members))
        assert getattr(result.stable_rank_after, side) == pytest.approx(mean(after[f"{LAYER}.experts.{part}"]))
    bare = layer_errors(switch, compressed("merged"), stats, stable_ranks=False)[LAYER]
    assert (bare.stable_rank_before, bare.stable_rank_after) == (None, None)


def test_progress_counts_layers(switch, stats, compressed):
    calls = []
    layer_errors(switch, compressed("merged"), stats, progress=lambda *count: calls.append(count))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ---- what does not belong together


def test_statistics_of_another_checkpoint_are_refused(switch, stats, tmp_path):
    other = save_switch(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="statistics are of another checkpoint"):
        layer_errors(other, switch, stats)


def test_checkpoints_with_other_layers_are_refused(switch, stats, tmp_path):
    other = save_switch(tmp_path / "other", num_sparse_decoder_layers=4)
    with pytest.raises(UserError, match=r"do not belong together: only one of them has decoder\.block\.0"):
        layer_errors(switch, other, stats)


def test_checkpoints_with_more_experts_or_another_width_are_refused(switch, stats, tmp_path):
    wider = save_switch(tmp_path / "wider", d_model=32)
    more = save_switch(tmp_path / "more", num_experts=8)
    with pytest.raises(UserError, match=r"6 router rows of width 32 in encoder.*, with 6 of width 16"):
        layer_errors(switch, wider, stats)
    with pytest.raises(UserError, match=r"8 router rows of width 16 in encoder.*, with 6 of width 16"):
        layer_errors(switch, more, stats)


def test_statistics_that_count_other_experts_are_refused(switch, stats):
    fewer = replace(stats.layers[LAYER], routed=stats.layers[LAYER].routed[:4])
    with pytest.raises(UserError, match=f"the statistics count 4 experts in {LAYER}, .* has 6"):
        layer_errors(switch, switch, replace(stats, layers=dict(stats.layers) | {LAYER: fewer}))


def test_dense_checkpoints_are_refused(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", experts=1, export="dense", method="m-smoe")
    with pytest.raises(UserError, match="architecture 't5'"):
        layer_errors(switch, tmp_path / "out", stats)


def test_nan_weights_name_the_tensor(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", method="m-smoe")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[f"{LAYER}.experts.wo"][0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{LAYER}\.experts\.wo .*NaN"):
        layer_errors(switch, tmp_path / "out", stats)


def test_no_tokens_cannot_be_asked_for(switch, stats):
    with pytest.raises(UserError, match="tokens must be at least 1, got 0"):
        layer_errors(switch, switch, stats, tokens=0)


# ---- refits


def refitted(before, after, square, layer="a"):
    refit = {"error_before": before, "error_after": after, "held_out_square": square}
    return {"layer": layer, "refit": refit}


def test_hand_worked_refit_errors_of_groups_are_weighed_by_the_squares_of_their_outputs():
    # (3 * 0.5 + 1 * 0.1) / 4 = 0.4; (3 * 0.2 + 1 * 0.1) / 4 = 0.175
    found = refit_errors([refitted(0.5, 0.2, 3.0), refitted(0.1, 0.1, 1.0), refitted(2.0, 1.0, 5.0, layer="b")])
    assert found == {"a": (pytest.approx(0.4), pytest.approx(0.175)), "b": (2.0, 1.0)}


def test_groups_without_refit_or_held_out_tokens_have_no_refit_error():
    assert (
        refit_errors([{"layer": "a"}, refitted(None, None, 0.0), {"layer": "a", "refit": {"error_before": 1.0}}]) == {}
    )


def test_the_error_before_a_refit_of_all_groups_is_the_error_of_the_layer_without_refit(switch, stats, tmp_path):
    plan = plan_for(Checkpoint(switch), {LAYER: layer_plan(6, [0, 1, 2], [3, 4, 5])})
    refit = replace(plan, parameters=replace(plan.parameters, refit="independent"))
    report = apply(switch, refit, tmp_path / "refit", stats=stats)
    apply(switch, plan, tmp_path / "merged")
    expected = layer_errors(switch, tmp_path / "merged", stats, tokens=10**6)[LAYER].error
    # a refit weighs held-out tokens by the whole sample, an error of the layer by its held-out half
    assert refit_errors(report.groups)[LAYER][0] == pytest.approx(expected, rel=0.02)
