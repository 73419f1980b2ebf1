import json
from dataclasses import replace

import numpy as np
import pytest
import vl_convert
from msmoe.analysis.report.artefacts import LabelledPlan, gather
from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Facts, Figure, Note, Table
from msmoe.analysis.report.sections.plan import chapter
from msmoe.analysis.report.sections.plan.charts import with_labels
from msmoe.analysis.report.sections.plan.frames import (
    agreement,
    budget_frame,
    comparison_frame,
    layer_flow,
    weights_text,
)
from tiny import LAYERS, layer_plan, plan_for

from msmoe.checkpoint import Checkpoint
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan

HOSTILE = '</script><b onload="x">\u202e' + 1000 * "y"
LAYER = LayerPlan(5, (Group(2, (0, 2), (0.25, 0.75)), Group(1, (1, 4), (1.0, 0.0))), removed=(3,))
UNKNOWN = np.full(5, np.nan)


def silent(note):
    pass


def blocks(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def table(section, name):
    return next(block for block in blocks(section, Table) if block.name == name)


def render(section):
    for figure in blocks(section, Figure):
        for chart in (figure.chart, figure.still or figure.chart):
            assert "<svg" in vl_convert.vegalite_to_svg(to_spec(chart, title="Title"))


def by_hand(layers, **options):
    return Plan("by-hand", Parameters(), 7, {}, {}, layers, **options)


def test_experts_stand_by_group_and_end_at_the_middle_of_their_group():
    flow = layer_flow(LAYER, UNKNOWN, end="removed").set_index("expert")
    # two groups of two and one removed expert with gaps of 0.6: a height of 2 + 0.6 + 2 + 0.6 + 1 = 6.2
    assert flow.y.to_dict() == pytest.approx(
        {2: 0.5 / 6.2, 0: 1.5 / 6.2, 1: 3.1 / 6.2, 4: 4.1 / 6.2, 3: 5.7 / 6.2}, abs=1e-4
    )
    assert flow.to.to_dict() == pytest.approx(
        {2: 1 / 6.2, 0: 1 / 6.2, 1: 3.6 / 6.2, 4: 3.6 / 6.2, 3: 5.7 / 6.2}, abs=1e-4
    )
    assert flow.weight.to_dict() == {2: 0.75, 0: 0.25, 1: 1.0, 4: 0.0, 3: 0.0}
    assert flow.kind.to_dict() == {2: "dominant", 0: "merged", 1: "dominant", 4: "no weight", 3: "removed"}


def test_members_stand_by_usage_behind_their_dominant_expert():
    layer = layer_plan(4, [1, 0, 2, 3])
    assert layer_flow(layer, np.array([0.1, 0.2, 0.4, 0.3]), end="removed").expert.tolist() == [1, 2, 3, 0]


def test_removed_experts_end_where_the_plan_sends_them(switch):
    layers = {LAYERS[1]: LayerPlan(6, (Group(0, (0,), (1.0,)),), removed=(1, 2, 3, 4, 5))}
    plan = plan_for(Checkpoint(switch), layers, others="mean-output")
    section = chapter.section(gather([plan]), silent)
    text = json.dumps(to_spec(blocks(section, Figure)[0].chart))
    assert "mean output (5)" in text
    assert "takes 5 out without merging them" in section.lead
    render(section)


def test_labels_at_the_right_keep_their_distance():
    layer = LayerPlan.identity(100)
    frame = layer_flow(layer, np.full(100, 0.01), end="removed").assign(layer="a")
    shown = with_labels(frame, 300, experts=False).query("label != ''")
    assert 1 < len(shown) <= 300 / 11
    assert (shown.to.diff().dropna() * 300 >= 11).all()


def test_weights_are_named_up_to_a_bound():
    assert weights_text([(5, 0.625), (2, 0.375)]) == "5: 0.62, 2: 0.38"
    assert weights_text([(e, 0.1) for e in range(10)]).endswith("7: 0.1, … (2 more)")


def test_groups_have_the_share_of_tokens_of_their_members(switch, stats):
    plan = plan_for(Checkpoint(switch), {LAYERS[0]: layer_plan(6, [2, 0, 1], [5, 3, 4])})
    groups = table(chapter.section(gather([stats, plan]), silent), "plan-groups").frame
    usage = stats.layers[LAYERS[0]].routed.double() / stats.layers[LAYERS[0]].routed.sum()
    assert groups.tokens.tolist() == pytest.approx([float(usage[:3].sum()), float(usage[3:].sum())])
    assert groups.members.tolist() == ["0 1 2", "3 4 5"]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[2, 3], [1, 0]], 1.0),  # the same groups with other dominant experts
        ([[0, 1, 2], [3]], 0.0),  # 1 common pair, 2 * 3 / 6 = 1 expected
        ([[0], [1], [2], [3]], 0.0),
    ],
)
def test_agreement_is_the_adjusted_rand_index(groups, expected):
    first = by_hand({"a": layer_plan(4, [0, 1], [2, 3])})
    assert agreement(first, by_hand({"a": layer_plan(4, *groups)})) == pytest.approx(expected)


def test_agreement_is_of_the_layers_that_both_plans_change():
    grouped = layer_plan(4, [0, 1], [2, 3])
    assert agreement(by_hand({"a": grouped, "b": grouped}), by_hand({"a": grouped})) == pytest.approx(1)
    assert np.isnan(agreement(by_hand({"a": grouped}), by_hand({"b": grouped})))


def test_plans_that_remove_different_experts_do_not_agree():
    one = LayerPlan(4, (Group(0, (0,), (1.0,)), Group(1, (1,), (1.0,))), removed=(2, 3))
    other = LayerPlan(4, (Group(2, (2,), (1.0,)), Group(3, (3,), (1.0,))), removed=(0, 1))
    assert agreement(by_hand({"a": one}), by_hand({"a": one})) == 1
    assert agreement(by_hand({"a": one}), by_hand({"a": other})) < 0.1


def test_several_plans_are_compared_with_the_first():
    first = by_hand({"a": layer_plan(4, [0, 1], [2, 3])}, predicted={"num_parameters": 1, "bytes": 30})
    second = by_hand({"a": layer_plan(4, [0, 1, 2, 3])})
    frame = comparison_frame([LabelledPlan("one", first), LabelledPlan("two", second)])
    assert frame.plan.tolist() == ["one", "two"]
    assert frame.kept.tolist() == [2, 1]
    assert frame.bytes.iloc[0] == 30
    assert np.isnan(frame.bytes.iloc[1])
    assert frame.agreement.tolist() == [1, 0]


def test_kept_layers_are_told_apart_and_keep_all_of_theirs(exact, switch):
    artefacts = gather([switch, exact])
    frame = budget_frame(artefacts, artefacts.plan.plan).set_index("layer")
    assert frame.index.tolist() == list(LAYERS)
    assert frame.what.tolist() == ["kept as it is", "compressed", "compressed", "compressed"]
    assert frame.kept[LAYERS[0]] == frame.experts[LAYERS[0]] == 6
    assert frame.kept[LAYERS[1]] == len(artefacts.plan.plan.layers[LAYERS[1]].groups)


def test_a_plan_alone_makes_a_chapter(exact):
    section = chapter.section(gather([exact / "plan.json"]), silent)
    layers = table(section, "plan-layers")
    assert layers.frame.what.iloc[0] == "kept as it is"
    assert np.isnan(layers.frame.experts.iloc[0])  # a plan knows only its name
    assert "msmoe profile" in blocks(section, Note)[0].text
    assert any(fact.label == "Bytes" and "predicted" in fact.hint for fact in blocks(section, Facts)[0].facts)
    render(section)


def test_the_plan_inside_of_a_checkpoint_stands_beside_the_original(switch, stats, exact):
    section = chapter.section(gather([switch, stats, exact]), silent)
    facts = {fact.label: fact for fact in blocks(section, Facts)[0].facts}
    predicted = json.loads((exact / "plan.json").read_text())["predicted"]
    source = gather([switch]).original.summary
    assert facts["Parameters"].value == f"{predicted['num_parameters']:,}"
    assert f"{predicted['bytes'] / source.num_bytes:.1%} of the original" in facts["Bytes"].hint
    render(section)


def test_there_is_no_chapter_without_a_plan(stats):
    assert chapter.section(gather([stats]), silent) is None


@pytest.mark.parametrize("kept", [[], ["encoder.block.1.layer.1.mlp"]])
def test_a_plan_of_no_layer_says_so(switch, kept):
    section = chapter.section(gather([plan_for(Checkpoint(switch), {}, keep_layers=kept)]), silent)
    assert "changes no layer" in section.lead
    render(section)


def test_notes_of_the_method_stand_in_the_table_of_layers(switch):
    plan = plan_for(Checkpoint(switch), {LAYERS[1]: layer_plan(6, [0, 1, 2, 3, 4, 5])})
    section = chapter.section(gather([replace(plan, notes={LAYERS[1]: "beam search"})]), silent)
    assert table(section, "plan-layers").frame.note.tolist() == ["beam search"]


def test_hostile_names_are_data_only(switch):
    plan = plan_for(
        Checkpoint(switch), {HOSTILE: layer_plan(4, [0, 1], [2, 3]), f"{HOSTILE}z": layer_plan(4, [0, 1, 2, 3])}
    )
    plan = replace(plan, method=HOSTILE, parameters=Parameters(keep_layers=(HOSTILE,), others=HOSTILE))
    section = chapter.section(gather([plan]), silent)
    spec = to_spec(blocks(section, Figure)[0].chart)
    assert "onload" not in json.dumps({key: value for key, value in spec.items() if key not in ("datasets", "params")})
    assert len(section.lead) < 400
    render(section)
