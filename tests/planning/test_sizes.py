"""Sizes as people say them: shares of the experts and bytes of the output, against what is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import compress, profile_small, size_of

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.planning.plan import Plan
from msmoe.planning.planner import check_request
from msmoe.planning.planner import plan as make_plan
from msmoe.planning.sizes import bytes_of
from msmoe.units import parse_bytes, parse_share

EXPERT = 2 * 16 * 24 * 4  # bytes of wi and wo of one expert of `switch`, float32
NUM_LAYERS = 3  # that may be compressed: the first of four is kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5_000_000_000),
        ("1.5 MB", 1_500_000),
        ("2KiB", 2048),
        ("1000", 1000),
        ("500,000B", 500_000),
        ("3kb", 3000),
    ],
)
def test_bytes_are_read_in_decimal_and_binary_units(text, expected):
    assert parse_bytes(text, "--target-size") == expected


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "0", "5XB", "1e400", "nan", "five"])
def test_what_is_no_size_is_refused_with_its_option(text):
    with pytest.raises(UserError, match="--target-size must look like 5GB or 200MB, got"):
        parse_bytes(text, "--target-size")


@pytest.mark.parametrize("text", ["0%", "101%", "-1%", "nan%", "%", "half"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UserError, match="must be above 0% and at most 100%"):
        parse_share(text, "--experts")


def test_a_target_is_a_share_of_the_input_or_bytes():
    assert [bytes_of(target, 1000) for target in ("50%", "2KB", 300)] == [500, 2000, 300]
    for wrong in (True, 2.5, 0, None):
        with pytest.raises(UserError, match="--target-size must look like 500MB or 50%"):
            bytes_of(wrong, 1000)


@pytest.mark.parametrize(
    ("share", "budget", "total"), [("50%", "adaptive", 9), ("25%", "adaptive", 4), ("45%", "uniform", 6)]
)
def test_a_share_of_the_experts_is_kept(share, budget, total, switch, stats):
    plan = make_plan(switch, stats, experts=share, budget=budget)
    # of 3 layers x 6 experts: 9; 4.5, rounded to even; 2.7 each, rounded down to 2
    assert sum(len(layer.groups) for layer in plan.layers.values()) == total


@pytest.mark.parametrize("method", ["m-smoe-refit", "m-smoe", "reap", "mone", "hc-smoe"])
def test_the_largest_number_of_experts_whose_written_bytes_fit_is_kept(method, switch, stats, tmp_path):
    source = Checkpoint(switch).num_bytes
    plan = make_plan(switch, stats, method=method, target_size="70%")
    assert plan.parameters.target_size == int(0.7 * source)
    written = apply(switch, plan, tmp_path / "out", stats=stats, workers=1)
    uniform = NUM_LAYERS if plan.parameters.budget == "uniform" else 1
    assert size_of(tmp_path / "out") == written.num_bytes == plan.predicted["bytes"]
    assert plan.predicted["bytes"] <= 0.7 * source < plan.predicted["bytes"] + uniform * EXPERT


def test_a_method_that_factorises_gets_the_largest_rank_that_fits(switch, stats, tmp_path):
    limit = 100_000
    plan = make_plan(switch, stats, method="mc-smoe", experts=3, target_size=limit)
    rank = plan.parameters.rank
    more = make_plan(switch, stats, method="mc-smoe", experts=3, rank=rank + 1)
    assert plan.predicted["bytes"] <= limit < more.predicted["bytes"]
    apply(switch, plan, tmp_path / "out", stats=stats, workers=1)
    assert size_of(tmp_path / "out") == plan.predicted["bytes"]


@pytest.mark.parametrize("options", [{}, {"budget": "uniform"}, {"method": "mc-smoe", "experts": 3}])
def test_an_impossible_target_is_refused_with_the_smallest_size_that_can_be_had(options, switch, stats):
    with pytest.raises(UserError, match=r"below the smallest output .*: ([\d,]+) bytes") as refused:
        make_plan(switch, stats, target_size="1KB", **options)
    smallest = int(str(refused.value).partition("options: ")[2].partition(" bytes")[0].replace(",", ""))
    assert make_plan(switch, stats, target_size=smallest, **options).predicted["bytes"] == smallest
    with pytest.raises(UserError, match="below the smallest output"):
        make_plan(switch, stats, target_size=smallest - 1, **options)


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({"experts": 3}, "one of --target-size and --experts"),
        ({"rank": 3}, "one of --target-size and --rank"),
        ({"target_bytes": 10**6}, "one of --target-size and --target-bytes"),
        ({"method": "dense"}, "no effect with method dense"),
    ],
)
def test_a_target_beside_another_size_is_refused(choices, complaint, switch, stats):
    with pytest.raises(UserError, match=complaint):
        make_plan(switch, stats, target_size="70%", **choices)


@pytest.mark.parametrize("experts", ["many", True, float("nan"), "nan", "0%", 0, 7, [3]])
def test_a_number_of_experts_that_cannot_be_is_refused(experts, switch, stats):
    with pytest.raises(UserError, match="--experts must be"):
        make_plan(switch, stats, experts=experts)


def test_an_impossible_target_is_refused_before_calibration(switch):
    source = Checkpoint(switch)
    with pytest.raises(UserError, match="below the smallest output"):
        check_request(
            family_of(source),
            source,
            method="m-smoe",
            export="exact",
            router="fit",
            keep_layers=None,
            target_size="1KB",
        )


def test_a_printed_plan_says_what_was_chosen_and_what_kept_layers_cost(switch, stats, tmp_path):
    made = make_plan(switch, stats, target_size="70%")
    made.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == made
    text = str(plan)
    assert "kept as it is: encoder.block.1.layer.1.mlp, its experts take 18,432 bytes" in text  # 6 experts
    assert f"the most that fits into {plan.parameters.target_size:,} bytes: " in text
    assert f"{plan.predicted['bytes']:,} bytes" in text


def test_a_plan_that_keeps_no_layer_as_it_is_says_nothing_of_kept_layers(switch, stats):
    assert "kept as it is" not in str(make_plan(switch, stats, experts=3, keep_layers=["none"]))


@pytest.mark.parametrize("share", ["80%", "66%"])
def test_a_target_holds_for_experts_of_several_dtypes_that_are_not_stacked(share, copied, data, tmp_path):
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    tensors = load_file(copied / "model.safetensors")
    for name in tensors:
        chosen = dtypes[int(name.split("expert_")[1][0]) % 3] if "expert_" in name else torch.bfloat16
        tensors[name] = tensors[name].to(chosen)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    source, stats = Checkpoint(copied).num_bytes, profile_small(copied, data)
    compress(copied, stats, tmp_path / "out", experts=None, export="native", method="m-smoe", target_size=share)
    assert size_of(tmp_path / "out") <= float(share[:-1]) / 100 * source
