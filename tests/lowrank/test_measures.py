"""Stable ranks against the SVD, and what the report of a factorised matrix says."""

import json

import pytest
import torch
from tiny import LAYERS, load_tensors, stored_stack

from msmoe.compression.factorize import factorize, measure_ranks
from msmoe.lowrank.measures import stable_rank


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_svd(weight: torch.Tensor) -> float:
    squares = torch.linalg.svdvals(weight.double()).square()
    return float(squares.sum() / squares[0])


@pytest.mark.parametrize("shape", [(1, 5), (16, 24), (64, 200), (65, 80), (200, 70), (96, 96)])
def test_the_stable_rank_is_that_of_the_singular_values(shape):
    weight = normal(*shape)
    assert stable_rank(weight) == pytest.approx(by_svd(weight), rel=1e-5)


@pytest.mark.parametrize("size", [10, 100])
def test_the_stable_rank_of_known_matrices(size):
    identity = torch.eye(size)
    assert stable_rank(identity) == pytest.approx(size)
    assert stable_rank(torch.outer(normal(size), normal(size, seed=1))) == pytest.approx(1)
    identity[0, 0] = 3  # squares 9, 1, 1, ...
    assert stable_rank(identity) == pytest.approx((size + 8) / 9)


@pytest.mark.parametrize("size", [10, 100])
def test_the_stable_rank_of_zeros_is_zero(size):
    assert stable_rank(torch.zeros(size, size)) == 0


@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e4])
def test_the_stable_rank_does_not_depend_on_the_scale(size, scale):
    weight = normal(size, size + 5)
    assert stable_rank(scale * weight) == pytest.approx(by_svd(weight), rel=1e-5)


def test_the_largest_singular_values_may_lie_close_together():
    q, _ = torch.linalg.qr(normal(120, 120))
    values = torch.cat([torch.tensor([1.0, 0.99999, 0.9999]), torch.full((117,), 0.5)])
    assert stable_rank(q * values @ q.T) == pytest.approx(float(values.square().sum()), rel=1e-4)


@pytest.fixture(scope="module")
def factorised(switch, exact, stats, tmp_path_factory):
    """Report and folder of `exact` at rank 4, plain on its statistics, with stable ranks from before merging."""
    out = tmp_path_factory.mktemp("measured") / "out"
    options = {"svd": "plain", "refit": False, "rank": 4, "keep_rows": 0.2}
    return factorize(exact, out, stats=stats, original=switch, **options), out


def entries(report):
    """Every entry of a report, with the stored matrix before and after."""
    return [(m["layer"], m["expert"], m["matrix"], m) for m in report.matrices]


def test_there_is_an_entry_for_every_matrix_of_every_stored_expert(factorised, exact):
    counts = json.loads((exact / "config.json").read_text())["moe_layers"]
    expected = [(n, g, m) for n in LAYERS[1:] for g in range(counts[n]) for m in ("wi", "wo")]
    assert [(layer, g, matrix) for layer, g, matrix, _ in entries(factorised[0])] == expected


def test_weight_errors_energies_and_stable_ranks_are_those_of_the_stored_matrices(factorised, exact):
    report, out = factorised
    before, after = load_tensors(exact), load_tensors(out)
    for layer, g, matrix, entry in entries(report):
        was = before[f"{layer}.experts.{matrix}"][g]
        now = stored_stack(after, f"{layer}.experts.{matrix}")[g]
        squares = torch.linalg.svdvals(was.double()).square()
        assert entry["weight_error"] == pytest.approx(float((was - now).norm() / was.norm()), rel=1e-4)
        assert entry["energy"] == pytest.approx(float(squares[:4].sum() / squares.sum()), rel=1e-5)
        assert entry["stable_rank"] == pytest.approx(float(squares.sum() / squares[0]), rel=1e-5)
        assert (entry["rank"], entry["num_rows"]) == (4, {"wi": 5, "wo": 3}[matrix])  # 0.2 of 24 and of 16


def test_output_errors_are_those_on_the_calibration_tokens(factorised, exact, stats):
    report, out = factorised
    before, after = load_tensors(exact), load_tensors(out)
    for layer, g, matrix, entry in entries(report):
        sample, mapping = stats.layers[layer].tokens(), before[f"{layer}.expert_map"]
        weights = sample.weights(stats.layers[layer].dispatched)
        wi, wo = (before[f"{layer}.experts.{part}"][g] for part in ("wi", "wo"))
        new_wi, new_wo = (stored_stack(after, f"{layer}.experts.{part}")[g] for part in ("wi", "wo"))
        error = total = 0.0
        for t in range(len(sample)):
            if mapping[sample.expert[t]] != g:
                continue
            x, count = sample.inputs[t], float(weights[t] * sample.gate[t] ** 2)
            wanted, given = (wi @ x).relu(), (new_wi @ x).relu()
            if matrix == "wo":
                wanted, given = wo @ wanted, new_wo @ given
            error += count * float((wanted - given).square().sum())
            total += count * float(wanted.square().sum())
        assert entry["output_error"] == pytest.approx(error / total, rel=1e-3)


def test_the_stable_rank_before_merging_is_the_mean_over_the_members(factorised, switch, exact):
    before = load_tensors(switch)
    mapping = {name: load_tensors(exact)[f"{name}.expert_map"].tolist() for name in LAYERS}
    for layer, g, matrix, entry in entries(factorised[0]):
        members = [e for e in range(6) if mapping[layer][e] == g]
        ranks = [by_svd(before[f"{layer}.experts.expert_{e}.{matrix}.weight"]) for e in members]
        assert entry["stable_rank_before"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)


def test_without_statistics_there_are_no_output_errors(switch, tmp_path):
    report = factorize(switch, tmp_path / "out", rank=3)
    assert {entry["output_error"] for *_, entry in entries(report)} == {None}


def test_the_entries_are_stored_beside_the_weights(factorised):
    report, out = factorised
    assert json.loads((out / "msmoe.json").read_text())["factors"]["matrices"] == report.matrices


def test_measuring_a_factorised_checkpoint_gives_what_was_stored(factorised):
    report, out = factorised
    assert measure_ranks(out) == report.matrices


def test_measuring_a_dense_checkpoint_tells_what_a_rank_would_cost(exact):
    tensors = load_tensors(exact)
    measured = measure_ranks(exact, rank=5)
    assert {entry["layer"] for entry in measured} == set(LAYERS)
    for entry in measured:
        weight = tensors[f"{entry['layer']}.experts.{entry['matrix']}"][entry["expert"]].double()
        squares = torch.linalg.svdvals(weight).square()
        tail = float(squares[5:].sum() / squares.sum())
        assert entry["weight_error"] == pytest.approx(tail**0.5, rel=1e-4)
        assert entry["energy"] == pytest.approx(1 - tail, rel=1e-5)


def test_measuring_writes_nothing(copied):
    before = {file: file.read_bytes() for file in copied.parent.rglob("*") if file.is_file()}
    measure_ranks(copied)
    assert {file: file.read_bytes() for file in copied.parent.rglob("*") if file.is_file()} == before
