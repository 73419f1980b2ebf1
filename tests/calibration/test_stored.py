"""Statistics files that cannot be, and what their digest covers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import LAYERS

from msmoe.calibration.stats import Stats
from msmoe.compression.apply import apply
from msmoe.errors import MsmoeWarning, UserError
from msmoe.planning.plan import Plan
from msmoe.planning.planner import plan as make_plan

LAYER = LAYERS[0]


@pytest.fixture
def folder(stats, tmp_path):
    stats.save(tmp_path / "stats")
    return tmp_path / "stats"


def edit_json(folder, change) -> None:
    content = json.loads((folder / "stats.json").read_text())
    change(content["layers"][LAYER])
    (folder / "stats.json").write_text(json.dumps(content))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "stats.safetensors")
    change(tensors)
    save_file(tensors, folder / "stats.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x: x["routed"].__setitem__(0, 2.4), r"routed\[0\] must be a whole number of at least 0, got 2.4"),
        (lambda x: x["routed"].__setitem__(0, -1), r"routed\[0\] must be a whole number of at least 0, got -1"),
        (lambda x: x["routed"].__setitem__(0, x["routed"][0] + 1), "num_tokens is .* the sum of routed is"),
        (lambda x: x["routed"].pop(), "routed must have 6 numbers, one an expert, got 5"),
        (lambda x: x["dispatched"].__setitem__(1, 10**6), "dispatched is more than routed for expert 1"),
        (lambda x: x["gate_mass"].__setitem__(2, float("nan")), "it holds NaN"),
        (lambda x: x["gate_mass"].__setitem__(2, 10**6), "gate_mass is more than routed"),
        (lambda x: x.update(num_experts=True), "num_experts must be a whole number"),
        (lambda x: x.update(sample_size=0), "sample_size must be a whole number of at least 1"),
        (lambda x: x.pop("dispatched"), "lacks the field 'dispatched'"),
        (lambda x: x.update(routed="many"), "routed must be a list"),
    ],
)
def test_counts_that_cannot_be_are_named(change, complaint, folder):
    edit_json(folder, change)
    with pytest.raises(UserError, match=complaint):
        Stats.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("soft_mass", lambda x: np.full_like(x, np.nan), "holds NaN or infinite"),
        ("soft_mass", lambda x: -x, "holds negative values"),
        ("soft_mass", lambda x: x[:-1], r"has shape \(5,\), expected 6"),
        ("soft_mass", lambda x: x.astype(np.int64), "has dtype int64, expected floats"),
        ("router_logits_gram", lambda x: x[:, :3], r"has shape \(6, 3\), expected 6 x 6"),
        ("input_abs_sum", lambda x: x[:, 1:], "expected 6 x 16"),
        ("sequence_counts", lambda x: x + 1, "does not sum to routed in stats.json"),
        ("sequence_counts", lambda x: x.astype(np.float32), "expected integers"),
        ("output_sum", lambda x: np.full_like(x, np.inf), "holds NaN or infinite"),
    ],
)
def test_sums_that_cannot_be_are_named(name, change, complaint, folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"{LAYER}/{name}": change(tensors[f"{LAYER}/{name}"]).copy()}))
    with pytest.raises(UserError, match=f"{LAYER}/{name} .*{complaint}|{LAYER}/{name} {complaint}"):
        Stats.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("expert", lambda x: x + 6, "names experts that do not exist: they are 0 to 5"),
        ("expert", lambda x: x * 0, "more tokens of an expert than were dispatched"),
        ("gate", lambda x: x + 1, "no probabilities"),
        ("gate", lambda x: x * np.float32(np.nan), "holds NaN"),
        ("inputs", lambda x: x * np.float32(np.inf), "holds NaN or infinite"),
        ("inputs", lambda x: x[:, 1:], "has shape"),
        ("record", lambda x: x[1:], "has shape"),
        ("position", lambda x: x - 10**6, "negative keys or positions"),
    ],
)
def test_a_token_sample_that_cannot_be_is_named_when_it_is_read(name, change, complaint, folder):
    key = f"{LAYER}/sample/{name}"
    edit_tensors(folder, lambda tensors: tensors.update({key: change(tensors[key]).copy()}))
    with pytest.raises(UserError, match=complaint):
        Stats.load(folder).layers[LAYER].tokens()


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}/input_sum"))
    with pytest.raises(UserError, match=f"lacks the tensor {LAYER}/input_sum"):
        Stats.load(folder)


def stored_arrays(stats) -> list[str]:
    layer = stats.layers[LAYER]
    return [name for name in layer.stored.arrays if layer.array(name).size] + [
        f"sample/{name}" for name, array in layer.sample_arrays().items() if array.size
    ]


def test_the_digest_covers_every_array(folder):
    before = Stats.load(folder)
    for name in set(stored_arrays(before)) - {"routed", "dispatched", "gate_mass"}:
        changed = Stats.load(folder)
        layer = changed.layers[LAYER]
        if name.startswith("sample/"):
            arrays = layer.sample_arrays()
            arrays[name.partition("/")[2]].reshape(-1)[-1] += 1
            layer.__dict__["sample_arrays"] = lambda arrays=arrays: arrays
        else:
            layer.array(name).reshape(-1)[-1] += 1
        assert changed.digest != before.digest, name


def test_other_inputs_in_the_token_sample_are_not_those_that_a_plan_was_made_from(switch, folder, tmp_path):
    plan = make_plan(switch, folder, experts=3)
    key = f"{LAYERS[1]}/sample/inputs"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key][::-1].copy()}))
    with pytest.raises(UserError, match="not the statistics that the plan was made from"):
        apply(switch, plan, tmp_path / "out", stats=folder, workers=1)


def test_a_plan_that_names_its_statistics_as_former_versions_did_is_carried_out(switch, stats, tmp_path):
    plan = make_plan(switch, stats, experts=3)
    named = Plan(**{**vars(plan), "stats": {"sha256": stats.former_digest}})
    assert apply(switch, named, tmp_path / "out", stats=stats, workers=1).num_bytes == plan.predicted["bytes"]


def test_the_parts_of_a_sum_are_named_by_their_digests(stats, full_stats):
    with pytest.warns(MsmoeWarning, match="the sum has none|of the same records of .*calibration.jsonl"):
        total = stats + full_stats
    assert total.data["parts"] == sorted([stats.digest, full_stats.digest])


def test_loaded_statistics_give_tensors_and_keep_what_is_replaced(folder):
    from dataclasses import replace

    layer = Stats.load(folder).layers[LAYER]
    doubled = replace(layer, soft_mass=2 * layer.soft_mass)
    assert torch.equal(doubled.soft_mass, 2 * layer.soft_mass)
    assert np.array_equal(doubled.array("soft_mass"), 2 * layer.array("soft_mass"))
    assert torch.equal(doubled.routed, layer.routed)


def test_statistics_are_read_described_and_digested_without_torch(folder):
    code = f"""
import sys
from msmoe.calibration.stats import Stats
from msmoe.calibration.usage import layer_frame
stats = Stats.load({str(folder)!r})
stats.describe(), stats.to_frame(), stats.domain_frame(), layer_frame(stats), stats.digest, stats.covers
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
