"""Ranks and rows chosen by a fixed rank, by energy or by a budget, and options that cannot be."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import LAYERS, load_tensors

from msmoe.compression.factorize import factorize
from msmoe.errors import UserError
from msmoe.families import MoELayer
from msmoe.lowrank.choose import check_budget, check_rank, energy_rank, expert_bytes, fixed_shapes
from msmoe.lowrank.decompose import decompose
from msmoe.lowrank.options import FactorOptions
from msmoe.lowrank.shapes import FactorShape

LAYER = MoELayer("encoder.block.1.layer.1.mlp", 6, 16, 24, {"wi": "F32", "output": "F32"})


class Source:
    """Stands for a checkpoint of a size."""

    path, num_bytes = Path("ckpt"), 200_000


@pytest.mark.parametrize(
    ("keep_rows", "num_rows"),
    [(0.0, {"wi": 0, "wo": 0}), (0.1, {"wi": 2, "wo": 2}), (0.3, {"wi": 7, "wo": 5})],  # of 24 and of 16
)
def test_a_fixed_rank_keeps_a_rounded_share_of_the_rows(keep_rows, num_rows):
    shapes = fixed_shapes(FactorOptions(rank=3, keep_rows=keep_rows), [(LAYER, 4)])
    assert shapes == {LAYER.name: {matrix: FactorShape(3, count) for matrix, count in num_rows.items()}}


def test_a_matrix_whose_factors_would_be_larger_has_no_shape():
    # rank 9 takes 9 (24 + 16) = 360 of 384 values; one row of wi adds 16 and an index, one of wo 24
    shapes = fixed_shapes(FactorOptions(rank=9, keep_rows=0.05), [(LAYER, 4)])
    assert shapes == {LAYER.name: {"wi": FactorShape(9, 1)}}


def test_the_energy_rank_counts_the_experts_of_a_stack_together():
    # energies 9, 4, 1 and 16, 0, 0: rank 1 holds 25 of 30, rank 2 holds 29
    weights = torch.stack([torch.diag(torch.tensor(v)) for v in ([3.0, 2.0, 1.0], [4.0, 0.0, 0.0])])
    decomposition = decompose(weights)
    assert [energy_rank(decomposition, share) for share in (0.5, 25 / 30, 0.84, 29 / 30, 0.97, 1.0)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_a_stack_of_zeros_holds_all_its_energy_at_rank_one():
    assert energy_rank(decompose(torch.zeros(2, 4, 4)), 1.0) == 1


def test_expert_bytes_are_those_of_both_matrices_of_every_stored_expert():
    half = replace(LAYER, dtypes={"wi": "BF16", "output": "BF16"})
    assert expert_bytes([(LAYER, 3), (half, 2)]) == 3 * 2 * 384 * 4 + 2 * 2 * 384 * 2


def test_a_budget_of_the_smallest_model_is_accepted_and_one_byte_less_is_refused_with_the_number():
    # rank 1 without rows: 24 + 16 = 40 values of four bytes in each of 2 x 3 matrices, 1,000 bytes of other things
    smallest = 1000 + 3 * 2 * 40 * 4
    check = lambda size: check_budget(
        FactorOptions(target_bytes=size), [(LAYER, 3)], others=1000, source=Source()
    )  # fmt: skip
    assert check(smallest) == smallest
    with pytest.raises(UserError, match=r"budget of 1,959 bytes .* smallest possible model: 1,960 bytes \(0.010 of"):
        check(smallest - 1)


def test_a_target_ratio_is_of_the_source():
    assert check_budget(FactorOptions(target_ratio=0.25), [(LAYER, 3)], others=0, source=Source()) == 50_000


def test_a_rank_beyond_the_matrices_is_refused_with_the_range():
    check_rank(FactorOptions(rank=16), [(LAYER, 4)])
    with pytest.raises(UserError, match=rf"between 1 and 16: the experts of {LAYER.name} are 24 x 16; got 17"):
        check_rank(FactorOptions(rank=17), [(LAYER, 4)])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"rank": -3}, "--rank must be at least 1, got -3"),
        ({"rank": 4, "keep_rows": 1.1}, "--keep-rows must be between 0 and 1, got 1.1"),
        ({"rank": 4, "keep_rows": -0.1}, "--keep-rows must be between 0 and 1, got -0.1"),
        ({"rank": 4, "keep_rows": float("nan")}, "--keep-rows must be between 0 and 1, got nan"),
        ({"energy": 0.0}, "--energy must be above 0 and at most 1, got 0"),
        ({"energy": 1.01}, "--energy must be above 0 and at most 1, got 1.01"),
        ({"target_ratio": 0.0}, "--target-ratio must be above 0 and at most 1, got 0"),
        ({"target_ratio": 2}, "--target-ratio must be above 0 and at most 1, got 2"),
        ({"rank": 4, "energy": 0.9}, "give one of --rank, --energy, not 2"),
        ({"target_bytes": 9, "target_ratio": 0.9, "rank": 1}, "give one of --rank, --target-bytes, --target-ratio"),
        ({"svd": "whitened"}, "unknown --svd 'whitened'; choose one of activation, plain"),
        ({"row_score": "norm"}, "unknown --row-score 'norm'; choose one of activation, magnitude"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(options, complaint):
    with pytest.raises(UserError, match=complaint):
        FactorOptions(**options).resolve(has_stats=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"svd": "activation"}, "--svd activation"),
        ({"target_ratio": 0.5}, "--target-ratio"),
        ({"target_bytes": 10**6}, "--target-bytes"),
        ({"refit": True}, "--refit"),
    ],
)
def test_what_needs_statistics_is_refused_without_them(options, name):
    with pytest.raises(UserError, match=f"{name} needs --stats"):
        FactorOptions(**options).resolve(has_stats=False)


def test_without_statistics_the_published_form_is_the_default():
    options = FactorOptions().resolve(has_stats=False)
    assert (options.rank, options.keep_rows, options.svd, options.refit) == (32, 0.1, "plain", False)


def test_with_statistics_errors_are_weighted_and_wo_is_solved_again():
    options = FactorOptions(rank=4).resolve(has_stats=True)
    assert (options.rank, options.svd, options.refit) == (4, "activation", True)


def test_an_energy_or_a_budget_takes_the_place_of_the_default_rank():
    assert FactorOptions(energy=0.9).resolve(has_stats=False).rank is None
    assert FactorOptions(target_ratio=0.5).resolve(has_stats=True).rank is None


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.8])
def test_an_energy_takes_the_smallest_rank_of_each_layer_that_holds_it(energy, switch, tmp_path):
    report = factorize(switch, tmp_path / "out", energy=energy, keep_rows=0.0, keep_layers=["none"])
    tensors = load_tensors(switch)
    for layer in LAYERS:
        for matrix in ("wi", "wo"):
            stack = torch.stack([tensors[f"{layer}.experts.expert_{e}.{matrix}.weight"] for e in range(6)])
            squares = torch.linalg.svdvals(stack.double()).square().sum(0)
            held = squares.cumsum(0) / squares.sum()
            assert report.shapes[layer][matrix] == FactorShape(int((held < energy).sum()) + 1, 0)


def test_an_energy_that_no_smaller_rank_holds_leaves_the_matrices_dense(switch, tmp_path):
    report = factorize(switch, tmp_path / "out", energy=1.0, keep_rows=0.0)
    # rank 9 is the largest that saves, and holds less than all the energy of a random matrix
    assert report.shapes == {name: {} for name in LAYERS[1:]}


@pytest.mark.parametrize("ratio", [0.66, 0.7, 0.8, 0.95])
def test_a_target_ratio_is_never_exceeded(ratio, switch, stats, tmp_path):
    report = factorize(switch, tmp_path / "out", stats=stats, target_ratio=ratio)
    written = sum(t.numel() * t.element_size() for t in load_tensors(tmp_path / "out").values())
    before = sum(t.numel() * t.element_size() for t in load_tensors(switch).values())
    assert written == report.num_bytes <= ratio * before
    assert written > (ratio - 0.02) * before  # and most of it is used


def test_a_target_in_bytes_is_never_exceeded(exact, stats, tmp_path):
    report = factorize(exact, tmp_path / "out", stats=stats, target_bytes=100_000)
    assert report.num_bytes <= 100_000
    assert report.num_bytes == sum(t.numel() * t.element_size() for t in load_tensors(tmp_path / "out").values())


def test_a_budget_for_everything_leaves_every_matrix_dense(switch, stats, tmp_path):
    maps = len(LAYERS) * 6 * 8
    before = sum(t.numel() * t.element_size() for t in load_tensors(switch).values())
    report = factorize(switch, tmp_path / "out", stats=stats, target_bytes=before + maps)
    assert report.num_bytes == before + maps
    assert report.predicted_error == 0


def test_the_smallest_budget_gives_rank_one_without_rows_everywhere(switch, stats, tmp_path):
    source = sum(t.numel() * t.element_size() for t in load_tensors(switch).values())
    # three layers of six experts: two matrices of 384 values become 40 values each; maps of four layers
    smallest = source - 3 * 6 * 2 * (384 - 40) * 4 + 4 * 6 * 8
    report = factorize(switch, tmp_path / "out", stats=stats, target_bytes=smallest)
    assert report.shapes == {name: {"wi": FactorShape(1, 0), "wo": FactorShape(1, 0)} for name in LAYERS[1:]}
    with pytest.raises(UserError, match=f"smallest possible model: {smallest:,} bytes"):
        factorize(switch, tmp_path / "less", stats=stats, target_bytes=smallest - 1)


def test_a_larger_budget_is_expected_to_lose_less(switch, stats, tmp_path):
    errors = [
        factorize(switch, tmp_path / str(ratio), stats=stats, target_ratio=ratio).predicted_error
        for ratio in (0.66, 0.7, 0.8, 0.9)
    ]
    assert all(a > b > 0 for a, b in pairwise(errors))
