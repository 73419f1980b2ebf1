"""The plan file: round trip, validation, and what belongs to another checkpoint."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import LAYERS, layer_plan, plan_for

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan
from msmoe.planning.planner import plan as make_plan

LAYER = LAYERS[1]


@st.composite
def layer_plans(draw):
    """Any partition of up to 8 experts, weights that sum to 1, groups in any order."""
    num_experts = draw(st.integers(1, 8))
    labels = draw(st.lists(st.integers(0, num_experts - 1), min_size=num_experts, max_size=num_experts))
    groups = []
    for label in sorted(set(labels)):
        members = [e for e in range(num_experts) if labels[e] == label]
        counts = draw(st.lists(st.integers(1, 9), min_size=len(members), max_size=len(members)))
        weights = tuple(c / sum(counts) for c in counts)
        groups.append(Group(draw(st.sampled_from(members)), tuple(members), weights))
    return LayerPlan(num_experts, tuple(draw(st.permutations(groups))))


@given(layers=st.lists(layer_plans(), max_size=3), seed=st.integers(0, 2**40))
def test_a_saved_plan_loads_to_the_same_plan(layers, seed, tmp_path_factory):
    named = {f"encoder.block.{i}.layer.1.mlp": layer for i, layer in enumerate(layers)}
    plan = Plan(
        "m", Parameters(experts=2.5, keep_layers=()), seed, {"fingerprint": "f"}, {"sha256": "s"}, named, {"bytes": 7}
    )
    file = tmp_path_factory.getbasetemp() / "plan.json"
    plan.save(file)
    assert Plan.load(file) == plan


@given(layer_plans())
def test_the_map_sends_every_member_to_its_stored_group(layer):
    stored = [layer.groups[g] for g in layer.stored_order]
    for index, group in enumerate(stored):
        assert {e for e, target in enumerate(layer.expert_map) if target == index} == set(group.members)


@given(layer_plans())
def test_groups_are_stored_by_their_dominant_expert(layer):
    dominants = [layer.groups[g].dominant for g in layer.stored_order]
    assert dominants == sorted(dominants)


def test_keeping_every_expert_maps_it_to_itself():
    assert LayerPlan.identity(5).expert_map == [0, 1, 2, 3, 4]


def test_a_removed_expert_maps_to_nothing():
    layer = LayerPlan(3, (Group(2, (0, 2), (0.5, 0.5)),), removed=(1,))
    assert layer.expert_map == [0, -1, 0]


def test_the_plan_file_has_the_documented_form(switch, stats, tmp_path):
    make_plan(switch, stats, method="m-smoe", experts=3).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == "msmoe-plan/1"
    assert content["method"] == "m-smoe"
    assert content["checkpoint"] == {"model_type": "switch_transformers", "fingerprint": Checkpoint(switch).fingerprint}
    assert content["stats"] == {"sha256": stats.digest}
    assert set(content["layers"][LAYER]) == {"num_experts", "groups", "removed"}
    assert set(content["layers"][LAYER]["groups"][0]) == {"dominant", "members", "weights"}
    assert set(content["predicted"]) == {"num_parameters", "bytes"}


def test_a_printed_plan_shows_layers_and_groups(switch):
    plan = plan_for(Checkpoint(switch), {LAYER: layer_plan(6, [4, 0, 2], [1], [3, 5])})
    assert f"{LAYER}    6 ->   3  4<0,2  1  3<5" in str(plan)


def broken(edit) -> dict:
    """Content of a plan of one layer with three experts, after an edit of the layer."""
    layer = {
        "num_experts": 3,
        "groups": [
            {"dominant": 0, "members": [0, 2], "weights": [0.25, 0.75]},
            {"dominant": 1, "members": [1], "weights": [1.0]},
        ],
        "removed": [],
    }
    edit(layer)
    return {"format": "msmoe-plan/1", "method": "m", "checkpoint": {"fingerprint": "f"}, "layers": {LAYER: layer}}


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda x: x["groups"][1].update(members=[2], dominant=2), "expert 2 is named twice"),
        (lambda x: x.update(removed=[1]), "expert 1 is named twice"),
        (lambda x: x["groups"][0].update(members=[0, 3]), "expert 3 is out of range, experts are 0 to 2"),
        (lambda x: x["groups"][0].update(members=[0, -1]), r"members\[1\] must be a whole number .*got -1"),
        (lambda x: x.update(removed=[7]), "expert 7 is out of range"),
        (lambda x: x["groups"].pop(), "expert 1 is in no group"),
        (lambda x: x.update(num_experts=4), "expert 3 is in no group"),
        (lambda x: x["groups"][0].update(dominant=1), "dominant expert 1 is not a member"),
        (lambda x: x["groups"][0].update(weights=[0.5, 0.6]), "group of expert 0 sum to 1.1"),
        (lambda x: x["groups"][0].update(weights=[-0.5, 1.5]), r"weights\[0\] must be a number .*got -0.5"),
        (lambda x: x["groups"][0].update(weights=[float("nan"), 1]), "it holds NaN"),
        (lambda x: x["groups"][0].update(weights=[1.0]), "2 members and 1 weights"),
        (lambda x: x["groups"][1].update(members=[], weights=[]), "0 members"),
        (lambda x: x["groups"][0].pop("weights"), r"groups\[0\] lacks the field 'weights'"),
        (lambda x: x.update(groups=5), "groups must be a list, got 5"),
        (lambda x: x.update(groups=[7]), r"groups\[0\] must be an object, got 7"),
        (lambda x: x.update(num_experts=2.4), "num_experts must be a whole number of at least 1, got 2.4"),
        (lambda x: x.update(num_experts=True), "num_experts must be a whole number of at least 1, got True"),
        (lambda x: x.update(num_experts=10**9), "expert 3 is in no group"),
        (lambda x: x["groups"][1].update(dominant=1.0), r"groups\[1\].dominant must be a whole number"),
        (lambda x: x["groups"][0].update(weights=["0.25", 0.75]), r"weights\[0\] must be a number"),
        (lambda x: x["groups"][0].update(weights=[1e400, 1]), "it holds Infinity"),
        (lambda x: x.update(removed=[False]), r"removed\[0\] must be a whole number"),
    ],
)  # fmt: skip
def test_a_plan_that_contradicts_itself_is_refused(edit, complaint, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(broken(edit)))
    with pytest.raises(UserError, match=complaint):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["../../etc/passwd", "encoder/block", "a\\b", "encoder\nblock", "a..b"])
def test_a_path_as_layer_name_is_refused(name, tmp_path):
    content = broken(lambda layer: None)
    content["layers"] = {name: content["layers"][LAYER]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a layer name"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "msmoe-plan/2"}', "\x00", "[" * 100_000])
def test_a_file_that_is_no_plan_is_named(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan.json is not a"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda x: x.pop("layers"), "lacks the field 'layers'"),
        (lambda x: x.update(method=3), "method must be a text, got 3"),
        (lambda x: x.update(seed=0.5), "seed must be a whole number"),
        (lambda x: x.update(checkpoint="abc"), "checkpoint must be an object"),
        (lambda x: x.update(stats={"sha256": 5}), "stats.sha256 must be a text"),
        (lambda x: x.update(predicted={"bytes": 1.5}), "predicted.bytes must be a whole number"),
        (lambda x: x.update(parameters={"experts": "many"}), "parameters.experts must be a number"),
        (lambda x: x.update(parameters={"rank": 2.4}), "parameters.rank must be a whole number"),
        (lambda x: x.update(parameters={"rule": 1}), "parameters.rule must be a text"),
        (lambda x: x.update(parameters={"canonical": 1}), "parameters.canonical must be true or false"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(edit, complaint, tmp_path):
    content = broken(lambda layer: None)
    edit(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_that_names_a_field_twice_is_refused(tmp_path):
    text = json.dumps(broken(lambda layer: None)).replace('"num_experts": 3', '"num_experts": 2, "num_experts": 3')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match="it names 'num_experts' twice in one object"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.json is not a plan file: No such file"):
        Plan.load(tmp_path / "gone.json")


def test_the_data_frame_names_the_group_of_every_expert(switch):
    groups = Group(3, (0, 3), (0.25, 0.75)), Group(1, (1,), (1.0,))
    frame = plan_for(Checkpoint(switch), {LAYER: LayerPlan(5, groups, removed=(2, 4))}).to_frame()
    assert frame.layer.tolist() == [LAYER] * 5
    assert frame.expert.tolist() == [0, 1, 2, 3, 4]
    assert frame.group.dtype == "Int64"
    assert frame.group.isna().tolist() == [False, False, True, False, True]
    assert frame.group.dropna().tolist() == [3, 1, 3]
    assert frame.weight.tolist() == [0.25, 1.0, 0.0, 0.75, 0.0]
    assert frame.is_dominant.tolist() == [False, True, False, True, False]
    assert frame.removed.tolist() == [False, False, True, False, True]


def test_the_data_frame_of_a_plan_without_layers_has_columns_and_no_row(switch):
    frame = plan_for(Checkpoint(switch), {}).to_frame()
    assert list(frame.columns) == ["layer", "expert", "group", "weight", "is_dominant", "removed"]
    assert len(frame) == 0


def check(plan: Plan, folder) -> None:
    checkpoint = Checkpoint(folder)
    plan.check_against(checkpoint, family_of(checkpoint).layers(checkpoint))


def test_a_plan_of_another_checkpoint_is_refused(switch, dropping_switch, copied):
    file = copied / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="another checkpoint than"):
        check(plan_for(Checkpoint(switch), {}), copied)


def test_an_unknown_layer_is_named(switch):
    with pytest.raises(UserError, match=r"'encoder.block.0.layer.1.mlp', which is not an MoE layer"):
        check(plan_for(Checkpoint(switch), {"encoder.block.0.layer.1.mlp": LayerPlan.identity(6)}), switch)


def test_a_wrong_number_of_experts_is_named(switch):
    with pytest.raises(UserError, match=f"counts 8 experts in {LAYER}, it has 6"):
        check(plan_for(Checkpoint(switch), {LAYER: LayerPlan.identity(8)}), switch)
