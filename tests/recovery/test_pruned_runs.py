"""Runs that prune rows: what is stored is the masked model, in fewer rows."""

import json
import shutil

import pytest
import torch
from tiny import bits, load_tensors, logits_of, random_records
from trials import LAYERS, short, started, values_of

from msmoe.families.loading import load

BATCH = random_records(6, seed=21)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def finished(trainer):
    """A run after its end, and the logits of its model after the last step."""
    trainer.run(None)
    logits = logits_of(trainer.model.eval(), BATCH)
    trainer.finish()
    return trainer, logits


PRUNED = {"keep_rows": 0.25, "steps": 12, "evaluate_every": 12}


@pytest.fixture(scope="module")
def pruned(factorised, teacher, lessons, tmp_path_factory):
    """A factorised student whose rows were pruned from a half to a quarter."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    return finished(started(factorised, out, data=lessons, teacher=teacher, **PRUNED))


@pytest.fixture(scope="module")
def pruned_in_memory(student, teacher, lessons, tmp_path_factory):
    """A dense student that was factorised in memory and pruned; every layer, as its plan keeps none."""
    copy = shutil.copytree(student, tmp_path_factory.mktemp("dense student") / "ckpt")
    plan = json.loads((copy / "plan.json").read_text())
    plan["parameters"]["keep_layers"] = ["none"]
    (copy / "plan.json").write_text(json.dumps(plan))
    out = tmp_path_factory.mktemp("pruned") / "out"
    return finished(started(copy, out, data=lessons, teacher=teacher, rank=4, **PRUNED))


BOTH = pytest.mark.parametrize("which", ["pruned", "pruned_in_memory"])


@BOTH
def test_pruned_rows_are_not_stored(which, request):
    trainer, _ = request.getfixturevalue(which)
    stored = load_tensors(trainer.out)
    shapes = {name: tuple(t.shape) for name, t in stored.items() if ".experts." in name}
    # rank 4; 24 outputs and 16 inputs for wi, the other way round for wo; a quarter of the outputs is kept
    expected = {}
    for layer in LAYERS:
        for matrix, (outputs, inputs) in (("wi", (24, 16)), ("wo", (16, 24))):
            rows = outputs // 4
            parts = {"U": (2, outputs, 4), "V": (2, 4, inputs), "S": (2, rows, inputs), "rows": (2, rows)}
            expected |= {f"{layer}.experts.{matrix}.{part}": shape for part, shape in parts.items()}
    assert shapes == expected


@BOTH
def test_the_configuration_states_the_rows_that_are_left(which, request):
    trainer, _ = request.getfixturevalue(which)
    assert load(trainer.out).config.factors == {name: {"wi": [4, 6], "wo": [4, 4]} for name in LAYERS}


@BOTH
def test_the_written_rows_give_the_logits_of_the_masked_model(which, request):
    trainer, masked = request.getfixturevalue(which)
    assert trainer.best_step == 12
    close(logits_of(load(trainer.out), BATCH), masked)


@BOTH
def test_pruning_predicts_the_bytes_that_it_writes(which, request):
    trainer, _ = request.getfixturevalue(which)
    size = sum(t.numel() * t.element_size() for t in load_tensors(trainer.out).values())
    provenance = json.loads((trainer.out / "msmoe.json").read_text())
    assert size == provenance["bytes"]["predicted"] == provenance["bytes"]["written"]


def test_pruning_moves_nothing_but_factors(pruned, factorised):
    before, after = load_tensors(factorised), load_tensors(pruned[0].out)
    frozen = [name for name in before if ".experts." not in name]
    assert frozen
    assert all(bits(before[name]) == bits(after[name]) for name in frozen)


def test_rows_that_are_kept_are_rows_that_the_student_had(pruned, factorised):
    before, after = load_tensors(factorised), load_tensors(pruned[0].out)
    for name in (n for n in before if n.endswith(".rows")):
        for old, new in zip(before[name].tolist(), after[name].tolist(), strict=True):
            assert set(new) < set(old)
            assert new == sorted(new)


def test_the_share_of_rows_in_the_log_falls_to_the_final_one(pruned):
    # 12 + 8 rows at the start, 6 + 4 in the end: from all of them to a half; cool-down is one step of 12
    shares = list(values_of(pruned[0].folder / "metrics.jsonl", "rows_kept").values())
    assert shares == sorted(shares, reverse=True)
    assert (shares[0] < 1, shares[-2], shares[-1]) == (True, 0.5, 0.5)


def test_the_model_card_states_the_rows_that_are_left(pruned):
    card = (pruned[0].out / "README.md").read_text()
    for layer in LAYERS:
        assert f"| `{layer}` | wi | rank 4, 6 rows |" in card
        assert f"| `{layer}` | wo | rank 4, 4 rows |" in card


def test_without_room_for_a_row_none_is_kept(student, lessons, tmp_path):
    trainer, masked = finished(
        started(student, tmp_path / "out", data=lessons, rank=3, keep_rows=0.01, steps=3, evaluate_every=3)
    )
    stored = load_tensors(trainer.out)
    assert {t.shape[1] for name, t in stored.items() if name.endswith((".S", ".rows"))} == {0}
    close(logits_of(load(trainer.out), BATCH), masked)


def test_a_layer_that_the_plan_keeps_is_not_factorised(student, lessons, tmp_path):
    report = short(student, tmp_path / "out", data=lessons, teacher=None, rank=3, keep_rows=0.2)
    assert list(load(report.out).config.factors) == [LAYERS[1]]  # by default the first layer of the encoder is kept
    assert f"{LAYERS[0]}.experts.wi" in load_tensors(report.out)
