"""Routers that choose among groups of experts first: plans keep the same number in each group, or are refused."""

import json

import pytest
from click.testing import CliRunner
from tiny_decoder import VOCAB, byte_tokenizer
from tiny_decoders import build

from msmoe import apply, load, plan, profile
from msmoe.checkpoint.reader import Checkpoint
from msmoe.cli import app
from msmoe.errors import UserError
from msmoe.families.generic import GENERIC

POSSIBLE = r"choose one of 4, 6, 8 \(each token goes to 2, the router has 2 groups, equally large, of at least 2"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """Tiny DeepSeek-V3 whose router takes one of two groups of four experts, and its statistics."""
    path = tmp_path_factory.mktemp("deepseek") / "in"
    build("deepseek_v3", vocab_size=VOCAB, n_group=2, topk_group=1).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path, profile(path, [f"text {i} of {i * i} words" for i in range(24)])


def kept_per_group(made):
    """Of each layer, how many dominant experts lie in each of the two groups of four."""
    found = [[group.dominant // 4 for group in layer.groups] for layer in made.layers.values()]
    return [(groups.count(0), groups.count(1)) for groups in found]


@pytest.mark.parametrize("choices", [
    {"method": "frequency"}, {"method": "m-smoe"}, {"method": "m-smoe-refit"},
    {"method": "frequency", "export": "exact", "budget": "uniform"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("experts", [4, 6])
@pytest.mark.filterwarnings("ignore:6 experts cannot be shared")
def test_every_group_keeps_as_many_experts_and_the_output_routes_among_them(deepseek, choices, experts, tmp_path):
    path, stats = deepseek
    made = plan(path, stats, experts=experts, **choices)
    assert kept_per_group(made) == [(experts // 2, experts // 2)] * 2
    apply(path, made, tmp_path / "out", stats=stats, export=choices.get("export"))
    chosen = []
    model = load(tmp_path / "out")
    with GENERIC.listen(model, lambda layer, routed: chosen.append(routed.experts)):
        model(**byte_tokenizer()("some other text", return_tensors="pt"), use_cache=False)
    assert [int(e.max()) < experts for e in chosen] == [True, True]
    size = experts // 2
    assert all(bool((e[:, 0] // size == e[:, 1] // size).all()) for e in chosen)  # both in the one group chosen


def test_members_of_a_merged_expert_are_of_one_group(deepseek):
    path, stats = deepseek
    made = plan(path, stats, experts=4, method="m-smoe")
    assert all(len({m // 4 for m in g.members}) == 1 for layer in made.layers.values() for g in layer.groups)


def test_an_impossible_number_is_refused_before_calibration_with_those_that_are_possible(deepseek, tmp_path):
    path, _ = deepseek
    arguments = [
        "compress",
        str(path),
        "--data",
        "no-such-file.jsonl",
        "--out",
        str(tmp_path / "out"),
        "--experts",
        "5",
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    result.exception.args[0].index("deepseek_v3 cannot hold 5 experts in each layer: choose one of 4, 6, 8")
    with pytest.raises(UserError, match="cannot hold 5 experts in each layer: " + POSSIBLE):
        plan(path, deepseek[1], experts=5)


def test_an_exact_export_that_loses_router_rows_is_held_to_the_same_numbers(deepseek):
    path, stats = deepseek
    with pytest.raises(UserError, match="cannot hold 5 experts in each layer: " + POSSIBLE):
        plan(path, stats, experts=5, method="frequency", export="exact", budget="uniform")
    with pytest.raises(
        UserError, match="routers of 2 groups keep the same number of experts in each, which --budget ad"
    ):
        plan(path, stats, experts=4, method="frequency", export="exact", budget="adaptive")
    assert [len(n.groups) for n in plan(path, stats, experts=5, method="m-smoe", export="exact").layers.values()]


def test_numbers_are_rounded_up_to_a_multiple_that_devices_can_share(deepseek):
    path, stats = deepseek
    made = plan(path, stats, experts=3, round_to=4, method="frequency")
    assert kept_per_group(made) == [(2, 2), (2, 2)]


@pytest.mark.parametrize(("round_to", "experts"), [(1, 6), (4, 4)])
@pytest.mark.filterwarnings("ignore:6 experts cannot be shared")
def test_a_target_size_takes_the_most_experts_that_the_router_can_hold(deepseek, round_to, experts):
    path, stats = deepseek
    source = Checkpoint(path)
    sizes = {n: plan(path, stats, experts=n, method="frequency").predicted["bytes"] for n in (4, 6)}
    made = plan(path, stats, target_size=sizes[6] + 100, round_to=round_to, method="frequency")
    assert kept_per_group(made) == [(experts // 2, experts // 2)] * 2
    assert made.predicted["bytes"] == sizes[experts] < source.num_bytes
    with pytest.raises(UserError, match=f"below the smallest output of method frequency .*: {sizes[4]:,} bytes"):
        plan(path, stats, target_size=sizes[4] - 1, method="frequency")


def test_an_output_says_its_number_of_experts_where_the_family_reads_it(deepseek, tmp_path):
    path, stats = deepseek
    apply(path, plan(path, stats, experts=4, method="frequency"), tmp_path / "out", stats=stats)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_routed_experts"], config["n_group"]) == (4, 2)
