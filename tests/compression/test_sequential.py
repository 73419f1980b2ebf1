"""Sequential refit: each layer is refitted on what the compressed layers before it hand on."""

import json

import pytest
import torch
from tiny import (
    LAYERS,
    batch_of,
    compress,
    load_tensors,
    profile_small,
    weight_files,
    with_merged_experts,
    write_records,
)

from msmoe.calibration.batches import record_key
from msmoe.calibration.records import TokenRecord
from msmoe.compression.apply import apply
from msmoe.compression.sequential import moved_inputs
from msmoe.errors import UserError
from msmoe.families.switch import SwitchFamily
from msmoe.planning.planner import plan as make_plan


@pytest.fixture(scope="module")
def sequential(dropping_switch, dropping_stats, data, tmp_path_factory):
    """Plan and output of a sequential refit."""
    out = tmp_path_factory.mktemp("sequential") / "out"
    plan = compress(dropping_switch, dropping_stats, out, experts=2, refit="sequential", apply_options={"data": data})
    return plan, out


def test_the_first_compressed_layer_is_that_of_the_independent_refit(
    sequential, dropping_switch, dropping_stats, tmp_path
):
    plan, out = sequential
    compress(dropping_switch, dropping_stats, tmp_path / "independent", experts=2)
    one, other = load_tensors(out), load_tensors(tmp_path / "independent")
    first = next(iter(plan.layers))
    torch.testing.assert_close(one[f"{first}.experts.wo"], other[f"{first}.experts.wo"], rtol=1e-3, atol=1e-4)


def test_later_layers_differ_from_the_independent_refit(sequential, dropping_switch, dropping_stats, tmp_path):
    _, out = sequential
    compress(dropping_switch, dropping_stats, tmp_path / "independent", experts=2)
    one, other = load_tensors(out), load_tensors(tmp_path / "independent")
    assert not torch.allclose(one[f"{LAYERS[-1]}.experts.wo"], other[f"{LAYERS[-1]}.experts.wo"], rtol=1e-2, atol=1e-3)


def test_moved_inputs_are_what_the_router_sees_in_the_compressed_model(
    sequential, dropping_switch, dropping_stats, records
):
    """The last layer of a model whose earlier layers are merged, one record at a time."""
    from msmoe.checkpoint import Checkpoint
    from msmoe.compression.apply import Sources

    plan, out = sequential
    model = with_merged_experts(dropping_switch, out)
    layer, sample = LAYERS[-1], dropping_stats.layers[LAYERS[-1]].tokens()
    sources = Sources(SwitchFamily(), Checkpoint(dropping_switch), plan, dropping_stats)
    tokens = [TokenRecord(r["input_ids"], r["labels"]) for r in records]
    moved = moved_inputs(sources, model, layer, sample, tokens, pad_id=0)

    seen = {}
    router = model.get_submodule(f"{layer}.router")
    router.register_forward_hook(lambda module, inputs, outputs: seen.update(x=inputs[0][0], out=outputs))
    for record, token_record in zip(records, tokens, strict=True):
        with torch.no_grad():
            model(**batch_of([record]))
        mine = sample.record == record_key(token_record)
        position = sample.position[mine]
        dispatch, gate, logits = (output[0] for output in seen["out"])
        torch.testing.assert_close(moved.inputs[mine], seen["x"][position], rtol=1e-4, atol=1e-5)
        assert torch.equal(moved.expert[mine, 0], logits[position].argmax(-1))
        expected_gate = gate[position, 0] * dispatch[position].any(
            -1
        )  # a token that is dropped now contributes nothing
        torch.testing.assert_close(moved.gate[mine, 0], expected_gate, rtol=1e-4, atol=1e-5)


def test_hooks_are_removed(dropping_switch, dropping_stats, sequential):
    from msmoe.checkpoint import Checkpoint
    from msmoe.compression.apply import Sources

    plan, _ = sequential
    family = SwitchFamily()
    model = family.load_model(dropping_switch, dtype=torch.float32)
    sources = Sources(family, Checkpoint(dropping_switch), plan, dropping_stats)
    sample = dropping_stats.layers[LAYERS[0]].tokens()
    with pytest.raises(UserError, match="tokenizer is no longer the one that the statistics were made with"):
        moved_inputs(sources, model, LAYERS[0], sample, [TokenRecord([3], [3])], pad_id=0)
    with pytest.raises(IndexError):  # token 999 is not in the vocabulary
        moved_inputs(sources, model, LAYERS[0], sample.drawn(0, 6), [TokenRecord([999], [3])], pad_id=0)
    assert not any(router._forward_hooks for router in family.routers(model).values())


def test_the_same_run_gives_the_same_bytes(sequential, dropping_switch, dropping_stats, data, tmp_path):
    plan, out = sequential
    apply(dropping_switch, plan, tmp_path / "again", stats=dropping_stats, data=data)
    assert weight_files(tmp_path / "again") == weight_files(out)


def test_an_interrupted_run_resumes_to_the_same_bytes(sequential, dropping_switch, dropping_stats, data, tmp_path):
    plan, out = sequential

    def interrupt(done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(dropping_switch, plan, tmp_path / "out", stats=dropping_stats, data=data, progress=interrupt)
    apply(dropping_switch, plan, tmp_path / "out", stats=dropping_stats, data=data, resume=True)
    assert weight_files(tmp_path / "out") == weight_files(out)


def test_the_calibration_data_are_asked_for(dropping_switch, dropping_stats, tmp_path):
    plan = make_plan(dropping_switch, dropping_stats, experts=2, refit="sequential")
    with pytest.raises(UserError, match="give the calibration data with --data"):
        apply(dropping_switch, plan, tmp_path / "out", stats=dropping_stats)


def test_other_data_than_those_of_the_statistics_are_refused(dropping_switch, dropping_stats, records, tmp_path):
    plan = make_plan(dropping_switch, dropping_stats, experts=2, refit="sequential")
    other = write_records(tmp_path / "other.jsonl", records[:-1])
    with pytest.raises(UserError, match="not the calibration data that the statistics were made from"):
        apply(dropping_switch, plan, tmp_path / "out", stats=dropping_stats, data=other)
    assert not (tmp_path / ".out.msmoe-partial").exists()


def test_a_choice_of_records_is_found_again_in_the_file(switch, data, tmp_path):
    stats = profile_small(switch, data, samples=12, seed=1)
    plan = compress(switch, stats, tmp_path / "out", experts=2, refit="sequential", apply_options={"data": data})
    provenance = json.loads((tmp_path / "out" / "msmoe.json").read_text())
    num_merged = sum(len(g.members) > 1 for layer in plan.layers.values() for g in layer.groups)
    assert len([entry for entry in provenance["groups"] if "refit" in entry]) == num_merged
