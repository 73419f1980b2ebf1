"""Apply: the written weights against naive merging, and faults: bad inputs, killed processes, full disks."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import (
    LAYERS,
    compress,
    layer_plan,
    load_tensors,
    logits_of,
    plan_for,
    profile_small,
    save_switch,
    size_of,
    stored_stack,
    weight_files,
)
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.planning.plan import Group, LayerPlan
from msmoe.planning.planner import plan as make_plan

LAYER = LAYERS[1]
PLANNED = {LAYER: layer_plan(6, [4, 0, 2], [1], [3, 5])}
PRUNED = LayerPlan(6, layer_plan(6, [2], [0], [5]).groups, removed=(1, 3, 4))


def merged_naively(tensors, layer, group, *, reference):
    """Align each member to the reference by an assignment over both matrices, then add up with the weights."""
    expert = lambda e: [tensors[f"{layer}.experts.expert_{e}.{part}.weight"].float() for part in ("wi", "wo")]
    wi_ref, wo_ref = expert(reference)
    total_wi, total_wo = torch.zeros_like(wi_ref), torch.zeros_like(wo_ref)
    for member, weight in zip(group.members, group.weights, strict=True):
        wi, wo = expert(member)
        _, order = linear_sum_assignment((wi_ref @ wi.T + wo_ref.T @ wo).numpy(), maximize=True)
        total_wi += weight * wi[order]
        total_wo += weight * wo[:, order]
    return total_wi, total_wo


@pytest.mark.parametrize("align_to", ["dominant", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_experts_are_the_naive_average_of_aligned_members(dtype, align_to, data, tmp_path):
    source = save_switch(tmp_path / "ckpt", dtype=dtype)
    plan = compress(
        source, profile_small(source, data), tmp_path / "out", experts=2, method="m-smoe", align_to=align_to
    )
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    for name, layer in plan.layers.items():
        for group in layer.groups:
            index = layer.expert_map[group.dominant]
            written = after[f"{name}.experts.wi"][index], after[f"{name}.experts.wo"][index]
            if len(group.members) > 1:
                expected = merged_naively(
                    before, name, group, reference=group.dominant if align_to == "dominant" else 0
                )
                for ours, naive in zip(written, expected, strict=True):
                    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
                    torch.testing.assert_close(ours.float(), naive, rtol=tolerance, atol=1e-6)


def test_hand_worked_weights_are_written(switch, tmp_path):
    group = Group(2, (0, 2), (0.25, 0.75))
    others = tuple(Group(e, (e,), (1.0,)) for e in (1, 3, 4, 5))
    apply(switch, plan_for(Checkpoint(switch), {LAYER: LayerPlan(6, (group, *others))}), tmp_path / "out")
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    key = f"{LAYER}.experts.expert_{{}}.wi.weight"
    expected = before[key.format(0)] / 4 + before[key.format(2)] * 3 / 4  # no alignment in this plan
    # stored by dominant expert: 1, 2, 3, 4, 5
    assert after[f"{LAYER}.expert_map"].tolist() == [1, 0, 1, 2, 3, 4]
    torch.testing.assert_close(after[f"{LAYER}.experts.wi"][1], expected, rtol=1e-6, atol=1e-7)


def test_experts_alone_in_their_group_are_copied_bit_for_bit(switch, tmp_path):
    apply(switch, plan_for(Checkpoint(switch), PLANNED), tmp_path / "out")
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    assert torch.equal(after[f"{LAYER}.experts.wo"][0], before[f"{LAYER}.experts.expert_1.wo.weight"])


def test_all_other_tensors_are_copied_bit_for_bit(switch, exact):
    before, after = load_tensors(switch), load_tensors(exact)
    others = [name for name in before if ".experts." not in name]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("export", ["exact", "native"])
def test_weights_do_not_depend_on_the_number_of_workers(export, switch, stats, tmp_path):
    choices = {"export": export, "apply_options": {"router": "dominant"}}
    compress(switch, stats, tmp_path / "one", **choices)
    plan = tmp_path / "one" / "plan.json"
    apply(switch, plan, tmp_path / "two", stats=stats, export=export, router="dominant", workers=2)
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "two")


def test_the_same_run_twice_gives_the_same_folder_byte_for_byte(switch, stats, exact, tmp_path):
    compress(switch, stats, tmp_path / "again")
    assert {f.name: f.read_bytes() for f in exact.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


def test_shards_hold_the_same_tensors_as_one_file(switch, stats, exact, tmp_path):
    compress(switch, stats, tmp_path / "out", apply_options={"max_shard_bytes": 20_000})
    files = list((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole, parts = load_tensors(exact), load_tensors(tmp_path / "out")
    assert len(files) > 3
    assert index["weight_map"].keys() == whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_sharded_checkpoint_gives_the_same_weights_as_a_single_file(stats, exact, data, tmp_path):
    sharded = save_switch(tmp_path / "sharded", max_shard_size="20KB")
    apply(sharded, exact / "plan.json", tmp_path / "out", stats=stats)
    whole, parts = load_tensors(exact), load_tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_small_files_of_the_source_travel_along_and_pickles_do_not(copied, tmp_path):
    (copied / "spiece.model").write_bytes(b"tokens")
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    (copied / "modeling_evil.py").write_text("raise SystemExit")
    apply(copied, plan_for(Checkpoint(copied), PLANNED), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"tokens"
    assert {"generation_config.json", "plan.json", "msmoe.json", "README.md", "modeling_msmoe.py"} <= names
    assert not {"pytorch_model.bin", "modeling_evil.py"} & names


def test_provenance_records_predicted_and_written_bytes(switch, exact):
    provenance = json.loads((exact / "msmoe.json").read_text())
    size = sum(t.numel() * t.element_size() for t in load_tensors(exact).values())
    assert provenance["bytes"] == {"source": Checkpoint(switch).num_bytes, "predicted": size, "written": size}
    assert provenance["source"]["fingerprint"] == Checkpoint(switch).fingerprint


def test_the_source_is_not_changed(copied, tmp_path):
    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    apply(copied, plan_for(Checkpoint(copied), PLANNED), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before


def test_refit_without_statistics_is_refused_in_one_line(switch, stats, tmp_path):
    plan = make_plan(switch, stats, method="m-smoe-refit", experts=3)
    with pytest.raises(UserError, match="needs --stats for its refit"):
        apply(switch, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_statistics_other_than_the_plans_are_refused(switch, stats, data, tmp_path):
    plan = make_plan(switch, stats, experts=3)
    with pytest.raises(UserError, match="not the statistics that the plan was made from"):
        apply(switch, plan, tmp_path / "out", stats=profile_small(switch, data, samples=5))


def test_statistics_of_another_model_are_refused(switch, stats, data, tmp_path):
    other = save_switch(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="statistics are of another checkpoint"):
        apply(switch, make_plan(switch, stats, experts=3), tmp_path / "out", stats=profile_small(other, data))


def test_a_plan_of_another_checkpoint_is_refused(switch, stats, tmp_path):
    other = save_switch(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="plan was made for another checkpoint"):
        apply(other, make_plan(switch, stats, experts=3), tmp_path / "out", stats=stats)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([[0, 1, 2], [2, 3, 4, 5]], "expert 2 is named twice"),
        ([[0, 1, 2], [3, 4, 9]], "expert 9 is out of range"),
        ([[0, 1, 2], [3, 4]], "expert 5 is in no group"),
    ],
)
def test_a_plan_made_in_python_is_checked_like_a_file(groups, complaint, switch, tmp_path):
    with pytest.raises(UserError, match=complaint):
        apply(switch, plan_for(Checkpoint(switch), {LAYER: layer_plan(6, *groups)}), tmp_path / "out")


def test_a_removed_expert_leaves_with_its_router_row(switch, tmp_path):
    apply(switch, plan_for(Checkpoint(switch), {LAYER: PRUNED}), tmp_path / "out")
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    row = f"{LAYER}.router.classifier.weight"
    assert torch.equal(after[row], before[row][[0, 2, 5]])
    assert after[f"{LAYER}.expert_map"].tolist() == [0, 1, 2]
    for place, e in enumerate((0, 2, 5)):
        assert torch.equal(after[f"{LAYER}.experts.wi"][place], before[f"{LAYER}.experts.expert_{e}.wi.weight"])


def test_a_pruned_layer_has_room_for_the_tokens_of_the_removed_experts(dropping_switch, tmp_path):
    apply(dropping_switch, plan_for(Checkpoint(dropping_switch), {LAYER: PRUNED}), tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.get_submodule(f"{LAYER}.router").expert_capacity == 4  # 2 * 6 / 3
    assert model.get_submodule(f"{LAYERS[2]}.router").expert_capacity == 2


def test_uniform_pruning_has_a_stock_export_with_the_kept_rows(switch, stats, records, tmp_path):
    plan = make_plan(switch, stats, method="reap", experts=3, keep_layers=["none"], export="native")
    apply(switch, plan, tmp_path / "native", export="native")
    apply(switch, plan, tmp_path / "exact")
    stock = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    torch.testing.assert_close(logits_of(stock, records), logits_of(load(tmp_path / "exact"), records))


def test_mean_outputs_are_the_means_over_the_removed_experts_own_tokens(switch, stats, tmp_path):
    plan = plan_for(Checkpoint(switch), {LAYER: PRUNED}, others="mean-output")
    apply(switch, plan, tmp_path / "out", stats=stats)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    sample = stats.layers[LAYER].tokens()  # all tokens: the sample is larger than the data
    assert after[f"{LAYER}.expert_map"].tolist() == [0, 3, 1, 4, 5, 2]
    for place, e in enumerate(PRUNED.removed):
        wi, wo = (before[f"{LAYER}.experts.expert_{e}.{part}.weight"] for part in ("wi", "wo"))
        expected = ((sample.inputs[sample.of(e)[0]] @ wi.T).relu() @ wo.T).mean(0)
        torch.testing.assert_close(after[f"{LAYER}.experts.constants"][place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("export", ["native", "dense"])
def test_mean_outputs_need_the_exact_export(export, switch, stats, tmp_path):
    plan = plan_for(Checkpoint(switch), dict.fromkeys(LAYERS, PRUNED), others="mean-output")
    with pytest.raises(UserError, match=r"mean outputs|one expert in every MoE layer"):
        apply(switch, plan, tmp_path / "out", stats=stats, export=export)


def test_mean_outputs_need_statistics(switch, tmp_path):
    with pytest.raises(UserError, match="needs --stats for the mean outputs"):
        apply(switch, plan_for(Checkpoint(switch), {LAYER: PRUNED}, others="mean-output"), tmp_path / "out")


def test_a_pruned_checkpoint_can_be_factorised_on_the_tokens_that_its_router_sends(switch, stats, tmp_path):
    plan = make_plan(switch, stats, method="frequency", experts=3)
    apply(switch, plan, tmp_path / "pruned")
    report = factorize(tmp_path / "pruned", tmp_path / "out", stats=stats, rank=8, keep_rows=1.0, refit=False)
    assert report.num_bytes == size_of(tmp_path / "out")
    whole, parts = load_tensors(tmp_path / "pruned"), load_tensors(tmp_path / "out")
    for name in plan.layers:
        torch.testing.assert_close(
            stored_stack(parts, f"{name}.experts.wi"), whole[f"{name}.experts.wi"], atol=1e-5, rtol=1e-4
        )


def test_nan_weights_are_named_and_nothing_is_left(copied, tmp_path):
    from transformers import SwitchTransformersForConditionalGeneration

    model = SwitchTransformersForConditionalGeneration.from_pretrained(copied)
    key = f"{LAYER}.experts.expert_5.wi.weight"
    with torch.no_grad():
        model.get_parameter(key)[2, 3] = float("inf")
    model.save_pretrained(copied)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UserError, match=f"tensor {key} of .* holds NaN or infinite"):
        apply(copied, plan_for(Checkpoint(copied), PLANNED), target / "out")
    assert not list(target.iterdir())


def test_an_existing_folder_is_not_touched_without_force(switch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(UserError, match="out exists; use --force"):
        apply(switch, plan_for(Checkpoint(switch), PLANNED), tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "precious"]


def test_force_replaces_an_existing_folder_completely(switch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "msmoe.json").touch()
    (tmp_path / "out" / "old").write_text("old")
    apply(switch, plan_for(Checkpoint(switch), PLANNED), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert Checkpoint(tmp_path / "out").num_bytes > 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_force_keeps_the_old_folder_if_the_run_fails(switch, stats, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "msmoe.json").write_text("old")

    def fail(done, total):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        apply(switch, plan_for(Checkpoint(switch), PLANNED), tmp_path / "out", force=True, progress=fail)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "msmoe.json"]


def test_a_full_disk_is_reported_before_any_weight_is_written(switch, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs .* bytes, the disk has 1,000 free"):
        apply(switch, plan_for(Checkpoint(switch), PLANNED), tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
    import json, os, signal, sys
    from msmoe.compression.apply import apply

    for job in json.loads(sys.argv[1]):
        def progress(done, total):
            if done == total - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            apply(**job, router="dominant", workers=1, progress=progress)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed_runs(switch, stats, tmp_path_factory):
    """Export -> what a process leaves that was killed before its last group, the plan, and an untouched result."""
    work, runs, jobs = tmp_path_factory.mktemp("killed"), {}, []
    stats.save(work / "stats")
    for export, choices in (("exact", {}), ("native", {"budget": "uniform", "keep_layers": ["none"]})):
        folder, plan = work / export, make_plan(switch, stats, experts=3, export=export, **choices)
        folder.mkdir()
        plan.save(work / f"{export}.json")
        apply(switch, plan, folder / "whole", stats=stats, export=export, router="dominant")
        paths = {"checkpoint": switch, "plan": work / f"{export}.json", "stats": work / "stats", "out": folder / "out"}
        jobs.append({key: str(path) for key, path in paths.items()} | {"export": export})
        runs[export] = folder, plan, export
    command = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return runs


@pytest.fixture(params=["exact", "native"])
def killed(request, killed_runs):
    return killed_runs[request.param]


def copy_partial(folder: Path, to: Path) -> Path:
    shutil.copytree(folder / ".out.msmoe-partial", to / ".out.msmoe-partial")
    return to / "out"


def test_a_killed_process_leaves_no_output_folder(killed):
    assert not (killed[0] / "out").exists()


def test_a_killed_run_resumes_to_byte_equal_output(killed, switch, stats, tmp_path):
    folder, plan, export = killed
    out = copy_partial(folder, tmp_path)
    apply(switch, plan, out, stats=stats, export=export, router="dominant", resume=True)
    names = [file.name for file in (folder / "whole").iterdir()]
    assert {n: (out / n).read_bytes() for n in names} == {n: (folder / "whole" / n).read_bytes() for n in names}


def test_a_resumed_run_merges_only_what_is_missing(killed, switch, stats, tmp_path):
    folder, plan, export = killed
    seen = []
    choices = {"stats": stats, "export": export, "router": "dominant", "progress": lambda *counts: seen.append(counts)}
    report = apply(switch, plan, copy_partial(folder, tmp_path), resume=True, **choices)
    # killed in the last layer: the layers before it are complete, and stay in the report
    last = [group for group in report.groups if group["layer"] == LAYERS[-1]]
    assert 0 < seen[-1][1] <= len(last)
    assert len(report.groups) > len(last)


def test_without_resume_a_killed_run_starts_afresh(killed, switch, stats, tmp_path):
    folder, plan, export = killed
    out = copy_partial(folder, tmp_path)
    apply(switch, plan, out, stats=stats, export=export, router="dominant")
    assert weight_files(out) == weight_files(folder / "whole")


def test_a_partial_folder_of_another_plan_is_not_resumed(killed, switch, stats, tmp_path):
    folder, _, export = killed
    out = copy_partial(folder, tmp_path)
    choices = {} if export == "exact" else {"budget": "uniform", "keep_layers": ["none"]}
    other = make_plan(switch, stats, experts=2, export=export, **choices)
    with pytest.raises(UserError, match="left by a run with other inputs"):
        apply(switch, other, out, stats=stats, export=export, router="dominant", resume=True)
    assert (tmp_path / ".out.msmoe-partial").exists()


def test_a_partial_folder_of_other_statistics_is_not_resumed(switch, stats, records, tmp_path):
    plan = replace(make_plan(switch, stats, experts=3), stats={})  # names no statistics, so any will do

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(switch, plan, tmp_path / "out", stats=stats, workers=1, progress=stop)
    with pytest.raises(UserError, match="was left by a run with other inputs"):
        apply(switch, plan, tmp_path / "out", stats=profile_small(switch, records[:20]), workers=1, resume=True)


def test_an_interrupt_keeps_the_partial_folder_for_resume(switch, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    plan = plan_for(Checkpoint(switch), PLANNED)
    with pytest.raises(KeyboardInterrupt):
        apply(switch, plan, tmp_path / "out", progress=interrupt, workers=1)
    assert (tmp_path / ".out.msmoe-partial").exists()
    apply(switch, plan, tmp_path / "out", resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_progress_counts_the_merged_groups(switch, tmp_path):
    calls = []
    apply(switch, plan_for(Checkpoint(switch), PLANNED), tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]  # groups {0, 2, 4} and {3, 5}; expert 1 is copied


def test_drop_rates_of_the_exact_export_are_unchanged(dropping_switch, dropping_stats, tmp_path):
    plan = make_plan(dropping_switch, dropping_stats, experts=2)
    report = apply(dropping_switch, plan, tmp_path / "out", stats=dropping_stats)
    for name, (before, after) in report.drop_rates.items():
        layer = dropping_stats.layers[name]
        assert before == after == layer.dropped / layer.num_tokens


def test_refit_lowers_the_output_error_on_the_calibration_tokens(switch, stats, tmp_path):
    errors = {}
    for method in ("m-smoe", "m-smoe-refit"):
        compress(switch, stats, tmp_path / method, experts=2, method=method)
        before, after = load_tensors(switch), load_tensors(tmp_path / method)
        error = 0.0
        for name in LAYERS[1:]:
            sample, mapping = stats.layers[name].tokens(), after[f"{name}.expert_map"]
            for e in range(6):
                x = sample.inputs[sample.of(e)[0]]
                wi, wo = (before[f"{name}.experts.expert_{e}.{part}.weight"] for part in ("wi", "wo"))
                new_wi, new_wo = (after[f"{name}.experts.{part}"][mapping[e]] for part in ("wi", "wo"))
                error += float(((x @ wi.T).relu() @ wo.T - (x @ new_wi.T).relu() @ new_wo.T).square().sum())
        errors[method] = error
    assert errors["m-smoe-refit"] < 0.9 * errors["m-smoe"]
