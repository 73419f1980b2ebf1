"""Statistics of layers whose tokens have two experts: against a loop over tokens, experts run one at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from msmoe.calibration.batches import collate, record_key
from msmoe.calibration.output_gradients import log_likelihood, output_gradients
from msmoe.calibration.recorder import Recorder
from msmoe.calibration.records import TokenRecord
from msmoe.calibration.statistics import STATISTICS
from msmoe.calibration.stats import Stats
from msmoe.errors import UserError
from msmoe.families.generic import GENERIC

NUM_EXPERTS, TOP_K, WIDTH, VOCABULARY = 6, 2, 16, 64
LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
DOMAINS = ("code", "news")
ABOUT = {"model_type": "qwen3_moe", "fingerprint": "f"}


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K,
        initializer_range=0.3, norm_topk_prob=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def records() -> list[TokenRecord]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, VOCABULARY, size=length).tolist() for length in (9, 4, 7, 1, 12, 5)]
    return [TokenRecord(tokens, tokens) for tokens in ids]


def record(model, records, *, batch_size: int = 3, token_sample: int = 1000) -> Stats:
    """Statistics as `profile` makes them; the domains of the records take turns."""
    recorder = Recorder(GENERIC, model, sample_size=token_sample, seed=0, domains=DOMAINS)
    order = sorted(range(len(records)), key=lambda i: -len(records[i].input_ids))
    with torch.no_grad(), recorder.attached():
        for start in range(0, len(order), batch_size):
            chosen = [records[i] for i in order[start : start + batch_size]]
            recorder.records = torch.tensor([record_key(r) for r in chosen])
            recorder.domain = torch.tensor([len(r.input_ids) % 2 for r in chosen])
            for recorder.valid in GENERIC.forward(model, collate(chosen, pad_id=0)):
                pass
    num_tokens = sum(len(r.input_ids) for r in records)
    data = {"source": "d", "num_records": len(records), "num_tokens": num_tokens, "sha256": str(len(records))}
    in_domain = [[r for r in records if len(r.input_ids) % 2 == d] for d in (0, 1)]
    data["domains"] = {
        name: {"num_records": len(part), "num_tokens": sum(len(r.input_ids) for r in part)}
        for name, part in zip(DOMAINS, in_domain, strict=True)
    }
    return Stats({name: recorder.layers[name].stats() for name in LAYERS}, data, ABOUT)


@pytest.fixture(scope="module")
def stats(model, records) -> Stats:
    return record(model, records)


def naive(model, records, name: str) -> dict[str, torch.Tensor]:
    """Every statistic of a layer, record by record, token by token, choice by choice."""
    block = model.get_submodule(name)
    e, d = NUM_EXPERTS, WIDTH
    shapes = {"E": (e,), "EE": (e, e), "ED": (e, d)}
    sums = {s.name: torch.zeros(shapes[s.axes]).double() for s in STATISTICS if s.axes in shapes and s.add}
    sequences, domains = [], torch.zeros(2, e)
    for tokens in records:
        inputs = []
        hook = block.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0][0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens.input_ids]))
        hook.remove()
        counts = torch.zeros(e)
        for x in inputs[0]:
            logits = block.gate.weight @ x
            probabilities = logits.softmax(-1)
            chosen = probabilities.topk(TOP_K)
            sums["soft_mass"] += probabilities
            sums["router_logits_gram"] += torch.outer(logits, logits)
            for weight, i in zip(chosen.values / chosen.values.sum(), chosen.indices.tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[i] @ x).chunk(2)
                output = block.experts.down_proj[i] @ (torch.nn.functional.silu(gate) * up)
                counts[i] += 1
                added = {
                    "routed": 1, "dispatched": 1, "gate_mass": weight, "input_sum": x, "input_abs_sum": x.abs(),
                    "input_square_sum": x.square(), "output_norm_sum": output.norm(),
                    "gated_norm_sum": weight * output.norm(), "output_square_sum": output.square().sum(),
                    "output_sum": output,
                }  # fmt: skip
                for key, value in added.items():
                    sums[key][i] += value.detach() if isinstance(value, torch.Tensor) else value
        sequences.append(counts)
        domains[len(tokens.input_ids) % 2] += counts
    rows = sorted(counts.tolist() for counts in sequences)
    return {key: value.detach() for key, value in sums.items()} | {
        "sequence_counts": torch.tensor(rows), "domain_routed": domains
    }  # fmt: skip


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, key: str) -> None:
    scale = float(theirs.abs().max())
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=1e-4, atol=1e-5 * scale, msg=lambda m: f"{key}: {m}"
    )


@pytest.mark.parametrize("name", LAYERS)
def test_every_statistic_equals_a_loop_over_tokens_and_choices(name, model, records, stats):
    layer, expected = stats.layers[name], naive(model, records, name)
    domains = expected.pop("domain_routed")
    for key, value in expected.items():
        assert_close(getattr(layer, key), value, key)
    for domain, counts in zip(DOMAINS, domains, strict=True):
        assert layer.domain_routed[domain].tolist() == counts.tolist()
    assert {s.name for s in STATISTICS if s.add} == set(expected)


def test_a_layer_counts_tokens_once_and_choices_k_times(records, stats):
    for layer in stats.layers.values():
        assert layer.num_tokens == sum(len(r.input_ids) for r in records) == 38
        assert layer.routed.sum() == 76  # two experts each
        assert layer.usage.sum() == pytest.approx(1)
        assert layer.top_k == TOP_K


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_the_batch_size_does_not_show(batch_size, model, records, stats):
    other = record(model, records, batch_size=batch_size)
    for name, layer in stats.layers.items():
        for row in STATISTICS:
            if row.add:
                assert_close(getattr(other.layers[name], row.name), getattr(layer, row.name), row.name)
        assert torch.equal(other.layers[name].tokens().key, layer.tokens().key)
    assert other.identity == stats.identity


@pytest.mark.parametrize("token_sample", [12, 1000])
def test_statistics_of_two_halves_add_up_to_those_of_all(token_sample, model, records):
    halves = [record(model, part, token_sample=token_sample) for part in (records[:2], records[2:])]
    total, whole = halves[0] + halves[1], record(model, records, token_sample=token_sample)
    for name, layer in whole.layers.items():
        for row in STATISTICS:
            if row.add:
                assert_close(getattr(total.layers[name], row.name), getattr(layer, row.name), row.name)
        for field in dataclasses.fields(layer.tokens()):
            ours, theirs = getattr(total.layers[name].tokens(), field.name), getattr(layer.tokens(), field.name)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert total.identity == whole.identity
    assert total.identity != halves[0].identity


def test_the_model_computes_the_same_while_it_is_listened_to(model, records):
    batch = collate(records, pad_id=0)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    recorder = Recorder(GENERIC, model, sample_size=8, seed=0)
    recorder.valid, recorder.records = batch["attention_mask"].bool(), torch.arange(len(records))
    with torch.no_grad():
        plain = model(**given).logits
        with recorder.attached():
            heard = model(**given).logits
        after = model(**given).logits
    torch.testing.assert_close(heard, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, plain)
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


def test_statistics_survive_their_file(stats, tmp_path):
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    assert (loaded.digest, loaded.identity) == (stats.digest, stats.identity)
    for name, layer in stats.layers.items():
        assert (loaded.layers[name].top_k, loaded.layers[name].num_tokens) == (TOP_K, 38)
        assert torch.equal(loaded.layers[name].tokens().expert, layer.tokens().expert)
        assert layer.tokens().expert.shape == (38, TOP_K)


def test_a_number_of_choices_that_is_no_multiple_of_top_k_is_refused(stats, tmp_path):
    stats.save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.json"
    file.write_text(file.read_text().replace('"top_k": 2', '"top_k": 3'))
    with pytest.raises(UserError, match="routed sums to 76, which is no multiple of top_k, 3"):
        Stats.load(tmp_path / "stats")


def test_output_gradients_are_those_at_the_outputs_of_the_experts(model, records, stats):
    """One record at a time, the output replaced by a leaf."""
    known = output_gradients(GENERIC, model, stats.layers, records, batch_size=3, seed=0)
    for name in LAYERS:
        sample = stats.layers[name].tokens()
        for tokens in records:
            held = {}

            def hook(module, inputs, outputs, held=held):
                held["leaf"] = outputs.detach().requires_grad_()
                return held["leaf"]

            handle = model.get_submodule(f"{name}.experts").register_forward_hook(hook)
            log_likelihood(model, collate([tokens], pad_id=0), [record_key(tokens)], seed=0).backward()
            handle.remove()
            at = (sample.record == record_key(tokens)).nonzero().flatten()
            assert len(at) == len(tokens.input_ids)
            expected = held["leaf"].grad[sample.position[at]]
            torch.testing.assert_close(known[name][at], expected, rtol=1e-4, atol=1e-6)
    model.zero_grad(set_to_none=True)
