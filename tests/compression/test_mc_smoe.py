"""Methods that merge and factorise: the same weights as both steps by hand, and sizes known beforehand."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny import LAYERS, compress, layer_plan, load_tensors, plan_for, size_of, weight_files

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.planning.methods import METHODS
from msmoe.planning.plan import Plan
from msmoe.planning.planner import check_request, plan

UNIFORM = {"budget": "uniform", "keep_layers": ["none"]}


@pytest.mark.parametrize("export", ["exact", "native"])
@pytest.mark.parametrize(("method", "merging", "refit"), [
    ("mc-smoe", "m-smoe", False), ("mc-smoe-refit", "m-smoe-refit", True),
])  # fmt: skip
def test_the_weights_are_those_of_merging_and_then_factorising(method, merging, refit, export, switch, stats, tmp_path):
    options = UNIFORM if export == "native" else {}
    common = {"export": export, "apply_options": {"router": "dominant"}} | options
    compress(switch, stats, tmp_path / "once", method=method, rank=4, **common)
    compress(switch, stats, tmp_path / "merged", method=merging, **common)
    factorize(
        tmp_path / "merged", tmp_path / "twice", stats=stats, rank=4, refit=refit, svd="activation", export=export,
        keep_layers=options.get("keep_layers"),
    )  # fmt: skip
    assert weight_files(tmp_path / "once") == weight_files(tmp_path / "twice")


def test_a_budget_is_spent_as_when_factorising_the_merged_checkpoint(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "once", method="mc-smoe", target_ratio=0.7)
    compress(switch, stats, tmp_path / "merged", method="m-smoe")
    budget = int(0.7 * size_of(switch))  # of the original's bytes
    factorize(tmp_path / "merged", tmp_path / "twice", stats=stats, target_bytes=budget, refit=False)
    assert weight_files(tmp_path / "once") == weight_files(tmp_path / "twice")
    assert size_of(tmp_path / "once") <= budget


def test_layers_that_the_plan_keeps_are_neither_merged_nor_factorised(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", method="mc-smoe", rank=4, keep_layers=[LAYERS[2]])
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    for e in range(6):
        for part in ("wi", "wo"):
            assert torch.equal(
                after[f"{LAYERS[2]}.experts.{part}"][e], before[f"{LAYERS[2]}.experts.expert_{e}.{part}.weight"]
            )
    assert all(f"{layer}.experts.wi.U" in after for layer in (LAYERS[0], LAYERS[1], LAYERS[3]))


def test_layers_that_are_taken_out_of_a_plan_are_copied(switch, stats, tmp_path):
    made = plan(switch, stats, method="mc-smoe", rank=4, experts=3)
    edited = replace(made, layers={LAYERS[1]: made.layers[LAYERS[1]]})
    report = apply(switch, edited, tmp_path / "out", stats=stats)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    assert list(report.factors.shapes) == [LAYERS[1]]
    for layer in (LAYERS[0], LAYERS[2], LAYERS[3]):
        for e in range(6):
            assert torch.equal(after[f"{layer}.experts.wi"][e], before[f"{layer}.experts.expert_{e}.wi.weight"])


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("mc-smoe")])
@pytest.mark.parametrize(("export", "options"), [
    ("exact", {"experts": 2.5, "rank": 4}), ("exact", {"rank": 9, "keep_rows": 0.05}), ("exact", {"rank": 3,
    "keep_rows": 0.0, "keep_layers": ["none"]}), ("native", {"rank": 4} | UNIFORM),
])  # fmt: skip
def test_predicted_bytes_and_parameters_are_exactly_those_written(method, export, options, switch, stats, tmp_path):
    how = {"export": export, "apply_options": {"router": "dominant"}}
    made = compress(switch, stats, tmp_path / "out", method=method, **how, **options)
    tensors = load_tensors(tmp_path / "out")
    indices = sum(t.numel() for name, t in tensors.items() if name.endswith((".expert_map", ".rows")))
    assert made.predicted == {
        "bytes": size_of(tmp_path / "out"),
        "num_parameters": sum(t.numel() for t in tensors.values()) - indices,
    }


@pytest.mark.parametrize("options", [{"energy": 0.6}, {"target_ratio": 0.7}, {"target_bytes": 95_000}])
def test_a_size_that_weights_decide_is_stated_once_they_are_known(options, switch, stats, tmp_path):
    made = compress(switch, stats, tmp_path / "out", method="mc-smoe", **options)
    assert made.predicted == {}
    assert Plan.load(tmp_path / "out" / "plan.json").predicted["bytes"] == size_of(tmp_path / "out")
    assert size_of(tmp_path / "out") <= options.get("target_bytes", 0.7 * size_of(switch))


def test_the_plan_in_the_output_is_the_one_that_was_applied(switch, stats, tmp_path):
    made = compress(switch, stats, tmp_path / "out", method="mc-smoe", rank=4)
    assert Plan.load(tmp_path / "out" / "plan.json") == made


def test_the_plan_of_the_output_gives_the_same_weights_again(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", method="mc-smoe-refit", target_ratio=0.7)
    apply(switch, tmp_path / "out" / "plan.json", tmp_path / "again", stats=stats)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "again")


def test_only_the_output_is_left(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", method="mc-smoe", target_ratio=0.7)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_report_tells_of_merging_and_of_factorising(switch, stats, tmp_path):
    made = plan(switch, stats, method="mc-smoe-refit", rank=4, experts=3)
    report = apply(switch, made, tmp_path / "out", stats=stats)
    merged = sum(len(g.members) > 1 for layer in made.layers.values() for g in layer.groups)
    assert len(report.groups) == merged
    assert (report.num_bytes, report.num_parameters) == (made.predicted["bytes"], made.predicted["num_parameters"])
    assert len(report.factors.matrices) == 2 * 9  # three experts on average in three layers
    assert all(entry["stable_rank_before"] > 0 for entry in report.factors.matrices)
    provenance = json.loads((tmp_path / "out" / "msmoe.json").read_text())
    assert provenance["groups"] == report.groups
    assert provenance["factors"]["matrices"] == report.factors.matrices


def test_a_published_method_has_the_published_rank_and_share_of_rows():
    defaults = METHODS["mc-smoe"].defaults
    assert (defaults.rank, defaults.keep_rows, defaults.refit) == (32, 0.1, "none")


def test_another_size_takes_the_place_of_the_methods_rank(switch, stats):
    made = plan(switch, stats, method="mc-smoe", energy=0.8, experts=3)
    assert (made.parameters.rank, made.parameters.energy) == (None, 0.8)


def test_any_merging_method_can_be_followed_by_a_rank(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out", method="average", rank=4)
    assert f"{LAYERS[1]}.experts.wi.U" in load_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 17}, rf"--rank must be between 1 and 16: the experts of {LAYERS[1]} are 24 x 16; got 17"),
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"keep_rows": 2}, "--keep-rows must be between 0 and 1, got 2"),
        ({"energy": 0.0}, "--energy must be above 0 and at most 1, got 0"),
        ({"target_ratio": 1.2}, "--target-ratio must be above 0 and at most 1, got 1.2"),
        ({"rank": 4, "energy": 0.5}, "give one of --rank, --energy, not 2"),
        ({"svd": "exact"}, "unknown .*svd 'exact'.* of:? activation, plain"),
        ({"export": "dense"}, "--export dense cannot"),
        ({"export": "native", "target_ratio": 0.5} | UNIFORM, "--export native .* give --rank|choose exact"),
        ({"method": "m-smoe", "keep_rows": 0.2}, "--keep-rows has no effect with method m-smoe: give --rank"),
        ({"method": "average", "svd": "plain"}, "--svd has no effect with method average"),
        ({"method": "m-smoe-refit", "row_score": "magnitude"}, "--row-score has no effect with method m-smoe-refit"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(options, complaint, switch, stats):
    with pytest.raises(UserError, match=complaint):
        plan(switch, stats, **{"method": "mc-smoe", "experts": 3} | options)


def test_a_budget_below_the_smallest_model_is_refused_with_its_size(switch, stats):
    # all but nine stored experts of three layers go, whose matrices can become 40 values; maps of four layers
    smallest = size_of(switch) - 3 * 6 * 2 * 384 * 4 + 9 * 2 * 40 * 4 + 4 * 6 * 8
    with pytest.raises(UserError, match=f"budget of 1,000 bytes is below the smallest possible model: {smallest:,}"):
        plan(switch, stats, method="mc-smoe", experts=3, target_bytes=1000)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 17}, "--rank must be between 1 and 16"),
        ({"export": "dense"}, "--export dense cannot"),
        ({"target_ratio": 0.5, "export": "native"} | UNIFORM, "--export native cannot"),
        ({"target_ratio": 0.1}, "budget of 14,323 bytes is below the smallest possible model"),
    ],
)
def test_what_is_wrong_whatever_calibration_sees_is_refused_before_it(options, complaint, switch):
    source = Checkpoint(switch)
    request = {"method": "mc-smoe", "export": "exact", "router": "fit", "keep_layers": None, "experts": 3} | options
    with pytest.raises(UserError, match=complaint):
        check_request(family_of(source), source, **request)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", "four"), ("rank", 4.5), ("keep_rows", [0.1]), ("target_bytes", "9MB")]
)
def test_a_plan_edited_to_something_that_is_no_size_is_refused_by_name(name, value, switch, stats, tmp_path):
    made = plan(switch, stats, method="mc-smoe", rank=4, experts=3)
    edited = replace(made, parameters=replace(made.parameters, **{"rank": None, name: value}))
    with pytest.raises(UserError, match=f"{name}.*{re.escape(str(value))}"):
        apply(switch, edited, tmp_path / "out", stats=stats)


def test_applying_without_statistics_is_refused(switch, stats, tmp_path):
    made = plan(switch, stats, method="mc-smoe", rank=4, experts=3)
    with pytest.raises(UserError, match="this plan needs --stats"):
        apply(switch, made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_dense_export_is_refused_where_factors_are_planned(switch, stats, tmp_path):
    made = plan(switch, stats, method="mc-smoe", rank=4, experts=3)
    with pytest.raises(UserError, match="--export dense cannot"):
        apply(switch, made, tmp_path / "out", stats=stats, export="dense")


def test_an_existing_folder_is_not_touched_without_force(switch, stats, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(UserError, match="out exists; use --force"):
        apply(switch, plan(switch, stats, method="mc-smoe", rank=4, experts=3), tmp_path / "out", stats=stats)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_failing_run_leaves_nothing(switch, stats, tmp_path):
    def fail(done, total):
        if total == 3:  # layers being factorised; groups were counted before
            raise RuntimeError("stop")

    made = plan(switch, stats, method="mc-smoe", energy=0.7, experts=3)
    with pytest.raises(RuntimeError, match="stop"):
        apply(switch, made, tmp_path / "out", stats=stats, progress=fail)
    assert not list(tmp_path.iterdir())


def test_a_plan_by_hand_names_the_experts_that_are_factorised(switch, stats, tmp_path):
    groups = layer_plan(6, [0, 1, 2], [3, 4, 5])
    made = plan_for(Checkpoint(switch), {LAYERS[3]: groups}, rank=4, keep_rows=0.1)
    report = apply(switch, made, tmp_path / "out", stats=stats)
    assert report.factors.shapes == {LAYERS[3]: {"wi": (4, 2), "wo": (4, 2)}}
    assert load_tensors(tmp_path / "out")[f"{LAYERS[3]}.experts.wi.U"].shape == (2, 24, 4)
