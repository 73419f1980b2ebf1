"""The chapter on domains: which are found, how far apart they are, what chance alone gives, experts of one domain."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import vl_convert
from msmoe.analysis.report.artefacts import Artefacts, LabelledPlan, LabelledStats
from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Document, Figure, Note, Section, Table
from msmoe.analysis.report.page import to_html
from msmoe.analysis.report.sections.domains.chapter import section
from msmoe.analysis.report.sections.domains.charts import distance_frame, map_frame, similar_beside
from msmoe.analysis.report.sections.domains.usage import by_chance, find_domains, measure, shared_out
from scipy.spatial.distance import jensenshannon
from tiny import LAYERS, layer_plan

from msmoe.calibration.stats import Stats
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan

# Six experts. x and y share none of them but expert 0, which is x's to 95 / 96: 95 % of x's tokens, 1 % of y's.
COUNTS = {"x": [95, 5, 0, 0, 0, 0], "y": [10, 0, 490, 500, 0, 0]}
EVEN = {"x": [10, 10, 10, 10, 10, 10], "y": [20, 20, 20, 20, 20, 20]}


def made(stats: Stats, counts: Mapping[str, list[int]], *, named: bool = True, last=None, length: int = 5) -> Stats:
    """Statistics with these routed tokens in every layer (`last` in the last one), in sequences of `length` tokens."""
    layers = {}
    for name, layer in stats.layers.items():
        here = last if last and name == LAYERS[-1] else counts
        routed = {domain: torch.tensor(values) for domain, values in here.items()}
        tokens = [e for values in here.values() for e, count in enumerate(values) for _ in range(count)]
        sequences = [np.bincount(tokens[i : i + length], minlength=6) for i in range(0, len(tokens), length)]
        layers[name] = replace(
            layer,
            routed=torch.stack(list(routed.values())).sum(0),
            dispatched=torch.stack(list(routed.values())).sum(0),
            sequence_counts=torch.tensor(np.array(sequences), dtype=torch.int32),
            domain_routed=routed if named else {},
        )
    sizes = {domain: {"num_records": 7, "num_tokens": sum(values)} for domain, values in counts.items()}
    data = {key: value for key, value in stats.data.items() if key != "domains"}
    data |= {"num_records": 7 * len(sizes), "num_tokens": sum(size["num_tokens"] for size in sizes.values())}
    return Stats(layers, data | ({"domains": sizes} if named else {}), stats.checkpoint)


def artefacts_of(*stats: Stats, plan: Plan | None = None, labels=("a", "b", "c")) -> Artefacts:
    labelled = tuple(LabelledStats(label, item) for label, item in zip(labels, stats, strict=False))
    return Artefacts(None, labelled, (LabelledPlan("plan", plan),) if plan else (), (), (), ())


def chapter(*stats: Stats, **options) -> Section:
    found = section(artefacts_of(*stats, **options), lambda note: None)
    assert found is not None
    return found


def table(found: Section, name: str):
    return next(block.frame for block in found.blocks if isinstance(block, Table) and block.name == name)


def notes(found: Section) -> str:
    return " ".join(block.text for block in found.blocks if isinstance(block, Note))


def specs(found: Section) -> list[dict]:
    figures = [block for block in found.blocks if isinstance(block, Figure)]
    charts = [(figure.chart, "") for figure in figures] + [(f.still or f.chart, f.title) for f in figures]
    return [to_spec(chart, title=title) for chart, title in charts]


def plan_of(stats: Stats, layer: LayerPlan, **parameters) -> Plan:
    return Plan("by-hand", Parameters(**parameters), 0, stats.checkpoint, {}, {LAYERS[0]: layer})


# Which domains there are


def test_without_statistics_there_is_no_chapter():
    assert section(Artefacts(None, (), (), (), (), ()), lambda note: None) is None


def test_a_single_domain_is_a_note_on_how_to_get_several(stats):
    found = chapter(made(stats, {"x": COUNTS["x"]}))
    assert [type(block) for block in found.blocks] == [Note]
    assert all(way in notes(found) for way in ("`domain` field", "--data", "statistics directories"))


def test_domains_of_several_statistics_add_up_by_name(stats):
    found = find_domains(artefacts_of(made(stats, COUNTS), made(stats, {"y": COUNTS["y"], "z": COUNTS["x"]})).stats)
    assert dict(zip(found.names, found.num_records, strict=True)) == {"y": 14, "x": 7, "z": 7}
    assert found.routed[LAYERS[0]].tolist() == [[20, 0, 980, 1000, 0, 0], COUNTS["x"], COUNTS["x"]]


def test_statistics_without_domains_are_domains_by_their_labels_even_if_labels_are_the_same(stats):
    plain = [made(stats, {"": counts}, named=False) for counts in COUNTS.values()]
    found = find_domains(artefacts_of(*plain, labels=("same", "same")).stats)
    assert found.names == ["same", "same (2)"]
    assert found.routed[LAYERS[0]].tolist() == [COUNTS["y"], COUNTS["x"]]


def test_a_label_stands_beside_the_domains_inside_of_other_statistics(stats):
    found = find_domains(artefacts_of(made(stats, COUNTS), made(stats, {"": [1] * 6}, named=False)).stats)
    assert found.names == ["y", "x", "b"]


def test_statistics_of_one_and_the_same_domain_are_told_apart_by_their_labels(stats):
    found = find_domains(artefacts_of(*(made(stats, {"x": counts}) for counts in COUNTS.values())).stats)
    assert found.names == ["b", "a"]


# How far apart


def test_distances_are_those_of_scipy(stats):
    rng = np.random.default_rng(0)
    counts = {name: rng.integers(0, 30, 6).tolist() for name in "xyz"}
    domains = find_domains(artefacts_of(made(stats, counts)).stats)
    found = measure(domains)
    rows = domains.routed[LAYERS[0]]
    expected = [jensenshannon(rows[i], rows[j], base=2) ** 2 for i, j in zip(found.first, found.second, strict=True)]
    np.testing.assert_allclose(found.between[0], expected)
    np.testing.assert_allclose(found.to_all[0], [jensenshannon(row, rows.sum(0), base=2) ** 2 for row in rows])


def test_domains_without_a_common_expert_are_one_bit_apart(stats):
    found = chapter(made(stats, {"x": [30, 30, 0, 0, 0, 0], "y": [0, 0, 0, 5, 5, 50]}))
    assert found.lead.startswith("The two domains differ in their use of the experts by 1 bits")


def test_a_layer_without_tokens_of_a_domain_does_not_count_in_its_distances(stats):
    domains = find_domains(artefacts_of(made(stats, COUNTS, last={"x": COUNTS["x"], "y": [0] * 6})).stats)
    found = measure(domains)
    assert np.isnan(found.between[-1]).all()
    assert not np.isnan(found.between[:-1]).any()


def test_dealing_out_keeps_all_tokens_and_the_size_of_every_part():
    sequences = np.random.default_rng(1).multinomial(4, [0.5, 0.3, 0.2], size=500)
    sizes = np.array([1000, 600, 400])
    dealt = shared_out(sequences, sizes, 20, np.random.default_rng(0))
    assert (dealt.sum(1) == sequences.sum(0)).all()
    assert (np.abs(dealt.sum(2) - sizes) <= 4).all()


def test_sequences_are_dealt_out_whole():
    sequences = 3 * np.eye(8, dtype=int)
    dealt = shared_out(sequences, np.array([12, 12]), 10, np.random.default_rng(0))
    assert set(dealt.ravel().tolist()) == {0, 3}


def test_chance_is_what_theory_says_for_many_independent_tokens(stats):
    # n tokens in one part and m in the other, of the same distribution over E experts: shares of an expert differ with
    # variance p (1 - p) (1 / n + 1 / m); sum of (a - b)^2 / (8 p ln 2) is the divergence for small differences.
    counts = {"x": [600, 500, 400, 200, 200, 100], "y": [300, 250, 200, 100, 100, 50]}
    item = made(stats, counts, length=1)
    found = by_chance(find_domains(artefacts_of(item).stats), item)
    expected = 5 / (8 * np.log(2)) * (1 / 2000 + 1 / 1000)
    assert found.between.mean() == pytest.approx(expected, rel=0.15)


def test_longer_sequences_raise_the_level_by_chance(stats):
    # made() sorts tokens by expert, so a sequence is of one expert: 20 tokens tell as little as one.
    levels = []
    for length in (1, 20):
        item = made(stats, {"x": [200] * 6, "y": [200] * 6}, length=length)
        levels.append(by_chance(find_domains(artefacts_of(item).stats), item).between.mean())
    assert levels[1] > 10 * levels[0]


def test_the_level_by_chance_is_the_same_every_time(stats):
    item = made(stats, COUNTS)
    domains = find_domains(artefacts_of(item).stats)
    np.testing.assert_array_equal(by_chance(domains, item).between, by_chance(domains, item).between)


def test_the_furthest_pair_and_layer_stand_in_the_lead(stats):
    counts = {"near": [50, 50, 50, 50, 0, 0], "nearer": [50, 50, 50, 40, 0, 0], "far": [0, 0, 0, 9, 90, 90]}
    same = {name: [50] * 6 for name in counts}
    found = chapter(made(stats, same, last=counts))
    assert "beyond chance are nearer and far" in found.lead or "beyond chance are far and nearer" in found.lead
    assert "apart most, beyond chance, is decoder 3" in found.lead


def test_similar_domains_stand_beside_each_other(stats):
    counts = {"a": [90, 9, 1, 0, 0, 0], "b": [0, 0, 0, 1, 9, 90], "c": [91, 8, 1, 0, 0, 0], "d": [0, 0, 0, 2, 8, 90]}
    item = made(stats, counts)
    domains = find_domains(artefacts_of(item).stats)
    order = similar_beside(distance_frame(domains, measure(domains), by_chance(domains, item)))
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset("ac"), frozenset("bd")}


# Usage and sizes


def test_the_map_holds_shares_in_percent_of_the_domain_and_of_all_data(stats):
    domains = find_domains(artefacts_of(made(stats, COUNTS)).stats)  # y is larger: position 0
    first = map_frame(domains, [0, 1]).iloc[0]
    assert (first.d0, first.d1) == (1.0, 95.0)
    assert first["all"] == pytest.approx(100 * 105 / 1100, abs=0.005)


def test_the_table_has_sizes_and_the_effective_number_of_experts(stats):
    # x: 10 tokens of every one of 6 experts, and of 2 experts in the last of 4 layers: (3 * 6 + 2) / 4 effective ones,
    # 3 * 6 + 2 used ones. Tokens per expert: 60 / 6, and fewest 24 / 6.
    last = {"x": [12, 12, 0, 0, 0, 0], "y": [20] * 6}
    row = table(chapter(made(stats, EVEN, last=last)), "domains").set_index("domain").loc["x"]
    assert (row.num_records, row.num_tokens, row.used, row.num_experts) == (7, 60, 20, 24)
    assert row.effective_experts == 5
    assert row.tokens_per_expert == 4


def test_domains_of_few_tokens_are_named(stats):
    found = chapter(made(stats, {"x": [19] * 6, "y": [20] * 6}))
    assert "Fewer than 20 tokens per expert in at least one layer: x." in notes(found)
    assert table(found, "domains").set_index("domain").few.to_dict() == {"x": True, "y": False}


# Experts of one domain


def own(stats: Stats, counts: dict[str, list[int]], *, layer: int = 0, **options):
    frame = table(chapter(made(stats, counts), **options), "domains-own-experts")
    return frame[frame.name == LAYERS[layer]].set_index("expert")


def test_an_expert_of_one_domain_is_found_however_large_the_others_are(stats):
    # Expert 0: 95 % of x's 100 tokens, 1 % of y's 1,000: 0.95 / 0.96 of its use, 95 of its 105 tokens.
    row = own(stats, COUNTS).loc[0]
    assert (row.domain, row.tokens, row.layer) == ("x", 95, "encoder 1")
    assert row.usage == 0.95
    assert row.share == pytest.approx(0.95 / 0.96)
    assert row.token_share == pytest.approx(95 / 105)


def test_an_expert_of_fewer_than_ten_tokens_is_not_a_domain_s_own(stats):
    assert list(own(stats, COUNTS).index) == [0, 3, 2]  # expert 1: 5 tokens of x; the largest share of a domain first


def test_that_a_small_domain_is_absent_from_an_expert_says_nothing(stats):
    # Of y's 1,000 tokens 2 % go to expert 2: of x's 20 tokens, 0.4 would.
    counts = {"x": [20, 0, 0, 0, 0, 0], "y": [980, 0, 20, 0, 0, 0]}
    assert "No expert has 90% of its use from one domain" in notes(chapter(made(stats, counts)))


@pytest.mark.parametrize(
    ("layer", "parameters", "fate"),
    [
        (layer_plan(6, [1, 0], [2], [3], [4], [5]), {}, "merged into 1"),
        (layer_plan(6, [0, 1, 4], [2], [3], [5]), {}, "kept, 2 merged into it"),
        (layer_plan(6, [0], [1], [2], [3], [4, 5]), {}, "kept"),
        (LayerPlan(6, (Group(1, (0, 1), (0.0, 1.0)), Group(2, (2, 3, 4, 5), (1, 0, 0, 0)))), {}, "replaced by 1"),
        (LayerPlan(6, layer_plan(6, [1, 2, 3, 4, 5]).groups, (0,)), {}, "removed"),
        (
            LayerPlan(6, layer_plan(6, [1, 2, 3, 4, 5]).groups, (0,)),
            {"others": "mean-output"},
            "only its mean output kept",
        ),
    ],
)
def test_the_table_says_what_the_plan_does_to_an_expert(stats, layer, parameters, fate):
    assert own(stats, COUNTS, plan=plan_of(stats, layer, **parameters)).fate[0] == fate


def test_an_expert_of_a_layer_that_the_plan_leaves_alone_is_kept(stats):
    frame = table(
        chapter(made(stats, COUNTS), plan=plan_of(stats, LayerPlan.identity(6))), "domains-own-experts"
    ).set_index(["name", "expert"])
    assert frame.fate[LAYERS[1], 0] == "kept"


def test_without_a_plan_the_table_says_at_which_budget_an_expert_is_cut(stats):
    # Usage of all 1,100 tokens: experts 3 (500), 2 (490), 0 (105), 1 (5). The first layer is left alone by default.
    # Half of 6 keeps 3 in each of the others, as they are the same; a quarter 1.5 on average: 4 in all, a second one
    # in the first of them; an eighth 1.
    assert set(own(stats, COUNTS, layer=0).fate) == {"never"}
    assert own(stats, COUNTS, layer=1).fate.to_dict() == {0: "a quarter", 2: "an eighth", 3: "never"}


# Drawing


def test_every_chart_is_drawn_for_page_and_files(stats):
    drawn = [vl_convert.vegalite_to_svg(spec) for spec in specs(chapter(made(stats, COUNTS | {"third": [40] * 6})))]
    assert len(drawn) == 6
    assert all("encoder 1" in svg or "third" in svg for svg in drawn)


def test_two_domains_need_no_map_of_their_one_distance(stats):
    assert [block.name for block in chapter(made(stats, COUNTS)).blocks if isinstance(block, Figure)] == [
        "domains-usage",
        "domains-layers",
    ]


@pytest.mark.parametrize(
    "counts",
    [
        {"x": [1] * 6, "y": [0] * 6, "z": [0] * 6},
        {"x": [0] * 6, "y": [0] * 6, "z": [0] * 6},
        {"x": [5] * 6, "y": [5] * 6, "z": [5] * 6},
        {"x": [0, 0, 7, 0, 0, 0], "y": [0, 0, 0, 7, 0, 0], "z": [0] * 6},
    ],
    ids=["one without tokens", "no tokens", "the same", "one expert each"],
)
def test_degenerate_usage_is_drawn_without_a_warning(stats, counts, recwarn):
    item = made(stats, counts) if any(map(sum, counts.values())) else empty(made(stats, EVEN | {"z": [1] * 6}))
    drawn = [vl_convert.vegalite_to_svg(spec) for spec in specs(chapter(item))]
    assert not any("NaN" in svg for svg in drawn)
    assert not recwarn.list


def empty(stats: Stats) -> Stats:
    nothing = torch.zeros(6, dtype=torch.int64)
    layers = {
        name: replace(
            layer,
            routed=nothing,
            dispatched=nothing,
            sequence_counts=torch.zeros(0, 6, dtype=torch.int32),
            domain_routed={"x": nothing, "y": nothing, "z": nothing},
        )
        for name, layer in stats.layers.items()
    }
    return replace(stats, layers=layers)


def test_hostile_names_of_domains_are_data_only(stats):
    names = ("</script><script>alert(1)</script>", "'] || alert(1) || ['", "x" * 10_000, "x" * 9_999, "a\u202eb\n\x00")
    rng = np.random.default_rng(0)
    found = chapter(made(stats, {name: rng.integers(20, 90, 6).tolist() for name in names}))
    assert len(set(table(found, "domains").domain)) == len(names)
    page = to_html(Document("", "", (found,)))
    assert "</script><script>alert" not in page
    assert "\u202e" not in page
    assert "x" * 100 not in page.split('id="datasets"')[0].split("<main")[1]
    for spec in specs(found):
        vl_convert.vegalite_to_svg(spec)


def test_data_with_many_experts_and_domains_is_bounded(stats):
    rng = np.random.default_rng(0)
    found = chapter(made(stats, {f"domain {i}": rng.integers(0, 9, 6).tolist() for i in range(40)}, length=50))
    assert len(table(found, "domains")) == 40
    assert "the 24 largest of 40 domains" in found.lead
    figure = next(block for block in found.blocks if isinstance(block, Figure) and block.name == "domains-usage")
    assert "Of 40 domains, the 24 furthest from all data." in figure.reading
