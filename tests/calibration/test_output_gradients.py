"""Gradients at the outputs of MoE layers: against autograd on one record at a time, and finite differences."""

import numpy as np
import pytest
import torch
from tiny import LAYERS, batch_of, build_switch, profile_small, write_records

from msmoe.calibration.batches import record_key
from msmoe.calibration.output_gradients import log_likelihood
from msmoe.calibration.records import TokenRecord
from msmoe.families.switch import SwitchFamily

FAMILY = SwitchFamily()


def token_record(record: dict) -> TokenRecord:
    return TokenRecord(record["input_ids"], record["labels"])


def test_every_sampled_token_has_the_gradient_of_its_own_records_likelihood(switch, full_stats, records):
    """The layer's output is replaced by a leaf, one record at a time."""
    model = build_switch()
    for name in (LAYERS[1], LAYERS[2]):
        sample = full_stats.layers[name].tokens()
        for record in records[:6]:
            held = {}

            def hook(module, inputs, outputs, held=held):
                held["leaf"] = outputs.detach().requires_grad_()
                return held["leaf"]

            handle = model.get_submodule(name).register_forward_hook(hook)
            key = record_key(token_record(record))
            log_likelihood(model, batch_of([record]), [key], seed=0).backward()
            handle.remove()
            at = (sample.record == key).nonzero().flatten()
            assert len(at)
            expected = held["leaf"].grad[0, sample.position[at]]
            torch.testing.assert_close(sample.output_gradient[at], expected, rtol=1e-4, atol=1e-6)


def test_the_drawn_labels_do_not_depend_on_the_batch(records):
    model = build_switch()
    keys = [record_key(token_record(r)) for r in records[:4]]
    with torch.no_grad():
        together = float(log_likelihood(model, batch_of(records[:4]), keys, seed=3))
        alone = [float(log_likelihood(model, batch_of([r]), [k], seed=3)) for r, k in zip(records, keys, strict=False)]
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_labels_are_drawn_in_proportion_to_their_probability(records):
    """Mean log-likelihood of drawn labels is minus the entropy of the model's distribution."""
    model, record = build_switch(), records[0]
    batch = batch_of([record])
    with torch.no_grad():
        p = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch["labels"]),
        ).logits.softmax(-1)[0]  # fmt: skip
        drawn = [float(log_likelihood(model, batch, [record_key(token_record(record))], seed=s)) for s in range(400)]
    entropy = float(-(p * p.log()).sum())
    assert np.mean(drawn) == pytest.approx(-entropy, abs=4 * np.std(drawn) / 20)


def test_only_the_records_asked_for_have_gradients(switch, data):
    stats = profile_small(switch, data, fisher=5)
    sample = stats.layers[LAYERS[0]].tokens()
    with_gradient = sample.record[sample.has_gradient].unique()
    assert len(with_gradient) == 5
    assert sample.output_gradient[~sample.has_gradient].isnan().all()


@pytest.fixture(scope="module")
def fisher_stats(switch, data):
    return profile_small(switch, data, fisher=64)


def test_gradients_survive_their_file(fisher_stats, tmp_path):
    fisher_stats.save(tmp_path / "stats")
    stored = type(fisher_stats).load(tmp_path / "stats")
    for name in LAYERS:
        ours, theirs = stored.layers[name].tokens().output_gradient, fisher_stats.layers[name].tokens().output_gradient
        assert torch.equal(ours, theirs)
    assert stored.digest == fisher_stats.digest


def test_a_sum_has_gradients_if_both_sides_have(switch, records, fisher_stats, tmp_path):
    part = profile_small(switch, write_records(tmp_path / "d.jsonl", records[:9]), fisher=64)
    both = (fisher_stats + part).layers[LAYERS[0]]
    assert both.has_output_gradients
    assert both.tokens().has_gradient.all()


def test_a_sum_with_statistics_without_gradients_drops_them_with_a_warning(switch, records, fisher_stats, tmp_path):
    part = profile_small(switch, write_records(tmp_path / "d.jsonl", records[:9]))
    with pytest.warns(UserWarning, match="only one side has output gradients"):
        total = fisher_stats + part
    assert not total.layers[LAYERS[0]].has_output_gradients


def test_the_model_is_left_as_it_was(switch, data, full_stats, stats):
    """Everything else of the statistics is the same with and without gradients."""
    for name in LAYERS:
        assert torch.equal(full_stats.layers[name].routed, stats.layers[name].routed)
        assert torch.equal(full_stats.layers[name].tokens().key, stats.layers[name].tokens().key)
