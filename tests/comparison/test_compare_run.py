"""A comparison from files to results: what is measured, what is done again, what is refused, what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from tiny import LAYERS, batch_of, random_records, size_of, write_records

from msmoe.calibration.stats import Stats
from msmoe.comparison.run import MARKER, compare, joined, numbers_of_experts
from msmoe.comparison.settings import task_files
from msmoe.compression.apply import apply
from msmoe.demo import CHECKPOINT
from msmoe.errors import UserError
from msmoe.evaluation.run import evaluate
from msmoe.families.loading import load
from msmoe.files import locked
from msmoe.planning.methods import variant
from msmoe.planning.plan import Plan

METHODS = ("m-smoe", "reap", "mone", "reap:others=nearest")
RECOVERY = {"learning_rate": 1e-2, "batch_size": 8, "train": "all"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, seed in (("one", 11), ("two", 12)):
        write_records(folder / f"{name}.jsonl", random_records(20, seed=seed))
    return folder


def run(switch, data, tasks, out, **options):
    settings = {"methods": METHODS, "experts": (3,), "seeds": (0, 1), "samples": 25, "cost": False} | options
    return compare(switch, out, data=data, tasks=[tasks], **settings)


@pytest.fixture(scope="module")
def compared(switch, data, tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    return run(switch, data, tasks, out, recover_steps=(0, 8), recovery=RECOVERY), out


def cells_of(results, method):
    return [cell for cell in results["cells"] if cell["method"] == method]


def test_there_is_a_cell_for_every_method_size_seed_and_recovery(compared):
    found = {(c["method"], c["experts"], c["seed"], c["recover_steps"]) for c in compared[0]["cells"]}
    wanted = {(m, 3.0, s, r) for m in METHODS for s in (0, 1) for r in (0, 8)}
    assert found == wanted | {("full", 6.0, 0, r) for r in (0, 8)} | {("dense", 1.0, 0, r) for r in (0, 8)}


def test_scores_are_those_of_the_planned_checkpoint(compared, switch, tasks, tmp_path):
    results, out = compared
    cell = next(c for c in cells_of(results, "reap") if c["seed"] == 1 and not c["recover_steps"])
    apply(switch, out / "plans" / "seed-1" / "reap-3.json", tmp_path / "out", stats=out / "stats" / "seed-1")
    expected = evaluate(tmp_path / "out", tasks / "one.jsonl").metrics["loss"].value
    assert cell["tasks"]["one"]["metrics"]["loss"]["value"] == pytest.approx(expected, rel=1e-6)
    assert cell["bytes"] == size_of(tmp_path / "out")


def test_the_examples_of_a_loss_task_add_up_to_its_loss(compared):
    for cell in compared[0]["cells"]:
        for task in cell["tasks"].values():
            total, tokens = (sum(column) for column in zip(*task["examples"], strict=True))
            assert total / tokens == pytest.approx(task["metrics"]["loss"]["value"], rel=1e-4)


def test_every_method_stays_within_the_budget(compared):
    results = compared[0]
    for cell in results["cells"]:
        if cell["method"] not in ("full", "dense"):
            assert cell["bytes"] <= results["budgets"]["3"]


def test_all_methods_of_a_seed_read_the_same_calibration_data(compared):
    results, out = compared
    plans = [json.loads(file.read_text()) for file in (out / "plans" / "seed-0").glob("*.json")]
    assert len({p["stats"]["sha256"] for p in plans}) == 1
    assert len(set(results["calibration"]["sha256"])) == 2  # 25 of 40 records, another choice per seed
    assert {tuple(p["parameters"]["keep_layers"]) for p in plans} == {(LAYERS[0],)}


def test_a_choice_in_the_label_reaches_the_plan(compared):
    stored = Plan.load(compared[1] / "plans" / "seed-0" / "reap:others=nearest-3.json")
    assert stored.method == "reap"
    assert stored.parameters.others == "nearest"


def test_recovery_moves_the_weights_of_the_full_model_as_well(compared):
    full = {c["recover_steps"]: c["tasks"]["one"]["metrics"]["loss"]["value"] for c in cells_of(compared[0], "full")}
    assert full[8] < full[0]


def test_a_rerun_does_nothing_and_gives_the_same_results(compared, switch, data, tasks):
    results, out = compared
    before = {f: f.stat().st_mtime_ns for f in (out / "cells").iterdir()}
    again = run(switch, data, tasks, out, recover_steps=(0, 8), recovery=RECOVERY, resume=True)
    assert {f: f.stat().st_mtime_ns for f in (out / "cells").iterdir()} == before
    assert again == results


def test_cells_of_another_version_are_not_taken_over(compared):
    results, _ = compared
    fewer = results | {"cells": results["cells"][:2]}
    assert len(joined(fewer, results)["cells"]) == len(results["cells"])
    assert joined(fewer, results | {"versions": results["versions"] | {"msmoe": "0"}}) == fewer


def test_nothing_measured_with_another_tokenizer_is_taken_over(copied, data, tasks, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, copied / name)
    options = {"seeds": 1, "recover_steps": 0, "resume": True}
    run(copied, data, tasks, tmp_path / "out", methods="reap", **options)
    cells = set((tmp_path / "out" / "cells").iterdir())
    edited = json.loads((copied / "tokenizer_config.json").read_text()) | {"clean_up_tokenization_spaces": True}
    (copied / "tokenizer_config.json").write_text(json.dumps(edited))
    results = run(copied, data, tasks, tmp_path / "out", methods="frequency", **options)
    assert {cell["method"] for cell in results["cells"]} == {"full", "dense", "frequency"}
    assert len(set((tmp_path / "out" / "cells").iterdir()) - cells) == 3


def test_only_what_is_new_is_done_and_added_to_the_results(compared, switch, data, tasks):
    results, out = compared
    before = {f.name for f in (out / "cells").iterdir()}
    more = run(switch, data, tasks, out, methods="frequency", seeds=1, recover_steps=0, recovery=RECOVERY, resume=True)
    new = {f.name for f in (out / "cells").iterdir()} - before
    assert [name.split("-3-")[0] for name in new] == ["frequency"]
    key = lambda cell: (cell["method"], cell["seed"], cell["recover_steps"])
    assert {key(c) for c in more["cells"]} == {key(c) for c in results["cells"]} | {("frequency", 0, 0)}
    assert more["settings"]["seeds"] == [0, 1]
    assert more["calibration"]["sha256"] == results["calibration"]["sha256"]


def test_statistics_that_hold_more_than_a_run_needs_are_not_made_again(switch, data, tasks, tmp_path):
    out = tmp_path / "out"
    run(switch, data, tasks, out, methods="fisher", seeds=1)
    made = (out / "stats" / "seed-0" / "stats.json").stat().st_mtime_ns
    run(switch, data, tasks, out, methods="reap", seeds=1, resume=True)
    assert (out / "stats" / "seed-0" / "stats.json").stat().st_mtime_ns == made
    run(switch, data, tasks, out, methods="m-smoe:similarity=gradient", seeds=1, resume=True)
    both = Stats.load(out / "stats" / "seed-0").layers[LAYERS[1]]
    assert both.has_output_gradients
    assert both.gradient_gram is not None


def test_results_of_other_tasks_are_not_mixed_in(switch, data, tasks, tmp_path):
    out = tmp_path / "out"
    run(switch, data, tasks, out, methods="m-smoe", seeds=1)
    results = compare(
        switch, out, data=data, tasks=tasks / "one.jsonl", methods="reap", experts=3, seeds=1, samples=25, cost=False,
        resume=True,
    )  # fmt: skip
    assert {c["method"] for c in results["cells"]} == {"full", "dense", "reap"}
    assert {tuple(c["tasks"]) for c in results["cells"]} == {("one",)}


def test_a_share_of_the_experts_is_a_size(switch):
    # 6 experts in every layer
    assert numbers_of_experts(switch, ("50%", 2, "4"), None) == (3.0, 2.0, 4.0)
    assert numbers_of_experts(switch, (5,), None) == (5.0,)


@pytest.mark.parametrize("size", ["0%", "101%", "half"])
def test_a_size_that_is_neither_number_nor_share_is_refused(size, switch):
    with pytest.raises(UserError, match=f"--experts.*{size}"):
        numbers_of_experts(switch, (size,), None)


def test_two_processes_give_the_same_cells_as_one(switch, data, tasks, tmp_path):
    one = run(switch, data, tasks, tmp_path / "one", seeds=(0,), methods=("reap",))
    two = run(switch, data, tasks, tmp_path / "two", seeds=(0,), methods=("reap",), processes=2)
    strip = lambda results: [
        {k: v for k, v in cell.items() if k not in ("seconds", "evaluate_seconds")} for cell in results["cells"]
    ]
    assert strip(one) == strip(two)


def test_loss_by_layer_is_that_of_a_checkpoint_with_one_compressed_layer(switch, data, tasks, tmp_path):
    results = run(switch, data, tasks, tmp_path / "cmp", seeds=(0,), methods=("m-smoe",))
    layer_loss = cells_of(results, "m-smoe")[0]["layer_loss"]
    stored = Plan.load(tmp_path / "cmp" / "plans" / "seed-0" / "m-smoe-3.json")
    apply(switch, stored, tmp_path / "all", stats=tmp_path / "cmp" / "stats" / "seed-0")
    records = [json.loads(line) for f in sorted(tasks.glob("*.jsonl")) for line in f.read_text().splitlines()]
    chosen = chosen_records(tasks)
    before = mean_loss(load(switch), chosen)
    for name in stored.layers:
        apply(switch, replace(stored, layers={name: stored.layers[name]}), tmp_path / name)
        assert layer_loss[name] == pytest.approx(mean_loss(load(tmp_path / name), chosen) - before, abs=1e-5)
    assert len(records) == 40


def chosen_records(tasks):
    from msmoe.calibration.records import choose_records, read_records

    return [r for f in sorted(tasks.glob("*.jsonl")) for r in choose_records(read_records(f), 16, seed=0)]


def mean_loss(model, records) -> float:
    """Per target token, one record at a time."""
    total = tokens = 0.0
    with torch.inference_mode():
        for record in records:
            total += float(model(**batch_of([record])).loss) * len(record["labels"])
            tokens += len(record["labels"])
    return total / tokens


def test_cost_stands_beside_the_full_model(switch, data, tasks, tmp_path):
    results = run(switch, data, tasks, tmp_path / "out", seeds=(0,), methods=("m-smoe",), cost=True)
    assert set(results["cost"]) == {"m-smoe/3", "dense/1"}
    for cost in results["cost"].values():
        for side in (cost, cost["full"]):
            assert side["flops_per_token"] > 0
            assert side["peak_memory_bytes"] > 10**7
            for stage in ("prefill", "generation"):
                assert side[stage]["tokens_per_second"] > 0
                assert 0 < side[stage]["p50_seconds"] <= side[stage]["p95_seconds"]
        # the stock router has E rows as well, and a token passes one expert: the same arithmetic
        assert cost["flops_per_token"] == pytest.approx(cost["full"]["flops_per_token"], rel=0.01)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"methods": ("raep",)}, "unknown method 'raep' - did you mean 'reap'"),
        ({"methods": ("reap:others=nearby",)}, "unknown others 'nearby' - did you mean 'nearest'"),
        ({"methods": ("reap:oters=nearest",)}, "unknown parameter 'oters' - did you mean 'others'"),
        ({"methods": ("reap:nearest",)}, "'nearest' is not of the form name=value"),
        ({"methods": ("reap:experts=3",)}, "the number of experts follows from the budget"),
        ({"experts": (7,)}, "--experts must be between 1 and 6"),
        ({"experts": (0,)}, "--experts must be at least 1, got 0"),
        ({"recover_steps": (-1,)}, "--recover-steps must not be negative, got -1"),
        ({"metric": "bleu"}, "--metric is exact_match or loss, not bleu"),
        ({"metric": "exact_match", "explicit_metric": True}, "task one has no labels for exact_match"),
        ({"methods": ("mone",), "experts": (1,)}, "mone cannot reach the size of 1 per layer"),
        ({"methods": ()}, "--methods names no method"),
        ({"keep_layers": ("encoder.block.1.layer.1.mpl",)}, "did you mean 'encoder.block.1.layer.1.mlp'"),
        ({"processes": 0}, "--processes must be at least 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_cell(options, complaint, switch, data, tasks, tmp_path):
    with pytest.raises(UserError, match=complaint):
        run(switch, data, tasks, tmp_path / "out", **options)
    assert not list((tmp_path / "out" / "cells").glob("*")) if (tmp_path / "out" / "cells").exists() else True


def test_an_existing_folder_is_not_touched_without_a_word(compared, switch, data, tasks):
    with pytest.raises(UserError, match="exists; use --resume to add what is new, or --force to start over"):
        run(switch, data, tasks, compared[1])


def test_a_folder_that_is_no_comparisons_is_never_touched(switch, data, tasks, tmp_path):
    (tmp_path / "stats").mkdir()
    for option in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(UserError, match="exists and holds no comparison"):
            run(switch, data, tasks, tmp_path, **option)
    assert [f.name for f in tmp_path.iterdir()] == ["stats"]


def test_starting_over_leaves_nothing_of_the_old_comparison(switch, data, tasks, tmp_path):
    run(switch, data, tasks, tmp_path / "out", seeds=(0,), methods=("m-smoe",))
    results = run(switch, data, tasks, tmp_path / "out", seeds=(0,), methods=("reap",), force=True)
    assert {c["method"] for c in results["cells"]} == {"full", "dense", "reap"}
    assert not list((tmp_path / "out" / "cells").glob("m-smoe*"))


def test_two_runs_in_one_folder_are_refused(switch, data, tasks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).touch()
    with locked(out / MARKER), pytest.raises(UserError, match="another process is writing"):
        run(switch, data, tasks, out, resume=True)


def test_tasks_of_one_name_are_refused(tasks, tmp_path):
    (tmp_path / "one.jsonl").write_text("{}")
    with pytest.raises(UserError, match="two tasks are named one"):
        task_files([tasks, tmp_path / "one.jsonl"])


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder without \*.jsonl files"):
        task_files([tmp_path])


def test_a_label_is_a_method_with_choices():
    assert variant("m-smoe:align=none:rank=8:canonical=true") == (
        "m-smoe", {"align": "none", "rank": 8, "canonical": True},
    )  # fmt: skip
    assert variant("naee") == ("naee", {})


def fail_for_reap(checkpoint, plan, out, **options):
    """The disk is full when reap's checkpoint is written."""
    if Plan.load(plan).method == "reap":
        raise UserError("cannot write reap: the disk is full")
    return apply(checkpoint, plan, out, **options)


def test_a_failing_cell_leaves_the_others_and_is_named(switch, data, tasks, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(switch, data, tasks, out, seeds=(0,), methods=("m-smoe",))
    monkeypatch.setattr(sys.modules["msmoe.comparison.cells"], "apply", fail_for_reap)
    with pytest.raises(UserError, match=r"1 of 4 jobs failed, reap-3-0: .*--resume tries again"):
        run(switch, data, tasks, out, seeds=(0,), methods=("m-smoe", "reap"), resume=True)
    assert {c["method"] for c in json.loads((out / "results.json").read_text())["cells"]} == {"full", "dense", "m-smoe"}
    monkeypatch.undo()
    results = run(switch, data, tasks, out, seeds=(0,), methods=("m-smoe", "reap"), resume=True)
    assert {c["method"] for c in results["cells"]} == {"full", "dense", "m-smoe", "reap"}


def test_a_worker_that_is_killed_ends_the_run_with_a_line_that_says_how_to_go_on(switch, data, tasks, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "msmoe.cli", "compare", str(switch), "--data", str(data), "--tasks", str(tasks), "--out",
        str(out), "--methods", "m-smoe,reap,frequency,ean-sum,gate-mass", "--experts", "3,2", "--seeds", "2",
        "--samples", "25", "--no-cost", "--processes", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and len(list(out.glob("cells/*.json"))) < 1:
        time.sleep(0.05)
    workers = [c.pid for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    os.kill(workers[0], signal.SIGKILL)
    message = process.communicate()[1]
    assert process.returncode == 2
    assert message.strip().splitlines()[-1].startswith("msmoe: a process that measured cells was killed")
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert len(list(out.glob("cells/*.json"))) == 22


def test_a_killed_run_goes_on_where_it_was(switch, data, tasks, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "msmoe.cli", "compare", str(switch), "--data", str(data), "--tasks", str(tasks), "--out",
        str(out), "--methods", "m-smoe,reap,frequency,ean-sum,gate-mass", "--experts", "3,2", "--seeds", "2",
        "--samples", "25", "--no-cost",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 120
    while time.time() < deadline and len(list(out.glob("cells/*.json"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in (out / "cells").glob("*.json")}
    assert 2 <= len(done) < 22
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert len(list(out.glob("cells/*.json"))) == 22
    assert all(f.stat().st_mtime_ns == written for f, written in done.items())
    assert not (out / "work").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_workers_of_a_killed_run_end_with_it(number, switch, data, tasks, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "msmoe.cli", "compare", str(switch), "--data", str(data), "--tasks", str(tasks), "--out",
        str(out), "--methods", "m-smoe,reap,frequency,ean-sum,gate-mass", "--experts", "3,2", "--seeds", "2",
        "--samples", "25", "--no-cost", "--processes", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and len(list(out.glob("cells/*.json"))) < 1:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in children if "spawn_main" in " ".join(child.cmdline())]) == 2
    process.send_signal(number)
    process.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def copy_cells(compared, out):
    """All but the results, which other runs added to."""
    shutil.copytree(compared[1], out)
    (out / "results.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * len(text),
        lambda text: text.replace("6", "7"),
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
    ],
    ids=["empty", "half", "zeros", "other digits", "another content", "deep"],
)
def test_a_damaged_cell_is_named_and_measured_again(damage, switch, data, tasks, compared, tmp_path):
    results, _ = compared
    copy_cells(compared, tmp_path / "out")
    file = next((tmp_path / "out" / "cells").glob("reap-3-0-0-*.json"))
    file.write_text(damage(file.read_text()))
    told = []
    again = run(
        switch, data, tasks, tmp_path / "out", recover_steps=(0, 8), recovery=RECOVERY, resume=True, tell=told.append
    )
    assert told == [f"{file} is damaged: it is measured again"]
    assert [c["tasks"] for c in again["cells"]] == [c["tasks"] for c in results["cells"]]


@pytest.mark.parametrize("name", ["plans/seed-1/reap-3.json", "stats/seed-1/stats.json", "stats/seed-1.json"])
def test_damaged_plans_and_statistics_are_made_again(name, switch, data, tasks, compared, tmp_path):
    results, _ = compared
    copy_cells(compared, tmp_path / "out")
    (tmp_path / "out" / name).write_text("{")
    again = run(switch, data, tasks, tmp_path / "out", recover_steps=(0, 8), recovery=RECOVERY, resume=True)
    assert again == results
    assert len(json.loads((tmp_path / "out" / name).read_text())) > 1


def test_damaged_results_of_an_earlier_run_are_named_and_left_out(switch, data, tasks, compared, tmp_path):
    copy_cells(compared, tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text('{"format": "msmoe-comparison/1", "cells": [7]}')
    told = []
    again = run(
        switch, data, tasks, tmp_path / "out", recover_steps=(0, 8), recovery=RECOVERY, resume=True, tell=told.append
    )
    assert again == compared[0]
    assert "results.json of an earlier run is damaged and left out" in told[0]
