"""Router rows of checkpoints that store only the groups."""

import pytest
import torch
from tiny import LAYERS, layer_plan, load_tensors

from msmoe.compression.router import fit_rows, measure, reduce_router
from msmoe.layer.routing import SoftmaxTop1
from msmoe.planning.plan import Group, LayerPlan

LAYER = LAYERS[1]
PLAN = layer_plan(6, [4, 0, 2], [1], [3, 5])  # stored by dominant expert: 1, 3, 4


@pytest.fixture(scope="module")
def rows(switch):
    return load_tensors(switch)[f"{LAYER}.router.classifier.weight"]


@pytest.fixture(scope="module")
def fits(rows, stats):
    return {
        kind: reduce_router(kind, SoftmaxTop1(rows), PLAN, stats.layers[LAYER]) for kind in ("dominant", "mean", "fit")
    }


def test_dominant_rows_are_those_of_the_dominant_experts_in_stored_order(rows, fits):
    assert torch.equal(fits["dominant"].rows, rows[[1, 3, 4]])


def test_mean_rows_are_weighted_by_the_group():
    rows = torch.tensor([[4.0, 0.0], [0.0, 8.0], [2.0, 2.0]])
    plan = LayerPlan(3, (Group(2, (2,), (1.0,)), Group(0, (0, 1), (0.75, 0.25))))
    # group of expert 0 comes first: 0.75 * (4, 0) + 0.25 * (0, 8)
    assert reduce_router("mean", SoftmaxTop1(rows), plan, None).rows.tolist() == [[3.0, 2.0], [2.0, 2.0]]


def test_agreement_is_the_weighted_share_of_held_out_tokens_sent_to_their_group(fits, stats):
    sample = stats.layers[LAYER].tokens()
    weights = sample.weights(stats.layers[LAYER].dispatched)
    for fit in fits.values():
        hits = total = 0.0
        for t in range(len(sample)):
            if sample.held_out[t]:
                choice = int((fit.rows @ sample.inputs[t]).argmax())
                hits += float(weights[t]) * (choice == PLAN.expert_map[sample.expert[t]])
                total += float(weights[t])
        assert fit.agreement == pytest.approx(hits / total, rel=1e-5)


def test_the_gate_error_is_a_hand_worked_root_mean_square():
    rows = torch.zeros(2, 1)  # two equal logits: gate 0.5
    inputs, target, gate = torch.ones(2, 1), torch.tensor([0, 1]), torch.tensor([0.9, 0.2])
    result = measure(rows, inputs, target, gate, torch.ones(2), torch.ones(2, dtype=torch.bool))
    assert result.gate_error == pytest.approx(((0.4**2 + 0.3**2) / 2) ** 0.5)
    assert result.agreement == 0.5  # ties go to the first group


def test_fitted_rows_agree_more_often_than_dominant_rows(fits):
    assert fits["fit"].agreement > fits["dominant"].agreement


def test_a_router_that_can_be_stored_exactly_is_found():
    generator = torch.Generator().manual_seed(0)
    truth, inputs = torch.randn(3, 8, generator=generator), torch.randn(400, 8, generator=generator)
    gate, target = (inputs @ truth.T).softmax(-1).max(-1)
    start = truth + 0.5 * torch.randn(3, 8, generator=generator)
    fitted = fit_rows(start, inputs, target, gate, torch.ones(400))
    result = measure(fitted, inputs, target, gate, torch.ones(400), torch.zeros(400, dtype=torch.bool))
    assert result.agreement > 0.98
    assert result.gate_error < 0.02


def test_the_fit_never_sees_the_held_out_tokens(rows, stats, fits):
    from dataclasses import replace

    layer = stats.layers[LAYER]
    sample = layer.tokens()
    garbled = replace(sample, gate=torch.where(sample.held_out, torch.rand(len(sample)), sample.gate[:, 0])[:, None])
    again = reduce_router("fit", SoftmaxTop1(rows), PLAN, replace(layer, sample=garbled))
    assert torch.equal(again.rows, fits["fit"].rows)


def test_the_fit_is_the_same_twice(rows, stats, fits):
    assert torch.equal(reduce_router("fit", SoftmaxTop1(rows), PLAN, stats.layers[LAYER]).rows, fits["fit"].rows)


def test_without_statistics_the_quality_is_unknown(rows):
    result = reduce_router("dominant", SoftmaxTop1(rows), PLAN, None)
    assert result.agreement != result.agreement  # NaN


def test_one_group_takes_every_token_at_gate_one(rows, stats):
    result = reduce_router("dominant", SoftmaxTop1(rows), layer_plan(6, [3, 0, 1, 2, 4, 5]), stats.layers[LAYER])
    assert result.agreement == pytest.approx(1)
