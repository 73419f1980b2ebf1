"""Profiling: what the hooks count, against a naive recount, and what must not change it."""

import json

import pytest
import torch
from tiny import LAYERS, build_switch, profile_small, random_records, save_switch, write_records
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.calibration.batches import batch_indices, collate
from msmoe.calibration.profile import profile
from msmoe.calibration.recorder import Recorder
from msmoe.calibration.records import TokenRecord
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families.switch import SwitchFamily

SUMS = ("gate_mass", "soft_mass", "router_logits_gram", "input_sum", "input_abs_sum", "input_square_sum")


def recount(checkpoint, records):
    """One record at a time, one token at a time: routed, dispatched, gate mass and soft mass of every layer."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(checkpoint).eval()
    num_experts, capacity = model.config.num_experts, model.config.expert_capacity
    counts = {name: [[0] * num_experts, [0] * num_experts, [0.0] * num_experts, [0.0] * num_experts] for name in LAYERS}
    seen = {}
    hooks = [
        model.get_submodule(f"{name}.router").register_forward_pre_hook(
            lambda module, inputs, name=name: seen.__setitem__(name, inputs[0][0])
        )
        for name in LAYERS
    ]
    for record in records:
        with torch.no_grad():
            model(input_ids=torch.tensor([record["input_ids"]]), labels=torch.tensor([record["labels"]]))
        for name in LAYERS:
            taken = [0] * num_experts
            for x in seen[name]:
                probabilities = (model.get_submodule(f"{name}.router.classifier").weight @ x).softmax(-1).tolist()
                expert = max(range(num_experts), key=lambda e: probabilities[e])
                taken[expert] += 1
                counts[name][0][expert] += 1
                counts[name][1][expert] += taken[expert] <= capacity
                counts[name][2][expert] += probabilities[expert]
                for e in range(num_experts):
                    counts[name][3][e] += probabilities[e]
    for hook in hooks:
        hook.remove()
    return counts


def assert_same_statistics(a, b):
    for name, layer in a.layers.items():
        other = b.layers[name]
        for key in ("routed", "dispatched", "sequence_counts"):
            assert torch.equal(getattr(layer, key), getattr(other, key)), (name, key)
        for key in SUMS:
            ours, theirs = getattr(layer, key), getattr(other, key)
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (name, key)


def assert_same_sample(a, b):
    for name, layer in a.layers.items():
        ours, theirs = layer.tokens(), b.layers[name].tokens()
        for key in ("key", "record", "position", "expert"):
            assert torch.equal(getattr(ours, key), getattr(theirs, key)), (name, key)
        torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["switch", "dropping_switch"])
def test_counts_equal_a_naive_recount_token_by_token(which, records, request, tmp_path):
    checkpoint, few = request.getfixturevalue(which), records[:15]
    stats = profile_small(checkpoint, write_records(tmp_path / "d.jsonl", few))
    naive = recount(checkpoint, few)
    for name, (routed, dispatched, gate_mass, soft_mass) in naive.items():
        layer = stats.layers[name]
        assert layer.routed.tolist() == routed
        assert layer.dispatched.tolist() == dispatched
        torch.testing.assert_close(layer.gate_mass, torch.tensor(gate_mass, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.soft_mass, torch.tensor(soft_mass, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_every_valid_token_is_routed_once_and_padding_never(stats, records):
    sources = sum(len(r["input_ids"]) for r in records)
    targets = sum(len(r["labels"]) for r in records)
    for name, layer in stats.layers.items():
        assert layer.num_tokens == (sources if name.startswith("encoder") else targets)
        assert layer.soft_mass.sum().item() == pytest.approx(layer.num_tokens)


def test_masked_labels_inside_a_target_do_not_count(switch, tmp_path):
    records = [{"input_ids": [5, 6, 7], "labels": [8, -100, 9, -100, 4]}]
    stats = profile_small(switch, write_records(tmp_path / "d.jsonl", records))
    assert stats.layers["decoder.block.1.layer.2.mlp"].num_tokens == 3


def test_overflow_is_not_booked_on_expert_zero(tmp_path):
    model = build_switch(expert_capacity=1)
    with torch.no_grad():  # all rows zero but for expert 3, whose logit is positive or, mirrored by expert 4, negative
        for name in LAYERS:
            rows = model.get_submodule(f"{name}.router.classifier").weight
            rows.zero_()
            rows[3].normal_(std=1.0)
            rows[4] = -rows[3]
    model.save_pretrained(tmp_path / "ckpt")
    stats = profile_small(tmp_path / "ckpt", write_records(tmp_path / "d.jsonl", random_records(10)))
    for layer in stats.layers.values():
        assert layer.dropped > 0
        assert layer.routed[[0, 1, 2, 5]].sum() == 0
        assert layer.dispatched[0] == 0


def test_capacity_beyond_the_sequences_dispatches_every_token(stats):
    for layer in stats.layers.values():
        assert torch.equal(layer.routed, layer.dispatched)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_statistics_do_not_depend_on_the_batch_size(batch_size, dropping_switch, dropping_stats, data):
    assert_same_statistics(profile_small(dropping_switch, data, batch_size=batch_size), dropping_stats)


def test_statistics_do_not_depend_on_the_order_of_the_records(dropping_switch, dropping_stats, records, tmp_path):
    shuffled = profile_small(dropping_switch, write_records(tmp_path / "d.jsonl", records[::-1]))
    assert_same_statistics(shuffled, dropping_stats)


def test_statistics_do_not_depend_on_padding_in_the_file(dropping_switch, dropping_stats, records, tmp_path):
    padded = [{"input_ids": r["input_ids"] + [0] * 9, "labels": r["labels"] + [-100] * 5} for r in records]
    assert_same_statistics(profile_small(dropping_switch, write_records(tmp_path / "d.jsonl", padded)), dropping_stats)


@pytest.mark.parametrize("token_sample", [60, 300])
def test_the_token_sample_does_not_depend_on_batch_size_and_order(token_sample, switch, data, records, tmp_path):
    backwards = write_records(tmp_path / "d.jsonl", records[::-1])
    one = profile_small(switch, data, token_sample=token_sample, batch_size=1)
    many = profile_small(switch, backwards, token_sample=token_sample, batch_size=40)
    assert_same_sample(one, many)


def test_permuting_the_experts_permutes_the_counts(switch, stats, data, tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for layer in LAYERS:
            model.get_parameter(f"{layer}.router.classifier.weight").copy_(
                original[f"{layer}.router.classifier.weight"][order]
            )
            for new, old in enumerate(order):
                for part in ("wi", "wo"):
                    key = f"{layer}.experts.expert_{{}}.{part}.weight"
                    model.get_parameter(key.format(new)).copy_(original[key.format(old)])
    model.save_pretrained(tmp_path / "permuted")
    permuted = profile_small(tmp_path / "permuted", data)
    for name, layer in stats.layers.items():
        assert permuted.layers[name].routed.tolist() == layer.routed[order].tolist()


def test_a_bfloat16_checkpoint_is_counted_on_its_own_weights_in_float32(records, data, tmp_path):
    half = save_switch(tmp_path / "half", dtype=torch.bfloat16)
    SwitchTransformersForConditionalGeneration.from_pretrained(half, dtype=torch.float32).save_pretrained(
        tmp_path / "full"
    )
    assert_same_statistics(profile_small(half, data), profile_small(tmp_path / "full", data))


def test_sharding_changes_neither_fingerprint_nor_statistics(switch, stats, data, tmp_path):
    sharded = save_switch(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    result = profile_small(sharded, data)
    assert result.checkpoint == stats.checkpoint
    assert_same_statistics(result, stats)


@pytest.mark.parametrize("options", [{"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4}])
def test_with_sparse_step_one_every_block_is_recorded(options, data, tmp_path):
    stats = profile_small(save_switch(tmp_path / "ckpt", **options), data)
    assert list(stats.layers) == [
        f"{s}.block.{i}.layer.{p}.mlp" for s, p in (("encoder", 1), ("decoder", 2)) for i in range(4)
    ]


def test_samples_bounds_the_records_by_a_seeded_choice(switch, data):
    first = profile_small(switch, data, samples=10, seed=1)
    assert first.data["num_records"] == 10
    assert first.digest == profile_small(switch, data, samples=10, seed=1).digest
    assert first.data["sha256"] != profile_small(switch, data, samples=10, seed=2).data["sha256"]


def test_progress_reaches_the_number_of_records(switch, data):
    calls = []
    profile_small(switch, data, batch_size=16, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(16, 40), (32, 40), (40, 40)]


def test_gradient_grams_equal_those_of_a_loop_over_single_records(switch, records, tmp_path):
    few = records[:6]
    stats = profile_small(switch, write_records(tmp_path / "d.jsonl", few), gradients=True, batch_size=4)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch).eval()
    for record in few:  # the mean over a record's targets times their number is their sum
        loss = model(input_ids=torch.tensor([record["input_ids"]]), labels=torch.tensor([record["labels"]])).loss
        (loss * len(record["labels"])).backward()
    for name in LAYERS:
        flat, scaled = [], []
        for e in range(6):
            weights = [model.get_parameter(f"{name}.experts.expert_{e}.{part}.weight") for part in ("wi", "wo")]
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            flat.append(torch.cat([g.flatten() for g in grads]).double())
            scaled.append(torch.cat([(g * w.detach()).flatten() for g, w in zip(grads, weights, strict=True)]).double())
        for vectors, gram in (
            (flat, stats.layers[name].gradient_gram),
            (scaled, stats.layers[name].weight_gradient_gram),
        ):
            expected = torch.stack(vectors) @ torch.stack(vectors).T
            torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_hooks_are_removed_even_if_the_model_fails(switch):
    family = SwitchFamily()
    model = family.load_model(switch, dtype=torch.float32)
    recorder = Recorder(family, model, sample_size=8, seed=0)
    with pytest.raises(IndexError), recorder.attached():  # token 999 is not in the vocabulary  # noqa: PT012
        recorder.records = torch.tensor([1])
        batch = collate([TokenRecord([999], [3])], pad_id=0)
        for recorder.valid in family.forward(model, batch):
            pass
    assert not any(router._forward_hooks for router in family.routers(model).values())


def test_nan_in_an_expert_is_named(copied, data):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(copied)
    key = "decoder.block.3.layer.2.mlp.experts.expert_4.wo.weight"
    with torch.no_grad():
        model.get_parameter(key)[0, 0] = torch.nan
    model.save_pretrained(copied)
    with pytest.raises(UserError, match=f"tensor {key} of .* holds NaN"):
        profile_small(copied, data)


@pytest.mark.parametrize(
    "key", ["encoder.block.0.layer.0.SelfAttention.o.weight", "encoder.block.1.layer.1.mlp.router.classifier.weight"]
)
def test_nan_in_any_tensor_the_statistics_depend_on_is_named(key, copied, data):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(copied)
    with torch.no_grad():
        model.get_parameter(key)[0, 0] = torch.nan
    model.save_pretrained(copied)
    with pytest.raises(UserError, match=key):
        profile_small(copied, data)


@pytest.mark.parametrize("option", ["samples", "batch_size", "token_sample"])
def test_counts_below_one_are_refused_with_the_value(option, switch, data):
    with pytest.raises(UserError, match=r"at least 1, got .*-3"):
        profile_small(switch, data, **{option: -3})


def test_a_dense_checkpoint_is_refused(copied, data):
    config = json.loads((copied / "config.json").read_text()) | {"model_type": "t5"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="architecture 't5'; supported: switch_transformers"):
        profile(copied, data)


def test_text_without_tokenizer_is_refused(switch, tmp_path):
    with pytest.raises(UserError, match=r"d\.jsonl, line 1 is text and the checkpoint has no tokenizer"):
        profile_small(switch, write_records(tmp_path / "d.jsonl", [{"text": "words"}]))


def test_batches_cover_every_record_once_longest_first():
    records = [TokenRecord([1] * n, [1]) for n in (3, 9, 1, 9, 4)]
    assert list(batch_indices(records, 2)) == [[1, 3], [4, 0], [2]]


def test_collated_padding_is_masked_and_ignored():
    batch = collate([TokenRecord([7, 8, 9], [4]), TokenRecord([6], [5, 3])], pad_id=2)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [6, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[4, -100], [5, 3]]


def test_the_checkpoint_is_not_changed(switch, data):
    before = {file.name: file.read_bytes() for file in switch.iterdir()}
    profile_small(switch, data)
    assert {file.name: file.read_bytes() for file in switch.iterdir()} == before
    assert Checkpoint(switch).num_bytes > 0
