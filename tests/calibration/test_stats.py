"""Stats: their arithmetic, their files, and what is refused."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import load_tensors, profile_small, save_switch, write_records

from msmoe.calibration.statistics import STATISTICS, TENSORS, sort_rows
from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint
from msmoe.errors import MsmoeWarning, UserError
from msmoe.layer.tokens import TokenSample

SUMS = ("gate_mass", "soft_mass", "router_logits_gram", "input_sum", "input_abs_sum", "input_square_sum")


def hand_made(*, routed, dispatched, sequence_counts) -> LayerStats:
    num_experts = len(routed)
    nothing, none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
    sums = {name: torch.zeros(num_experts, dtype=torch.float64) for name in ("gate_mass", "soft_mass")}
    matrices = {name: torch.zeros(num_experts, 2, dtype=torch.float64) for name in SUMS[3:]}
    return LayerStats(
        routed=torch.tensor(routed),
        dispatched=torch.tensor(dispatched),
        **sums,
        router_logits_gram=torch.zeros(num_experts, num_experts, dtype=torch.float64),
        **matrices,
        sequence_counts=torch.tensor(sequence_counts, dtype=torch.int32),
        sample=TokenSample(none[:, :0], nothing[:, None], none, nothing, nothing, nothing, none, none),
        sample_size=8,
    )


def test_usage_frequency_is_the_share_of_routed_tokens():
    layer = hand_made(routed=[6, 0, 2], dispatched=[4, 0, 2], sequence_counts=[[6, 0, 2]])
    assert layer.usage_frequency.tolist() == [0.75, 0.0, 0.25]  # 6/8, 0/8, 2/8


def test_dropped_is_routed_minus_dispatched():
    layer = hand_made(routed=[6, 0, 2], dispatched=[4, 0, 1], sequence_counts=[[6, 0, 2]])
    assert layer.dropped == 3  # (6 - 4) + 0 + (2 - 1)


def test_a_layer_that_saw_no_token_has_uniform_usage():
    layer = hand_made(routed=[0, 0, 0, 0], dispatched=[0, 0, 0, 0], sequence_counts=[[0, 0, 0, 0]])
    assert layer.usage_frequency.tolist() == [0.25] * 4


def test_drop_rate_counts_tokens_over_capacity_per_group_and_sequence():
    layer = hand_made(routed=[4, 3, 3], dispatched=[4, 3, 3], sequence_counts=[[3, 1, 2], [1, 2, 1]])
    # groups {0, 2} and {1}: sequences hold (5, 1) and (2, 2); over a capacity of 2: 3 + 0 + 0 + 0 of 10
    assert layer.drop_rate(torch.tensor([0, 1, 0]), 2) == pytest.approx(0.3)


def test_recorded_drop_rate_follows_from_the_sequence_counts(dropping_stats):
    for layer in dropping_stats.layers.values():
        assert layer.drop_rate(torch.arange(layer.num_experts), 2) == layer.dropped / layer.num_tokens


def test_stats_of_two_files_add_up_to_the_stats_of_both_together(dropping_switch, records, tmp_path):
    halves = [
        profile_small(dropping_switch, write_records(tmp_path / f"{i}.jsonl", part), token_sample=100)
        for i, part in enumerate((records[:15], records[15:]))
    ]
    whole = profile_small(dropping_switch, write_records(tmp_path / "all.jsonl", records), token_sample=100)
    total = halves[0] + halves[1]
    for name, layer in whole.layers.items():
        other = total.layers[name]
        assert torch.equal(other.routed, layer.routed)
        assert torch.equal(other.dispatched, layer.dispatched)
        assert torch.equal(other.sequence_counts, layer.sequence_counts)
        for key in SUMS:
            torch.testing.assert_close(getattr(other, key), getattr(layer, key), rtol=1e-5, atol=1e-5)
    assert (total.data["num_records"], total.data["num_tokens"]) == (40, whole.data["num_tokens"])


def test_the_token_sample_of_a_sum_is_the_sample_of_both_files_together(switch, records, tmp_path):
    halves = [
        profile_small(switch, write_records(tmp_path / f"{i}.jsonl", part), token_sample=60)
        for i, part in enumerate((records[:38], records[38:]))
    ]
    whole = profile_small(switch, write_records(tmp_path / "all.jsonl", records), token_sample=60)
    total = halves[0] + halves[1]
    for name, layer in whole.layers.items():
        assert torch.equal(total.layers[name].tokens().key, layer.tokens().key)


def test_the_sum_does_not_depend_on_the_order_of_its_terms(switch, records, tmp_path):
    a, b = (
        profile_small(switch, write_records(tmp_path / f"{i}.jsonl", part), token_sample=60)
        for i, part in enumerate((records[:20], records[20:]))
    )
    assert (a + b).digest == (b + a).digest


def test_statistics_of_different_checkpoints_do_not_add_up(stats, dropping_switch, data, tmp_path):
    other = profile_small(save_switch(tmp_path / "other", seed=1), data)
    with pytest.raises(UserError, match="different checkpoints"):
        stats + other


def test_statistics_are_not_added_to_themselves(stats, tmp_path):
    stats.save(tmp_path / "stats")
    for other in (stats, Stats.load(tmp_path / "stats")):
        with pytest.raises(UserError, match="the same statistics: their sum would count every token twice"):
            stats + other


def test_a_part_that_two_sums_share_is_named(switch, records, tmp_path):
    a, b, c = (
        profile_small(switch, write_records(tmp_path / f"{i}.jsonl", records[start : start + 5]))
        for i, start in enumerate((0, 5, 10))
    )
    with pytest.warns(MsmoeWarning, match=f"both sums hold the statistics {b.digest[:12]}: their tokens count twice"):
        (a + b) + (b + c)


def test_the_same_records_profiled_in_other_batches_are_noticed(stats, switch, data):
    again = profile_small(switch, data, batch_size=3)
    assert again.identity == stats.identity
    if again.digest != stats.digest:  # rounding
        with pytest.warns(MsmoeWarning, match="both statistics are of the same records of .*calibration.jsonl"):
            stats + again


def test_two_halves_together_have_the_identity_of_the_whole(dropping_switch, dropping_stats, records, tmp_path):
    a, b = (
        profile_small(dropping_switch, write_records(tmp_path / f"{i}.jsonl", part))
        for i, part in enumerate((records[:15], records[15:]))
    )
    assert (a + b).identity == dropping_stats.identity
    assert len({a.identity, b.identity, (a + b).identity}) == 3


def test_attributes_files_and_sums_follow_from_the_table(stats, tmp_path):
    """What a row says is what is in memory and on disk."""
    stats.save(tmp_path / "stats")
    tensors = load_tensors(tmp_path / "stats")
    sizes = {"E": 6, "D": 16}
    for name, layer in stats.layers.items():
        for row in STATISTICS:
            value = getattr(layer, row.name)
            assert (f"{name}/{row.name}" in tensors) == (row.file == TENSORS and value is not None)
            if value is not None:
                assert str(value.dtype) == f"torch.{row.dtype}"
                assert value.shape == tuple(sizes.get(axis, n) for axis, n in zip(row.axes, value.shape, strict=True))
                assert row.is_signed or bool((value >= 0).all())
            else:
                assert row.is_optional


def test_saved_statistics_load_to_the_same_values(stats, tmp_path):
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    assert (loaded.data, loaded.checkpoint) == (stats.data, stats.checkpoint)
    for name, layer in stats.layers.items():
        for field in dataclasses.fields(LayerStats):
            ours, theirs = getattr(layer, field.name), getattr(loaded.layers[name], field.name)
            assert (
                field.name in ("sample", "domain_routed")
                or ours is theirs
                or bool((torch.as_tensor(ours) == torch.as_tensor(theirs)).all())
            )
        for field in dataclasses.fields(TokenSample):
            assert torch.equal(getattr(layer.tokens(), field.name), getattr(loaded.layers[name].tokens(), field.name))


def test_the_digest_survives_the_file(stats, tmp_path):
    stats.save(tmp_path / "stats")
    assert Stats.load(tmp_path / "stats").digest == stats.digest


def test_stats_json_holds_the_documented_fields_and_consistent_counts(dropping_stats, tmp_path):
    dropping_stats.save(tmp_path / "stats")
    content = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert content["format"] == "msmoe-stats/1"
    assert content["data"]["num_records"] == 40
    for entry in content["layers"].values():
        assert sum(entry["routed"]) == entry["num_tokens"] == sum(entry["dispatched"]) + entry["dropped"]
        assert math.isclose(sum(entry["usage_frequency"]), 1)


def test_the_data_frame_has_the_recorded_counts(stats):
    frame = stats.to_frame()
    for name, layer in stats.layers.items():
        rows = frame[frame.layer == name].sort_values("expert")
        assert rows.routed.tolist() == layer.routed.tolist()
        assert rows.dispatched.tolist() == layer.dispatched.tolist()
        assert rows.gate_mass.tolist() == layer.gate_mass.tolist()


def test_the_data_frame_counts_dropped_tokens_per_expert():
    layer = hand_made(routed=[6, 0, 2], dispatched=[4, 0, 1], sequence_counts=[[6, 0, 2]])
    frame = Stats({"l": layer}, {}, {}).to_frame()
    assert frame.dropped.tolist() == [2, 0, 1]  # 6 - 4, 0 - 0, 2 - 1
    assert list(frame.columns[2:5]) == ["routed", "dispatched", "dropped"]


def test_existing_statistics_are_not_overwritten_without_force(stats, tmp_path):
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "precious").write_text("keep")
    with pytest.raises(UserError, match="exists; use --force"):
        stats.save(tmp_path / "stats")
    assert (tmp_path / "stats" / "precious").read_text() == "keep"


def test_both_files_are_readable_by_the_same_people(stats, tmp_path):
    stats.save(tmp_path / "stats")
    assert len({file.stat().st_mode for file in (tmp_path / "stats").iterdir()}) == 1


def test_force_replaces_existing_statistics(stats, tmp_path):
    (tmp_path / "stats").mkdir()
    for name in ("stats.json", "old"):
        (tmp_path / "stats" / name).write_text("old")
    stats.save(tmp_path / "stats", force=True)
    assert sorted(file.name for file in (tmp_path / "stats").iterdir()) == ["stats.json", "stats.safetensors"]


def test_truncated_statistics_are_refused(stats, tmp_path):
    stats.save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged statistics"):
        Stats.load(tmp_path / "stats")


@pytest.mark.parametrize("content", ['{"format": "other/1"}', "[]", "{", '{"format": "msmoe-stats/1"}', '"text"'])
def test_a_stats_json_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "stats.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        Stats.load(tmp_path)


def test_a_missing_statistics_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a statistics directory"):
        Stats.load(tmp_path / "nowhere")


def test_statistics_of_another_checkpoint_are_refused(stats, dropping_switch, tmp_path):
    other = save_switch(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another checkpoint than"):
        stats.check_against(Checkpoint(other))


def test_rows_are_sorted_by_their_first_column_first():
    assert sort_rows(torch.tensor([[2, 0], [1, 9], [1, 3]])).tolist() == [[1, 3], [1, 9], [2, 0]]
