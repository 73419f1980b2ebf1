"""Factorised checkpoints on disk: sizes, contents, exports, repeatability, and inputs that are refused."""

import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    LAYERS,
    compress,
    load_tensors,
    logits_of,
    profile_small,
    random_records,
    save_switch,
    size_of,
    stored_stack,
    weight_files,
    with_merged_experts,
)
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.checkpoint import Checkpoint
from msmoe.compression.factorize import factorize
from msmoe.errors import UserError
from msmoe.families.inspection import inspect
from msmoe.families.loading import load
from msmoe.formats.modeling.modeling_msmoe import FactorizedWeight
from msmoe.formats.verify import reference_model
from msmoe.planning.plan import Plan

BATCH = random_records(5, seed=9, longest=20)
CASES = [("switch", "exact"), ("switch", "native"), ("exact", "exact"), ("native", "exact"), ("native", "native")]


@pytest.fixture(scope="module")
def written(switch, exact, native, stats, tmp_path_factory):
    """(source, export) -> report of rank 4 with a tenth of the rows, on the statistics of the original."""
    sources = {"switch": switch, "exact": exact, "native": native}
    work = tmp_path_factory.mktemp("written")
    return {
        (source, export): factorize(
            sources[source], work / f"{source}-{export}", stats=stats, rank=4, export=export, workers=1
        )
        for source, export in CASES
    }


def indices_of(folder) -> int:
    """Numbers stored in expert maps and row indices."""
    return sum(t.numel() for n, t in load_tensors(folder).items() if n.endswith((".expert_map", ".rows")))


def expert_of(tensors, layer, e, part):
    """A matrix of the expert stored at `e`, stacked or not, factorised or not."""
    single = f"{layer}.experts.expert_{e}.{part}.weight"
    return tensors[single] if single in tensors else stored_stack(tensors, f"{layer}.experts.{part}")[e]


def snapshot(folder):
    return {file: file.read_bytes() if file.is_file() else None for file in sorted(folder.rglob("*"))}


# Sizes


@pytest.mark.parametrize(("source", "export"), CASES)
def test_the_bytes_and_parameters_reported_are_those_written(source, export, written):
    report = written[source, export]
    tensors = load_tensors(report.out)
    assert report.num_bytes == size_of(report.out)
    assert report.num_parameters == sum(t.numel() for t in tensors.values()) - indices_of(report.out)


def test_the_bytes_are_those_of_a_count_by_hand(written, switch):
    # rank 4: 160 values of U and V, two rows of wi of 16 or of wo of 24 with their indices, in place of 384 values
    expert = 4 * (160 + 2 * 16) + 2 * 4 + 4 * (160 + 2 * 24) + 2 * 4
    maps = 4 * 6 * 8
    expected = size_of(switch) - 3 * 6 * 2 * 384 * 4 + 3 * 6 * expert + maps
    assert written["switch", "exact"].num_bytes == expected


@pytest.mark.parametrize(("source", "export"), CASES)
def test_plan_and_provenance_record_the_size_as_written(source, export, written, switch):
    report = written[source, export]
    provenance = json.loads((report.out / "msmoe.json").read_text())
    assert Plan.load(report.out / "plan.json").predicted["bytes"] == report.num_bytes
    assert provenance["bytes"] == {
        "source": size_of(switch), "predicted": report.num_bytes, "written": report.num_bytes,
    }  # fmt: skip
    assert provenance["export"] == export


def test_inspecting_counts_indices_as_bytes_not_as_parameters(written):
    report = written["exact", "exact"]
    summary = inspect(report.out)
    assert summary.num_parameters == report.num_parameters
    assert summary.num_bytes == report.num_bytes
    rows = sum(t.numel() for n, t in load_tensors(report.out).items() if n.endswith(".rows"))
    assert summary.parts["row indices"] == (0, 4 * rows)


def test_inspecting_lists_the_experts_of_factorised_layers(written, exact):
    before, after = inspect(exact).layers, inspect(written["exact", "exact"].out).layers
    shape = lambda layer: (layer.name, layer.num_experts, layer.num_stored, layer.d_model, layer.d_ff)
    assert [shape(layer) for layer in after] == [shape(layer) for layer in before]
    # the first layer is as it was; the others hold 192 + 208 values per expert and 2 + 2 indices
    assert after[0] == before[0]
    for layer in after[1:]:
        assert (layer.num_parameters, layer.num_bytes) == (400 * layer.num_stored, 1616 * layer.num_stored)


# What the written model computes


@pytest.mark.parametrize("source", ["switch", "exact", "native"])
def test_the_loaded_model_computes_what_the_stock_model_does_with_factors_multiplied_out(source, written, request):
    stock = with_merged_experts(
        request.getfixturevalue("native" if source == "native" else "switch"), written[source, "exact"].out
    )
    ours = load(written[source, "exact"].out)
    scale = float(logits_of(stock, BATCH).abs().max())
    torch.testing.assert_close(logits_of(ours, BATCH), logits_of(stock, BATCH), rtol=0, atol=2e-5 * scale)


def test_the_reference_that_the_package_offers_computes_the_same(written, switch):
    report = written["exact", "exact"]
    wanted = logits_of(reference_model(switch, report.out), BATCH)
    torch.testing.assert_close(
        logits_of(load(report.out), BATCH), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max())
    )


def test_the_loaded_model_holds_factors_not_matrices(written):
    model = load(written["exact", "exact"].out)
    assert not isinstance(model.get_submodule(f"{LAYERS[0]}.experts").wi, FactorizedWeight)
    for layer in LAYERS[1:]:
        assert isinstance(model.get_submodule(f"{layer}.experts.wi"), FactorizedWeight)
        assert isinstance(model.get_submodule(f"{layer}.experts.wo"), FactorizedWeight)


@pytest.mark.parametrize("source", ["switch", "native"])
def test_the_native_export_is_a_stock_checkpoint_with_the_logits_of_the_exact_one(source, written, request):
    report = written[source, "native"]
    stock, info = SwitchTransformersForConditionalGeneration.from_pretrained(report.out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((report.out / "config.json").read_text()) == json.loads(
        (request.getfixturevalue(source) / "config.json").read_text()
    )
    ours = logits_of(load(written[source, "exact"].out), BATCH)
    torch.testing.assert_close(logits_of(stock.eval(), BATCH), ours, rtol=0, atol=2e-5 * float(ours.abs().max()))


@pytest.mark.parametrize(("source", "export"), CASES)
def test_everything_but_the_experts_is_copied_bit_for_bit(source, export, written, request):
    before, after = load_tensors(request.getfixturevalue(source)), load_tensors(written[source, export].out)
    others = [name for name in before if ".experts." not in name]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize(("source", "export"), CASES)
def test_the_first_layer_of_the_encoder_is_kept_bit_for_bit(source, export, written, request):
    before, after = load_tensors(request.getfixturevalue(source)), load_tensors(written[source, export].out)
    for part in ("wi", "wo"):
        for e in range(3 if source == "native" else 6):
            assert torch.equal(expert_of(before, LAYERS[0], e, part), expert_of(after, LAYERS[0], e, part))


def test_layers_named_are_kept_and_no_others(exact, tmp_path):
    report = factorize(exact, tmp_path / "out", rank=4, keep_layers=[LAYERS[1], LAYERS[3]])
    before, after = load_tensors(exact), load_tensors(tmp_path / "out")
    assert list(report.shapes) == [LAYERS[0], LAYERS[2]]
    for layer in (LAYERS[1], LAYERS[3]):
        assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(layer))
    for layer in (LAYERS[0], LAYERS[2]):
        assert f"{layer}.experts.wi" not in after


def test_none_keeps_no_layer(exact, tmp_path):
    assert list(factorize(exact, tmp_path / "out", rank=4, keep_layers=["none"]).shapes) == list(LAYERS)


def test_a_matrix_whose_factors_would_be_larger_stays_dense_and_is_reported(exact, tmp_path):
    # rank 9 with 0.05 of the rows: 376 values and an index for wi, 360 + 24 for wo, of 384
    report = factorize(exact, tmp_path / "out", rank=9, keep_rows=0.05)
    before, after = load_tensors(exact), load_tensors(tmp_path / "out")
    assert report.dense == tuple((name, "wo") for name in LAYERS[1:])
    for layer in LAYERS[1:]:
        assert torch.equal(before[f"{layer}.experts.wo"], after[f"{layer}.experts.wo"])
        assert after[f"{layer}.experts.wi.U"].shape == (len(after[f"{layer}.experts.wo"]), 24, 9)
    assert load(tmp_path / "out").config.factors == {name: {"wi": [9, 1]} for name in LAYERS[1:]}


def test_a_rank_that_saves_nothing_anywhere_gives_the_checkpoint_itself(exact, tmp_path):
    report = factorize(exact, tmp_path / "out", rank=16)
    assert set(report.dense) == {(layer, matrix) for layer in LAYERS[1:] for matrix in ("wi", "wo")}
    before, after = load_tensors(exact), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_a_size_the_rank_is_the_largest_that_fits_a_small_model(exact, tmp_path):
    report = factorize(exact, tmp_path / "out")  # 32 for larger ones
    assert weight_files(tmp_path / "out") == weight_files(factorize(exact, tmp_path / "other", rank=16).out)
    assert report.num_bytes == size_of(exact)


def test_factors_without_kept_rows_load_and_compute(exact, switch, tmp_path):
    factorize(exact, tmp_path / "out", rank=4, keep_rows=0.0)
    stock, ours = with_merged_experts(switch, tmp_path / "out"), load(tmp_path / "out")
    scale = float(logits_of(stock, BATCH).abs().max())
    torch.testing.assert_close(logits_of(ours, BATCH), logits_of(stock, BATCH), rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("export", ["exact", "native"])
def test_as_many_rows_as_are_kept_come_back_exact(export, switch, tmp_path):
    factorize(switch, tmp_path / "out", rank=4, keep_rows=0.5, export=export)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    for layer in LAYERS[1:]:
        for e in range(6):
            for part, num_rows in (("wi", 12), ("wo", 8)):
                difference = expert_of(before, layer, e, part) - expert_of(after, layer, e, part)
                assert int((difference.abs().amax(dim=1) < 1e-6).sum()) == num_rows


@pytest.mark.parametrize(("dtype", "weighted"), [(torch.bfloat16, True), (torch.float16, False)])
def test_a_half_precision_checkpoint_stays_in_half_precision(dtype, weighted, data, tmp_path):
    half = save_switch(tmp_path / "half", dtype=dtype)
    report = factorize(half, tmp_path / "out", stats=profile_small(half, data) if weighted else None, rank=4)
    tensors = load_tensors(tmp_path / "out")
    kinds = {t.dtype for name, t in tensors.items() if not name.endswith((".rows", ".expert_map"))}
    assert kinds == {dtype}
    assert {t.dtype for name, t in tensors.items() if name.endswith(".rows")} == {torch.int32}
    assert report.num_bytes == size_of(tmp_path / "out")
    ours, stock = load(tmp_path / "out", dtype=dtype), with_merged_experts(half, tmp_path / "out", dtype=dtype)
    scale = float(logits_of(stock, BATCH).abs().max())
    tolerance = 16 * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(logits_of(ours, BATCH), logits_of(stock, BATCH), rtol=0, atol=tolerance)


def test_kept_rows_of_a_half_precision_checkpoint_are_exact_to_rounding(tmp_path):
    half = save_switch(tmp_path / "half", dtype=torch.bfloat16)
    factorize(half, tmp_path / "out", rank=2, keep_rows=0.5)
    before, after = load_tensors(half), load_tensors(tmp_path / "out")
    for layer in LAYERS[1:]:
        name = f"{layer}.experts.wi"
        dense, low_rank = stored_stack(after, name), after[f"{name}.U"].float() @ after[f"{name}.V"].float()
        for e in range(6):
            weight = before[f"{layer}.experts.expert_{e}.wi.weight"].float()
            rows = after[f"{name}.rows"][e].tolist()
            allowed = torch.finfo(torch.bfloat16).eps / 2 * (weight - low_rank[e]).abs() + 1e-6
            assert ((dense[e] - weight).abs() <= allowed)[rows].all()


def test_a_factorised_native_checkpoint_can_be_factorised_again(tmp_path):
    source = save_switch(tmp_path / "ckpt", d_ff=64)
    first = factorize(source, tmp_path / "first", rank=2, keep_rows=0.0, export="native")
    again = factorize(first.out, tmp_path / "again", rank=12, keep_rows=0.0)  # far beyond the rank of wi and wo
    assert max(entry["weight_error"] for entry in again.matrices) < 1e-5
    assert all(t.isfinite().all() for t in load_tensors(again.out).values())


# Quality


def output_error(folder, source, stats) -> float:
    """Squared error of the outputs of all experts on the calibration tokens, by their gates, relative."""
    before, after = load_tensors(source), load_tensors(folder)
    error = total = 0.0
    for layer in LAYERS[1:]:
        sample, mapping = stats.layers[layer].tokens(), after[f"{layer}.expert_map"]
        stacks = [stored_stack(after, f"{layer}.experts.{part}") for part in ("wi", "wo")]
        for e in range(6):
            mine = sample.expert[:, 0] == e
            x, gate = sample.inputs[mine], sample.gate[mine]
            wi, wo = (before[f"{layer}.experts.expert_{e}.{part}.weight"] for part in ("wi", "wo"))
            new_wi, new_wo = (stack[mapping[e]] for stack in stacks)
            wanted = (x @ wi.T).relu() @ wo.T * gate
            error += float(((x @ new_wi.T).relu() @ new_wo.T * gate - wanted).square().sum())
            total += float(wanted.square().sum())
    return error / total


def test_statistics_lower_the_output_error_and_refit_lowers_it_further(switch, stats, tmp_path):
    common = {"stats": stats, "rank": 4, "workers": 1}
    errors = {}
    for name, options in {
        "plain": {"svd": "plain", "refit": False},
        "activation": {"refit": False},
        "refit": {},
    }.items():
        factorize(switch, tmp_path / name, **common, **options)
        errors[name] = output_error(tmp_path / name, switch, stats)
    assert errors["refit"] < 0.95 * errors["activation"] < 0.9 * errors["plain"]


def test_a_budget_is_spent_better_than_on_the_same_rank_everywhere(switch, stats, tmp_path):
    even = factorize(switch, tmp_path / "even", stats=stats, rank=4, refit=False)
    spread = factorize(switch, tmp_path / "spread", stats=stats, target_bytes=even.num_bytes, refit=False)
    assert spread.num_bytes <= even.num_bytes
    assert output_error(spread.out, switch, stats) < output_error(even.out, switch, stats)


def test_more_rank_and_more_rows_lower_the_output_error(switch, stats, tmp_path):
    def error(rank, keep_rows):
        out = factorize(switch, tmp_path / f"{rank}-{keep_rows}", stats=stats, rank=rank, keep_rows=keep_rows).out
        return output_error(out, switch, stats)

    assert error(2, 0.1) > error(4, 0.1) > error(7, 0.1)
    assert error(3, 0.0) > error(3, 0.25) > error(3, 0.6)


# Repeatability and files


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.7}, {"target_ratio": 0.75}])
def test_the_weights_do_not_depend_on_the_number_of_workers(options, switch, stats, tmp_path):
    for workers in (1, 2):
        factorize(switch, tmp_path / str(workers), stats=stats, workers=workers, **options)
    assert weight_files(tmp_path / "1") == weight_files(tmp_path / "2")


def test_the_same_run_twice_gives_the_same_folder_byte_for_byte(exact, stats, factorized, tmp_path):
    factorize(exact, tmp_path / "again", stats=stats, rank=4, workers=2)
    assert {f.name: f.read_bytes() for f in factorized.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


def test_statistics_may_be_given_as_a_folder(exact, stats, factorized, tmp_path):
    stats.save(tmp_path / "stats")
    factorize(exact, tmp_path / "out", stats=tmp_path / "stats", rank=4)
    assert weight_files(tmp_path / "out") == weight_files(factorized)


def test_shards_hold_the_same_tensors_as_one_file(exact, stats, factorized, tmp_path):
    factorize(exact, tmp_path / "out", stats=stats, rank=4, max_shard_bytes=20_000)
    whole, parts = load_tensors(factorized), load_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.7}, {"target_ratio": 0.8}])
def test_the_source_is_not_changed_and_nothing_is_left_beside_the_output(options, exact, stats, tmp_path):
    shutil.copytree(exact, tmp_path / "ckpt")
    before = snapshot(tmp_path / "ckpt")
    factorize(tmp_path / "ckpt", tmp_path / "out", stats=stats, **options)
    assert snapshot(tmp_path / "ckpt") == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt", "out"]


def test_the_plan_of_a_merged_checkpoint_travels_on(exact, factorized):
    before, after = Plan.load(exact / "plan.json"), Plan.load(factorized / "plan.json")
    assert (after.method, after.layers, after.checkpoint) == (before.method, before.layers, before.checkpoint)


def test_the_plan_of_a_factorised_original_keeps_every_expert(written):
    plan = Plan.load(written["switch", "exact"].out / "plan.json")
    assert {name: layer.expert_map for name, layer in plan.layers.items()} == {n: list(range(6)) for n in LAYERS}


def test_options_and_fingerprints_are_recorded(factorized, exact, switch, stats):
    provenance = json.loads((factorized / "msmoe.json").read_text())
    assert provenance["factors"]["options"] == {
        "rank": 4, "keep_rows": 0.1, "energy": None, "target_bytes": None, "target_ratio": None,
        "svd": "activation", "row_score": "activation", "refit": True,
    }  # fmt: skip
    assert provenance["source"]["fingerprint"] == Checkpoint(switch).fingerprint
    assert provenance["stats"] == {"sha256": stats.digest}
    assert provenance["groups"] == json.loads((exact / "msmoe.json").read_text())["groups"]


def test_the_model_card_names_the_shape_of_every_factorised_matrix(factorized):
    card = (factorized / "README.md").read_text()
    for layer in LAYERS[1:]:
        assert f"| `{layer}` | wi | rank 4, 2 rows |" in card
        assert f"| `{layer}` | wo | rank 4, 2 rows |" in card


def test_progress_counts_the_factorised_layers(exact, tmp_path):
    calls = []
    factorize(exact, tmp_path / "out", rank=4, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_force_replaces_an_existing_folder_completely(exact, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "msmoe.json").touch()
    (tmp_path / "out" / "old").write_text("old")
    factorize(exact, tmp_path / "out", rank=4, force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# Refusals


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 17}, rf"--rank must be between 1 and 16: the experts of {LAYERS[1]} are 24 x 16; got 17"),
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"rank": 4, "keep_rows": 1.5}, "--keep-rows must be between 0 and 1, got 1.5"),
        ({"energy": 1.5}, "--energy must be above 0 and at most 1, got 1.5"),
        ({"target_ratio": 1.5}, "--target-ratio must be above 0 and at most 1, got 1.5"),
        ({"rank": 4, "target_ratio": 0.5}, "give one of --rank, --target-ratio, not 2"),
        ({"target_ratio": 0.9}, "--target-ratio needs --stats"),
        ({"target_bytes": 90_000}, "--target-bytes needs --stats"),
        ({"rank": 4, "svd": "activation"}, "--svd activation needs --stats"),
        ({"rank": 4, "refit": True}, "--refit needs --stats"),
        ({"rank": 4, "svd": "randomised"}, "unknown --svd 'randomised'; choose one of activation, plain"),
        ({"rank": 4, "row_score": "usage"}, "unknown --row-score 'usage'; choose one of activation, magnitude"),
        ({"rank": 4, "keep_layers": ["encoder.block.2"]}, f"'encoder.block.2'; choose from {LAYERS[0]}, {LAYERS[1]}"),
        ({"rank": 4, "keep_layers": list(LAYERS)}, "every MoE layer is kept: nothing to factorise"),
        ({"rank": 4, "export": "dense"}, "--export dense .* choose exact"),
        ({"rank": 4, "export": "onnx"}, "--export onnx .* choose exact"),
        ({"rank": 4, "export": "native"}, "--export native needs a stock checkpoint"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_nothing_is_left(options, complaint, exact, tmp_path):
    with pytest.raises(UserError, match=complaint):
        factorize(exact, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_budget_below_the_smallest_model_is_refused_with_its_size(exact, stats, tmp_path):
    # nine stored experts of three layers, two matrices of 384 values each, can become 40 values each
    smallest = size_of(exact) - 9 * 2 * (384 - 40) * 4
    with pytest.raises(UserError, match=f"budget of 50,000 bytes is below the smallest possible model: {smallest:,}"):
        factorize(exact, tmp_path / "out", stats=stats, target_bytes=50_000)
    assert not list(tmp_path.iterdir())


def test_a_budget_for_the_native_export_is_refused(native, stats, tmp_path):
    with pytest.raises(UserError, match="--export native multiplies the factors out"):
        factorize(native, tmp_path / "out", stats=stats, target_ratio=0.9, export="native")


def test_a_factorised_checkpoint_is_refused(factorized, tmp_path):
    with pytest.raises(UserError, match="is factorised already: start from the checkpoint"):
        factorize(factorized, tmp_path / "out", rank=2)


def test_statistics_of_another_checkpoint_are_refused(exact, data, tmp_path):
    other = profile_small(save_switch(tmp_path / "other", seed=1), data)
    with pytest.raises(UserError, match="statistics are of another checkpoint"):
        factorize(exact, tmp_path / "out", stats=other, rank=4)
    assert not (tmp_path / "out").exists()


def test_statistics_of_the_merged_checkpoint_itself_are_accepted(native, data, tmp_path):
    own = profile_small(native, data)
    report = factorize(native, tmp_path / "out", stats=own, rank=4)
    assert all(entry["output_error"] is not None for entry in report.matrices if entry["layer"] == LAYERS[2])


def test_the_original_named_for_stable_ranks_must_be_the_one_that_was_merged(exact, tmp_path):
    other = save_switch(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="plan was made for another checkpoint than"):
        factorize(exact, tmp_path / "out", rank=4, original=other)
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_an_existing_folder_is_not_touched_without_force(exact, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(UserError, match="out exists; use --force"):
        factorize(exact, tmp_path / "out", rank=4)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.7}, {"target_ratio": 0.75}])
def test_nan_weights_are_named_and_nothing_is_left(options, copied, stats, tmp_path):
    key = f"{LAYERS[2]}.experts.expert_3.wo.weight"
    tensors = load_file(copied / "model.safetensors")
    tensors[key][8, 12] = float("nan")
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(copied)
    of_copy = {"model_type": checkpoint.model_type, "fingerprint": checkpoint.fingerprint}
    with pytest.raises(UserError, match=f"tensor {key} of .* holds NaN or infinite"):
        factorize(copied, tmp_path / "out", stats=replace(stats, checkpoint=of_copy), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["copied"]


def test_a_disk_that_fills_up_while_decompositions_are_kept_is_reported(exact, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # bytes of a file
    try:
        with pytest.raises(UserError, match=r"cannot write .*out\S*: the file would be larger"):
            factorize(exact, tmp_path / "out", energy=0.7, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_model_without_experts_is_refused(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    dense = {name: t for name, t in tensors.items() if ".experts." not in name and ".router." not in name}
    save_file(dense, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not a Mixture-of-Experts model"):
        factorize(copied, tmp_path / "out", rank=4)


def test_a_factorised_checkpoint_cannot_be_merged(factorized, stats, tmp_path):
    with pytest.raises(UserError, match="is compressed already: start from its original"):
        compress(factorized, stats, tmp_path / "out")
