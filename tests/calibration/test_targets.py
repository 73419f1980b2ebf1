"""What models say at target positions, in slices, against their own forward passes."""

import pytest
import torch
from tiny import build_switch
from tiny_decoder import CLASSES, VOCAB, build_decoder, full_log_probabilities
from torch.nn import functional

from msmoe.calibration import targets
from msmoe.calibration.batches import collate
from msmoe.calibration.causal import answered, wanted
from msmoe.calibration.spans import TokenRecord

RECORDS = [
    wanted([1, 40, 50, 60, 70, 80], [1, 40, -100, 60, 70, 80]),
    answered([1, 30, 31, 32], [90, 91, 2]),
    answered([1, 100], [2]),
]  # 4 + 3 + 1 targets
PAIRS = [TokenRecord([5, 9, 1], [7, 8, -100, 1]), TokenRecord([6, 1], [3])]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Three target tokens at a time."""
    monkeypatch.setattr(targets, "SLICE", 3 * VOCAB)


def expected(model, record: TokenRecord) -> list[float]:
    said = full_log_probabilities(model, record.input_ids)
    return [float(said[i - 1, label]) for i, label in enumerate(record.labels) if label != -100]


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_log_probabilities_of_a_padded_batch_are_those_of_single_sequences(kind):
    model = build_decoder(kind)
    found = targets.target_log_probabilities(model, collate(RECORDS, pad_id=0))
    torch.testing.assert_close(
        found.double(), torch.tensor([x for r in RECORDS for x in expected(model, r)]).double(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_the_mean_is_the_loss_that_transformers_computes_from_the_labels(kind):
    model, batch = build_decoder(kind), collate(RECORDS, pad_id=0)
    loss = model(**batch, use_cache=False).loss
    assert -targets.target_log_probabilities(model, batch).mean() == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
def test_a_label_at_the_first_position_counts_for_nothing():
    model = build_decoder()
    first = TokenRecord([1, 40, 50], [1, 40, 50])
    assert len(targets.targets_of(model, collate([first], pad_id=0)).labels) == 2


@torch.no_grad()
def test_targets_know_where_they_stand():
    found = targets.targets_of(build_decoder(), collate(RECORDS, pad_id=0))
    assert found.labels.tolist() == [40, 60, 70, 80, 90, 91, 2, 2]
    assert found.rows.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert found.positions.tolist() == [1, 3, 4, 5, 4, 5, 6, 2]
    assert found.by_record(torch.ones(8)).tolist() == [4, 3, 1]


@torch.no_grad()
def test_never_more_logits_than_a_slice_are_there_at_once():
    model, seen = build_decoder("granitemoe"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // VOCAB))
    targets.target_log_probabilities(model, collate(RECORDS, pad_id=0))
    assert seen == [3, 3, 2]


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model, batch = build_decoder("granitemoe"), collate(RECORDS, pad_id=0)
    before = model(**batch, use_cache=False).logits
    targets.target_log_probabilities(model, batch)
    assert torch.equal(model(**batch, use_cache=False).logits, before)


def test_gradients_reach_the_weights_through_the_slices():
    model, batch = build_decoder("granitemoe"), collate(RECORDS, pad_id=0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    [found] = torch.autograd.grad(-targets.target_log_probabilities(model, batch).mean(), weight)
    [wanted_gradient] = torch.autograd.grad(model(**batch, use_cache=False).loss, weight)
    torch.testing.assert_close(found, wanted_gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_an_encoder_decoder_is_read_the_same_way():
    model, batch = build_switch(), collate(PAIRS, pad_id=0)
    logits = model(**batch).logits.log_softmax(-1)
    expected_log = torch.stack([logits[0, 0, 7], logits[0, 1, 8], logits[0, 3, 1], logits[1, 0, 3]])
    torch.testing.assert_close(targets.target_log_probabilities(model, batch), expected_log)


# Divergence


@torch.no_grad()
def test_a_divergence_is_that_of_the_whole_distributions():
    model, other, batch = build_decoder(seed=1), build_decoder("mixtral", seed=2), collate(RECORDS, pad_id=0)
    found = targets.divergences(targets.targets_of(model, batch), targets.targets_of(other, batch))
    brute = []
    for record in RECORDS:
        q, p = (full_log_probabilities(m, record.input_ids) for m in (model, other))
        brute += [
            float((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum())
            for i, label in enumerate(record.labels)
            if label != -100
        ]
    assert min(brute) > 0.01
    torch.testing.assert_close(found.double(), torch.tensor(brute).double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("build", "records"), [(build_decoder, RECORDS), (build_switch, PAIRS)])
@torch.no_grad()
def test_a_model_diverges_by_nothing_from_itself(build, records):
    found = targets.targets_of(build(), collate(records, pad_id=0))
    assert targets.divergences(found, found).tolist() == [0.0] * len(found.labels)


@torch.no_grad()
def test_the_divergence_of_encoder_decoders_is_that_of_their_full_logits():
    model, other, batch = build_switch(seed=1), build_switch(seed=2), collate(PAIRS, pad_id=0)
    found = targets.divergences(targets.targets_of(model, batch), targets.targets_of(other, batch))
    q, p = (m(**batch).logits[batch["labels"] != -100].log_softmax(-1) for m in (model, other))
    torch.testing.assert_close(found, functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
