"""The table of methods: every row makes a plan that keeps the promises of a plan, and bad requests are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from tiny import (
    LAYERS,
    build_switch,
    layer_plan,
    load_tensors,
    logits_of,
    plan_for,
    profile_small,
    save_switch,
    stored_stack,
    weight_files,
    write_records,
)
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.planning.methods import METHODS, resolve
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Plan, check_layer
from msmoe.planning.planner import Planner, interleaved, member_weights, plan
from msmoe.planning.scores import score_experts
from msmoe.planning.similarity import BASES
from msmoe.planning.subset import SubsetErrors

ASKED = {"full": {}, "dense": {}}  # references keep what they keep


def asked(method: str, experts: float = 3) -> dict:
    """The number of experts to ask a method for; references have their own."""
    return ASKED.get(method, {"experts": experts})


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_groups_and_removed_experts_are_a_partition_with_weights_of_sum_one(self, method, switch, full_stats):
        result = plan(switch, full_stats, method=method, **asked(method))
        for name, layer in result.layers.items():
            check_layer(name, layer)  # raises otherwise
            for group in layer.groups:
                assert list(group.members) == sorted(group.members)

    def test_the_total_is_the_budget(self, method, switch, full_stats):
        result = plan(switch, full_stats, method=method, keep_layers=["none"], **asked(method))
        average = {"full": 6, "dense": 1}.get(method, 3)
        assert sum(len(layer.groups) for layer in result.layers.values()) == average * len(LAYERS)

    def test_groups_are_ordered_by_the_usage_of_their_dominant_expert(self, method, switch, full_stats):
        for name, layer in plan(switch, full_stats, method=method, **asked(method)).layers.items():
            keys = [(-float(full_stats.layers[name].usage_frequency[g.dominant]), g.dominant) for g in layer.groups]
            assert keys == sorted(keys)

    def test_keeping_every_expert_copies_every_weight(self, method, switch, full_stats, tmp_path):
        if METHODS[method].fixed == "one":
            pytest.skip("keeps one expert by definition")
        result = plan(switch, full_stats, method=method, **({} if method == "full" else {"experts": 6}))
        apply(switch, result, tmp_path / "out", stats=full_stats)
        source, written = load_tensors(switch), load_tensors(tmp_path / "out")
        for name in LAYERS:
            assert torch.equal(written[f"{name}.router.classifier.weight"], source[f"{name}.router.classifier.weight"])
            for e in range(6):
                assert torch.equal(written[f"{name}.experts.wi"][e], source[f"{name}.experts.expert_{e}.wi.weight"])
                assert torch.equal(written[f"{name}.experts.wo"][e], source[f"{name}.experts.expert_{e}.wo.weight"])

    def test_the_same_input_gives_the_same_plan_and_the_same_bytes(self, method, switch, full_stats, tmp_path):
        first, second = (plan(switch, full_stats, method=method, seed=3, **asked(method, 2)) for _ in range(2))
        assert first.to_json() == second.to_json()
        for name, result in (("first", first), ("second", second)):
            apply(switch, result, tmp_path / name, stats=full_stats)
        assert weight_files(tmp_path / "first") == weight_files(tmp_path / "second")

    def test_the_plan_does_not_depend_on_the_batch_size_of_profiling(self, method, switch, full_stats, data):
        other = profile_small(switch, data, batch_size=1, fisher=64, gradients=True)
        plans = [plan(switch, stats, method=method, **asked(method)) for stats in (other, full_stats)]
        for first, second in zip(*(p.layers.values() for p in plans), strict=True):
            assert first.removed == second.removed
            for one, two in zip(first.groups, second.groups, strict=True):
                assert (one.dominant, one.members) == (two.dominant, two.members)
                np.testing.assert_allclose(one.weights, two.weights, rtol=1e-5)

    def test_predicted_bytes_are_those_of_the_written_tensors(self, method, switch, full_stats, tmp_path):
        result = plan(switch, full_stats, method=method, **asked(method, 2.5))
        apply(switch, result, tmp_path / "out", stats=full_stats)
        tensors = load_tensors(tmp_path / "out").values()
        assert result.predicted["bytes"] == sum(t.numel() * t.element_size() for t in tensors)

    def test_the_plan_survives_its_file(self, method, switch, full_stats, tmp_path):
        result = plan(switch, full_stats, method=method, **asked(method))
        result.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == result

    def test_copies_of_one_expert_compress_to_that_expert(self, method, copies, copies_stats, tmp_path):
        result = plan(copies, copies_stats, method=method, **asked(method, 2))
        apply(copies, result, tmp_path / "out", stats=copies_stats)
        source, written = load_tensors(copies), load_tensors(tmp_path / "out")
        for name in result.layers:
            wi, wo = (source[f"{name}.experts.expert_0.{part}.weight"] for part in ("wi", "wo"))
            for stored_wi, stored_wo in zip(
                stored_stack(written, f"{name}.experts.wi"), stored_stack(written, f"{name}.experts.wo"), strict=True
            ):
                x = torch.randn(50, wi.shape[1], generator=torch.Generator().manual_seed(1))
                ours, theirs = (torch.relu(x @ a.T) @ b.T for a, b in ((stored_wi, stored_wo), (wi, wo)))
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)

    def test_copies_of_one_expert_compress_without_loss_where_the_gate_stays(
        self, method, copies, copies_stats, records, tmp_path
    ):
        others = {"others": "nearest"} if METHODS[method].kind == "pruning" else {}
        if METHODS[method].defaults.routing == "dominant":
            others = {"routing": "original"}
        result = plan(copies, copies_stats, method=method, **asked(method, 2), **others)
        apply(copies, result, tmp_path / "out", stats=copies_stats)
        difference = logits_of(load(tmp_path / "out"), records) - logits_of(load(copies), records)
        assert difference.abs().max() < 1e-3

    def test_no_token_reaches_a_removed_expert(self, method, switch, full_stats, records, tmp_path):
        """Against the stock model with stored experts in place and removed rows at minus infinity."""
        result = plan(switch, full_stats, method=method, **asked(method, 2))
        apply(switch, result, tmp_path / "out", stats=full_stats)
        expected = logits_of(masked_model(switch, tmp_path / "out", result), records)
        torch.testing.assert_close(logits_of(load(tmp_path / "out"), records), expected, rtol=1e-4, atol=1e-4)

    def test_a_bfloat16_checkpoint_stays_bfloat16(self, method, half, half_stats, tmp_path):
        apply(half, plan(half, half_stats, method=method, **asked(method, 2)), tmp_path / "out", stats=half_stats)
        tensors = load_tensors(tmp_path / "out").items()
        dtypes = {t.dtype for name, t in tensors if not name.endswith(("expert_map", ".rows"))}
        assert dtypes == {torch.bfloat16}

    def test_statistics_without_what_it_needs_are_refused_with_the_flag_that_collects_it(self, method, switch, stats):
        needs = set(METHODS[method].defaults.needs)
        older = replace(
            stats, layers={n: replace(s, output_sum=None, output_norm_sum=None) for n, s in stats.layers.items()}
        )
        if "expert outputs" in needs:
            with pytest.raises(UserError, match=f"{method} needs expert outputs.*this version of `msmoe profile`"):
                plan(switch, older, method=method, **asked(method))
        elif "output gradients" in needs:
            with pytest.raises(UserError, match=f"{method} needs output gradients.*--fisher"):
                plan(switch, stats, method=method, **asked(method))
        else:
            plan(switch, older, method=method, **asked(method))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return save_copies(tmp_path_factory.mktemp("copies") / "ckpt")


@pytest.fixture(scope="module")
def copies_stats(copies, data):
    return profile_small(copies, data, fisher=64)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return save_switch(tmp_path_factory.mktemp("half") / "ckpt", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def half_stats(half, data):
    return profile_small(half, data, fisher=64)


def masked_model(source, exact, result):
    """The stock model: each expert has its group's stored weights, a removed row the logit minus infinity.

    A router of which only the dominant rows stay has the others at minus infinity as well. Experts replaced by their
    mean output have no weights but a bias, which a module of its own adds.
    """
    model = SwitchTransformersForConditionalGeneration.from_pretrained(source).eval()
    tensors = load_tensors(exact)
    for name, layer in result.layers.items():
        mlp, stored = model.get_submodule(name), {p: stored_stack(tensors, f"{name}.experts.{p}") for p in ("wi", "wo")}
        for place, g in enumerate(layer.stored_order):
            for e in layer.groups[g].members:
                with torch.no_grad():
                    mlp.experts[f"expert_{e}"].wi.weight.copy_(stored["wi"][place])
                    mlp.experts[f"expert_{e}"].wo.weight.copy_(stored["wo"][place])
        if result.parameters.others == "mean-output":
            for i, e in enumerate(layer.removed):
                mlp.experts[f"expert_{e}"] = Constant(tensors[f"{name}.experts.constants"][i])
            continue
        live = {e for g in layer.groups for e in g.members}
        if result.parameters.routing == "dominant":
            live = {g.dominant for g in layer.groups}
        dead = torch.tensor([e for e in range(6) if e not in live], dtype=torch.int64)
        mlp.router.classifier.register_forward_hook(lambda m, i, out, dead=dead: out.index_fill(-1, dead, -torch.inf))
    return model


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value.expand_as(x)


def save_copies(path):
    """A checkpoint whose experts of a layer are all the same."""
    from tiny import build_switch

    model = build_switch(seed=5)
    with torch.no_grad():
        for name in LAYERS:
            experts = model.get_submodule(f"{name}.experts")
            for e in range(1, 6):
                experts[f"expert_{e}"].load_state_dict(experts["expert_0"].state_dict())
    model.save_pretrained(path)
    return path


def test_by_default_the_first_layer_of_the_encoder_is_kept(switch, stats):
    assert list(plan(switch, stats, experts=3).layers) == list(LAYERS[1:])


def test_kept_layers_are_not_planned(switch, stats):
    assert list(plan(switch, stats, experts=3, keep_layers=[LAYERS[1], LAYERS[3]]).layers) == [LAYERS[0], LAYERS[2]]


def test_keep_layer_none_plans_every_layer(switch, stats):
    assert list(plan(switch, stats, experts=3, keep_layers=["none"]).layers) == list(LAYERS)


def test_keeping_every_layer_is_refused(switch, stats):
    with pytest.raises(UserError, match="nothing to compress"):
        plan(switch, stats, experts=3, keep_layers=list(LAYERS))


def test_usage_weights_are_shares_of_the_group():
    assert member_weights(torch.tensor([6, 9, 2]), [0, 2]) == (0.75, 0.25)  # 6/8, 2/8


def test_a_group_that_was_never_used_is_averaged_plainly():
    assert member_weights(torch.tensor([0, 9, 0, 0, 0]), [0, 2, 3, 4]) == (0.25,) * 4


def test_uniform_weights_ignore_usage(switch, stats):
    for layer in plan(switch, stats, method="average", experts=2).layers.values():
        assert all(g.weights == (1 / len(g.members),) * len(g.members) for g in layer.groups)


def test_m_smoe_weights_its_members_by_routed_tokens(switch, stats):
    for name, layer in plan(switch, stats, method="m-smoe", experts=2).layers.items():
        routed = stats.layers[name].routed.double()
        for group in layer.groups:
            expected = routed[list(group.members)] / routed[list(group.members)].sum()
            np.testing.assert_allclose(group.weights, expected, rtol=1e-12)


def test_m_smoe_groups_each_expert_with_the_dominant_one_of_most_similar_logits(switch, stats):
    for name, layer in plan(switch, stats, method="m-smoe", experts=3, budget="uniform").layers.items():
        gram = stats.layers[name].router_logits_gram
        dominant = [g.dominant for g in layer.groups]
        for group in layer.groups:
            for e in group.members:
                cosines = {d: float(gram[e, d] / (gram[e, e] * gram[d, d]).sqrt()) for d in dominant}
                assert e in dominant or max(cosines, key=cosines.get) == group.dominant


def test_a_published_method_has_no_refit():
    assert METHODS["m-smoe"].defaults == Parameters()
    assert Parameters().refit == "none"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_refitted(method):
    assert resolve(method, {"refit": "independent"}) == replace(resolve(method, {}), refit="independent")


@pytest.mark.parametrize("base", sorted(set(BASES) - {"gradient", "weight-gradient"}))
def test_every_similarity_makes_a_plan_of_the_right_size(base, switch, stats):
    result = plan(switch, stats, similarity=base, experts=3, keep_layers=["none"])
    assert sum(len(layer.groups) for layer in result.layers.values()) == 12
    assert result.parameters.similarity == base


@pytest.mark.parametrize("base", ["gradient", "weight-gradient"])
def test_gradient_similarities_ask_for_gradients(base, switch, stats):
    with pytest.raises(UserError, match=r"needs weight gradients.*--gradients"):
        plan(switch, stats, similarity=base, experts=3)


@pytest.mark.parametrize(("experts", "shown"), [(0, "0"), (7, "7"), (0.5, "0.5"), (-1, "-1"), (float("nan"), "nan")])
def test_an_impossible_number_of_experts_is_refused_with_the_range(experts, shown, switch, stats):
    with pytest.raises(
        UserError, match=rf"--experts must be between 1 and 6 \(num_experts of {LAYERS[1]}\), got {shown}"
    ):
        plan(switch, stats, experts=experts)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"method": "m-smoo"}, "unknown method 'm-smoo' - did you mean 'm-smoe'"),
        ({"similarity": "router-logit"}, "did you mean 'router-logits'"),
        ({"align": "weights"}, "did you mean 'weight'"),
        ({"grouping": "zzz"}, "Choose one of: dominant, hierarchical, kmeans, spectral, random, centroids-first"),
        ({"align_to": "second"}, "unknown align-to 'second'"),
        ({"keep_layers": ["encoder.block.1.layer.1.mpl"]}, "did you mean 'encoder.block.1.layer.1.mlp'"),
        ({"export": "onnx"}, "unknown export 'onnx'"),
        ({"simliarity": "weight"}, "unknown parameter 'simliarity' - did you mean 'similarity'"),
    ],
)
def test_an_unknown_name_lists_the_choices_and_the_closest(choice, complaint, switch, stats):
    with pytest.raises(UserError, match=complaint):
        plan(switch, stats, experts=3, **choice)


def test_too_small_a_group_capacity_is_refused(switch, stats):
    with pytest.raises(UserError, match="2 groups of at most 2 cannot hold 6 experts"):
        plan(switch, stats, experts=2, budget="uniform", group_capacity=2)


def test_group_capacity_holds_in_both_stacks(switch, stats):
    result = plan(switch, stats, experts=2, budget="uniform", group_capacity=3, keep_layers=["none"])
    assert {len(group.members) for layer in result.layers.values() for group in layer.groups} == {3}


def test_statistics_of_another_model_are_refused(stats, tmp_path):
    with pytest.raises(UserError, match="statistics are of another checkpoint"):
        plan(save_switch(tmp_path / "other", seed=1), stats, experts=3)


def test_statistics_may_be_given_as_a_folder(switch, stats, tmp_path):
    stats.save(tmp_path / "stats")
    assert plan(switch, str(tmp_path / "stats"), experts=3) == plan(switch, stats, experts=3)
    assert Stats.load(tmp_path / "stats").checkpoint == stats.checkpoint


def test_the_permutation_of_records_changes_no_group(switch, stats, records, tmp_path):
    backwards = profile_small(switch, write_records(tmp_path / "d.jsonl", records[::-1]))
    assert plan(switch, backwards, experts=3).layers == plan(switch, stats, experts=3).layers


def test_a_plan_may_give_each_layer_another_number_of_experts(switch, tmp_path):
    layers = {LAYERS[0]: layer_plan(6, [0, 1, 2, 3, 4, 5]), LAYERS[2]: layer_plan(6, [0], [1], [2], [3], [4, 5])}
    apply(switch, plan_for(Checkpoint(switch), layers), tmp_path / "out")
    written = load_tensors(tmp_path / "out")
    assert [len(written[f"{name}.experts.wi"]) for name in LAYERS] == [1, 6, 5, 6]


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"method": "reap", "rule": "fisher"}, "--rule has no effect with --others remove"),
        ({"method": "reap", "align": "weight"}, "--align has no effect with --others remove"),
        ({"method": "mone", "grouping": "kmeans"}, "--grouping has no effect with --others mean-output"),
        ({"method": "mone", "refit": "sequential"}, "--refit sequential does not work with --others mean-output"),
        ({"method": "m-smoe", "selection": "subset"}, "--selection subset has no effect with --others merge"),
        ({"method": "git-re-basin", "align": "activation"}, "--align-to mean needs --align weight"),
        ({"method": "reap", "saliency": "raep"}, "unknown saliency 'raep' - did you mean 'reap'"),
        ({"method": "dense", "experts": 2}, "method dense keeps one of a layer's experts, not 2"),
        ({"method": "full", "experts": 3}, "method full keeps all of a layer's experts, not 3"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(choice, complaint, switch, full_stats):
    with pytest.raises(UserError, match=complaint):
        plan(switch, full_stats, **choice)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].kind == "pruning"])
def test_tokens_of_removed_experts_may_go_to_the_most_similar_kept_one(method, switch, full_stats, tmp_path):
    """The stored experts are the kept ones bit for bit; the router keeps every row."""
    result = plan(switch, full_stats, method=method, others="nearest", experts=3)
    kept = {name: layer.removed for name, layer in result.layers.items()}
    assert set(kept.values()) == {()}
    apply(switch, result, tmp_path / "out", stats=full_stats)
    source, written = load_tensors(switch), load_tensors(tmp_path / "out")
    for name, layer in result.layers.items():
        assert len(written[f"{name}.expert_map"]) == 6
        for place, g in enumerate(layer.stored_order):
            key = f"{name}.experts.expert_{layer.groups[g].dominant}.wi.weight"
            assert torch.equal(written[f"{name}.experts.wi"][place], source[key])


@pytest.mark.parametrize("method", ["reap", "ean-sum", "ean-mean", "gate-mass", "mone", "frequency"])
def test_a_score_based_method_keeps_the_highest_scores(method, switch, full_stats):
    saliency = METHODS[method].defaults.saliency
    for name, layer in plan(switch, full_stats, method=method, experts=3).layers.items():
        scores = score_experts(saliency, full_stats.layers[name])
        assert scores[[g.dominant for g in layer.groups]].min() >= scores[list(layer.removed)].max()


def test_naee_says_how_it_searched_and_what_it_costs(switch, full_stats):
    result = plan(switch, full_stats, method="naee", experts=3)
    assert set(result.notes) == set(result.layers)
    assert all("exhaustive, 20 subsets; relative output error 0." in note for note in result.notes.values())


def test_naee_costs_no_more_than_any_other_pruning_on_its_own_measure(switch, full_stats):
    planner = Planner(switch, full_stats)
    for name, layer in planner.plan("naee", experts=3).layers.items():
        out = planner.view(name).outputs
        errors = SubsetErrors(*(a.numpy() for a in (out.logits, out.inner, out.square, out.target, out.weights)))
        kept = lambda layer: sorted(g.dominant for g in layer.groups)
        best = errors(np.array([kept(layer)]))[0]
        for other in ("reap", "frequency", "ean-sum", "random-pruning", "task-specific"):
            theirs = planner.plan(other, experts=3, budget="uniform").layers[name]
            assert best <= errors(np.array([kept(theirs)]))[0] * (1 + 1e-9)


def test_mone_reproduces_an_expert_of_constant_output(data, records, tmp_path):
    """Experts whose neurons all rest give zero to every token, which their mean output is as well."""
    model = build_switch(seed=3)
    with torch.no_grad():
        for name in LAYERS:
            for e in (1, 4, 5):
                model.get_submodule(f"{name}.experts.expert_{e}").wo.weight.zero_()
    model.save_pretrained(tmp_path / "ckpt")
    stats = profile_small(tmp_path / "ckpt", data)
    result = plan(tmp_path / "ckpt", stats, method="mone", experts=3)
    assert {layer.removed for layer in result.layers.values()} == {(1, 4, 5)}  # no variance
    apply(tmp_path / "ckpt", result, tmp_path / "out", stats=stats)
    difference = logits_of(load(tmp_path / "out"), records) - logits_of(load(tmp_path / "ckpt"), records)
    assert difference.abs().max() < 1e-4


def test_hc_smoe_groups_are_scipys_clusters_of_mean_outputs(switch, full_stats):
    planner = Planner(switch, full_stats)
    for name, layer in planner.plan("hc-smoe", experts=3).layers.items():
        labels = fcluster(linkage(planner.view(name).outputs.mean.numpy(), method="average"), 3, criterion="maxclust")
        expected = {tuple(np.flatnonzero(labels == label).tolist()) for label in set(labels)}
        assert {g.members for g in layer.groups} == expected


def test_ream_weighs_members_by_their_saliency(switch, full_stats):
    for name, layer in plan(switch, full_stats, method="ream", experts=2).layers.items():
        scores = score_experts("reap", full_stats.layers[name])
        for group in layer.groups:
            expected = scores[list(group.members)] / scores[list(group.members)].sum()
            np.testing.assert_allclose(group.weights, expected, rtol=1e-9)


def test_router_biases_take_part_in_what_a_subset_costs(data, tmp_path):
    """With a bias that sends every token to expert 2, the subset of one expert is that one."""
    model = build_switch(router_bias=True)
    with torch.no_grad():
        for name in LAYERS:
            model.get_submodule(f"{name}.router.classifier").bias[2] = 50.0
    model.save_pretrained(tmp_path / "ckpt")
    stats = profile_small(tmp_path / "ckpt", data)
    result = plan(tmp_path / "ckpt", stats, method="naee", experts=1)
    assert {g.dominant for layer in result.layers.values() for g in layer.groups} == {2}


def test_every_stretch_of_the_interleaved_sample_has_the_same_share_of_every_expert():
    expert = torch.tensor([0] * 90 + [1] * 10)[torch.randperm(100, generator=torch.Generator().manual_seed(0))].sort()[
        0
    ]
    order = interleaved(expert, 2)
    for part in expert[order].split(20):
        assert int((part == 1).sum()) == 2
