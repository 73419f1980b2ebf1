"""Profiling models in memory and records in memory: the statistics of what they are saved as."""

import pytest
import torch
from tiny import LAYERS, batch_of, build_switch, profile_small, random_records
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

import msmoe
from msmoe.calibration.profile import load_records, profile
from msmoe.calibration.records import DataWarning
from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint
from msmoe.demo import CHECKPOINT
from msmoe.errors import UserError
from msmoe.planning.planner import plan


def assert_equal(a: Stats, b: Stats) -> None:
    assert a.checkpoint == b.checkpoint
    for name, layer in a.layers.items():
        assert torch.equal(layer.router_logits_gram, b.layers[name].router_logits_gram)
        assert torch.equal(layer.tokens().inputs, b.layers[name].tokens().inputs)


def test_a_model_in_memory_has_the_statistics_of_its_folder(switch, data, stats):
    assert_equal(profile_small(msmoe.load(switch), data), stats)


def test_a_compressed_model_in_memory_has_the_statistics_of_its_folder(exact, data):
    assert_equal(profile_small(msmoe.load(exact), data), profile_small(exact, data))


def test_a_changed_model_has_the_statistics_of_what_it_is_saved_as(switch, data, stats, tmp_path):
    model = msmoe.load(switch)
    with torch.no_grad():
        model.get_parameter("encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight")[3, 3] += 1.0
    changed = profile_small(model, data)
    assert changed.checkpoint != stats.checkpoint
    model.save_pretrained(tmp_path / "saved")
    assert_equal(changed, profile_small(tmp_path / "saved", data))
    assert plan(tmp_path / "saved", changed, experts=3).layers


def test_a_model_never_saved_can_be_profiled(data):
    model = build_switch(seed=5)
    assert profile_small(model, data).checkpoint["model_type"] == "switch_transformers"


def test_the_model_is_given_back_as_it_was(data):
    model = build_switch(seed=5).train()
    model.shared.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    profile_small(model, data, gradients=True, fisher=4)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_what_is_no_model_is_refused(data):
    with pytest.raises(UserError, match="expected a checkpoint folder or a transformers model, got Linear"):
        profile_small(torch.nn.Linear(2, 2), data)


@pytest.mark.parametrize("wrap", [list, tuple, iter])
def test_records_in_memory_have_the_statistics_of_their_file(wrap, switch, records, stats):
    assert_equal(profile_small(switch, wrap(records)), stats)


def test_texts_in_memory_need_a_tokenizer_and_take_it(tmp_path):
    texts = [f"the quick brown fox number {i} jumps over the lazy dog" for i in range(6)]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = build_switch(vocab_size=len(tokenizer))
    found = profile(model, texts, tokenizer=tokenizer)
    assert found.data["num_records"] == 6
    assert found.data["source"] == "records in memory"
    with pytest.raises(UserError, match="record 1 is text and the checkpoint has no tokenizer"):
        profile(model, texts)


def test_clean_data_add_nothing_to_the_description(stats):
    assert set(stats.data) == {
        "source", "num_records", "num_tokens", "sha256", "seed", "max_source_length", "max_target_length"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::msmoe.calibration.records.DataWarning")
def test_what_is_skipped_and_cut_is_counted(switch, records, stats):
    blank = [{"input_ids": [0, 0], "labels": [3]}, {"input_ids": [], "labels": []}]
    skipping = profile_small(switch, [*records, *blank])
    assert skipping.data["num_skipped"] == 2
    assert skipping.data["num_records"] == len(records)
    assert_equal(skipping, stats)
    cutting = profile_small(switch, records, max_source_length=5)
    assert cutting.data["num_cut"]["sources"] == sum(len(r["input_ids"]) > 5 for r in records)


def test_columns_are_recorded(switch, records):
    renamed = [{"ids": r["input_ids"], "labels": r["labels"]} for r in records]
    found = profile_small(switch, renamed, columns={"input_ids": "ids"})
    assert found.data["columns"] == {"input_ids": "ids"}


def test_bfloat16_is_recorded_and_changes_the_sums(switch, data, stats):
    found = profile_small(switch, data, dtype="bfloat16")
    assert found.data["dtype"] == "bfloat16"
    for name, layer in found.layers.items():
        torch.testing.assert_close(
            layer.router_logits_gram, stats.layers[name].router_logits_gram, rtol=0.1, atol=0.05 * layer.num_tokens
        )


def test_unused_fields_are_warned_about(switch, records):
    with pytest.warns(DataWarning, match="fields that are not used: token_type_ids"):
        profile_small(switch, [r | {"token_type_ids": [0]} for r in records])


def test_the_name_of_the_folder_is_not_needed(switch, data, stats):
    model = msmoe.load(switch)
    model.config._name_or_path = ""
    found = profile_small(model, data)
    assert found.checkpoint == {"model_type": "switch_transformers", "fingerprint": Checkpoint(switch).fingerprint}


@pytest.mark.filterwarnings("ignore::msmoe.calibration.records.DataWarning")
def test_records_that_were_left_out_are_left_out_when_the_data_are_read_again(switch, records):
    mixed = [*records, *({"input_ids": [0, 0], "labels": [3]} for _ in range(40))]
    data = profile_small(switch, mixed, samples=30).data
    assert data["num_records"] < data["samples"] == 30
    again = load_records(
        Checkpoint(switch), mixed, samples=data["samples"], seed=0, max_source_length=512, max_target_length=128
    )
    assert again[1] == data["sha256"]


def test_a_model_of_another_configuration_is_not_its_folder(switch, data, stats):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch, expert_capacity=2)
    found = profile_small(model, data)
    assert sum(layer.dropped for layer in found.layers.values()) > 0
    assert found.checkpoint["fingerprint"] != stats.checkpoint["fingerprint"]


def test_a_model_in_half_precision_can_be_profiled_and_trained_afterwards(switch, data, stats):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch, dtype=torch.bfloat16)
    for _ in range(2):
        found = profile_small(model, data)
        assert found.checkpoint == stats.checkpoint
        assert found.data["dtype"] == "bfloat16"
    assert msmoe.evaluate(model, data).source == stats.checkpoint["fingerprint"]
    model.train()(**batch_of(random_records(4))).loss.backward()
    assert model.get_parameter(f"{LAYERS[0]}.router.classifier.weight").grad is not None
