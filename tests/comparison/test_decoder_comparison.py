"""Comparisons of decoders: the export of each method, budgets in its bytes, losses by layer, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from decoder_runs import EXPERTS, TOP_K, choices, questions, save_decoder, texts, write_lines
from tiny_decoder import byte_tokenizer

from msmoe.analysis.compare import write_all
from msmoe.calibration.causal import CausalReader
from msmoe.checkpoint import Checkpoint
from msmoe.comparison.cells import mean_loss
from msmoe.comparison.exports import export_of
from msmoe.comparison.run import compare
from msmoe.comparison.scoring import summarise
from msmoe.comparison.settings import REFERENCES
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.families.loading import load
from msmoe.planning.plan import Plan

METHODS = ("m-smoe", "reap", "mone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def decoder(folder):
    return save_decoder(folder / "decoder")


@pytest.fixture(scope="module")
def data(folder):
    return write_lines(folder / "calibration.jsonl", texts(24))


@pytest.fixture(scope="module")
def tasks(folder):
    (folder / "tasks").mkdir()
    write_lines(folder / "tasks" / "questions.jsonl", questions(8))
    write_lines(folder / "tasks" / "choices.jsonl", choices(6))
    write_lines(folder / "tasks" / "text.jsonl", texts(6, seed=5))
    return folder / "tasks"


def run(decoder, data, tasks, out, **options):
    settings = {"methods": METHODS, "experts": (3, 2), "seeds": 1, "samples": 24, "token_sample": 64, "cost": False}
    return compare(decoder, out, data=data, tasks=[tasks], **settings | options)


@pytest.fixture(scope="module")
def compared(decoder, data, tasks, folder):
    out = folder / "out"
    return run(decoder, data, tasks, out, experts=(3,), recover_steps=(0, 2), recovery={"batch_size": 4}), out


def test_what_the_familys_own_class_cannot_hold_is_measured_as_exact(compared):
    results, _ = compared
    found = {cell["method"]: cell.get("export") for cell in results["cells"]}
    assert found == {"full": None, "dense": "exact", "m-smoe": "native", "reap": "native", "mone": "exact"}
    assert results["settings"]["export"] == "native"
    said = next(line for line in summarise(results).legend if "native exports" in line)
    assert "but for dense, mone, which native cannot hold" in said


@pytest.mark.parametrize(
    ("label", "export"),
    [
        ("reap", "native"),
        ("m-smoe-refit", "native"),
        ("m-smoe:budget=uniform", "native"),
        ("m-smoe:budget=adaptive", "exact"),
        ("reap:others=mean-output", "exact"),
        ("mc-smoe", "exact"),
        ("m-smoe:rank=4", "exact"),
        ("dense", "exact"),
    ],
)
def test_the_export_of_a_method_follows_from_what_it_makes(label, export):
    assert export_of(label, "native") == export
    assert export_of(label, "exact") == export_of(label, None) == "exact"


def test_the_budget_is_what_m_smoe_stores_in_the_comparisons_export(compared):
    results, out = compared
    budget = results["budgets"]["3"]
    cells = {cell["method"]: cell for cell in results["cells"] if not cell["recover_steps"]}
    assert cells["m-smoe"]["bytes"] == budget
    assert set(cells["m-smoe"]["kept"].values()) == set(cells["reap"]["kept"].values()) == {3}
    assert cells["mone"]["bytes"] <= budget
    assert Plan.load(out / "plans" / "seed-0" / "reap-3-native.json").predicted["bytes"] == budget


def test_swapping_a_layer_for_the_originals_own_changes_nothing(compared, decoder):
    cells = [cell for cell in compared[0]["cells"] if cell["layer_loss"]]
    names = {layer.name for layer in family_of(Checkpoint(decoder)).layers(Checkpoint(decoder))}
    assert {frozenset(cell["layer_loss"]) for cell in cells} == {frozenset(names)}
    assert all(any(cell["layer_loss"].values()) for cell in cells if cell["method"] not in REFERENCES)


@torch.no_grad()
def test_the_mean_loss_of_records_of_different_lengths_is_that_of_each_alone(decoder):
    reader = CausalReader(byte_tokenizer(), pad_id=0, eos_id=2)
    records = [reader.read(record, "here") for record in (*questions(3), *texts(2))]
    model = load(decoder)
    total = tokens = 0.0
    for record in records:
        ids, labels = torch.tensor([record.input_ids]), torch.tensor([record.labels])
        number = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * number
        tokens += number
    assert mean_loss(model, records) == pytest.approx(total / tokens, rel=1e-5)


def test_a_comparison_runs_to_its_tables_and_figures(compared, tmp_path):
    written = write_all(compared[0], tmp_path, force=True)
    assert {"comparison.md", "comparison.csv", "comparison.tex"} <= {Path(file).name for file in written}
    assert "native exports, but for" in (tmp_path / "comparison.md").read_text()


def test_cells_of_another_export_are_measured_again(compared, decoder, data, tasks):
    results, out = compared
    again = run(decoder, data, tasks, out, experts=(3,), recover_steps=(0, 2), recovery={"batch_size": 4}, resume=True)
    assert again == results
    before = {file.name for file in (out / "cells").iterdir()}
    exact = run(decoder, data, tasks, out, methods=("m-smoe",), experts=(3,), export="exact", resume=True)
    assert exact["settings"]["export"] == "exact"
    new = {file.name for file in (out / "cells").iterdir()} - before
    assert [name.partition("-3-")[0] for name in new] == ["m-smoe"]  # dense was exact before
    assert {cell.get("export") for cell in exact["cells"]} == {None, "exact"}


def test_cost_counts_the_products_of_experts_and_the_tokens_of_a_record_once(decoder, data, tasks, tmp_path):
    results = run(decoder, data, tasks, tmp_path / "out", methods=("m-smoe",), experts=(3,), cost=True)
    [cost] = [entry for name, entry in results["cost"].items() if name.startswith("m-smoe")]
    config = json.loads((decoder / "config.json").read_text())
    experts = 2 * 3 * config["hidden_size"] * config["moe_intermediate_size"] * TOP_K * config["num_hidden_layers"]
    head = 2 * config["hidden_size"] * config["vocab_size"]
    assert experts + head < cost["flops_per_token"] < 2 * (experts + head)
    assert cost["flops_per_token"] == pytest.approx(cost["full"]["flops_per_token"], rel=0.05)  # a router is smaller


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": (1,)}, "qwen3_moe cannot hold 1 experts in each layer: choose one of"),
        ({"experts": (2.5,)}, "--export native needs whole numbers of --experts, got 2.5"),
        ({"keep_layers": ("model.layers.0.mlp",)}, "--export native needs --budget uniform --keep-layer none"),
        ({"export": "dense"}, "unknown export 'dense'"),
        ({"experts": (EXPERTS + 1,)}, r"--experts must be between 1 and 6"),
    ],
)
def test_what_cannot_be_held_is_refused_before_calibration(options, message, decoder, data, tasks, tmp_path):
    with pytest.raises(UserError, match=message):
        run(decoder, data, tasks, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_encoder_decoders_are_compared_as_exact_alone(switch, data, tasks, tmp_path):
    with pytest.raises(UserError, match="measures encoder-decoders as exact, got --export native"):
        run(switch, data, tasks, tmp_path / "out", export="native")
