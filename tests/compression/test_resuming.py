"""Processes killed at any moment, and what they leave for the next run."""

import os
import random
import signal
import time

import pytest
from tiny import LAYERS, save_switch, weight_files

from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.errors import UserError
from msmoe.planning.planner import plan as make_plan

RUNS = {
    "rank": ("factorize", {"rank": 4}),
    "energy": ("factorize", {"energy": 0.7}),
    "budget": ("factorize", {"target_ratio": 0.8}),
    "native": ("factorize", {"rank": 4, "export": "native"}),
    "merged and factorised": ("apply", {"rank": 4}),
    "merged within a budget": ("apply", {"target_ratio": 0.75}),
}


def kill_after(seconds: float, run, **arguments) -> bool:
    """Run in a process of its own and kill it; whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            run(**arguments)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_again_and_again_resumes_to_the_bytes_of_an_undisturbed_one(
    name, switch, native, exact, stats, tmp_path
):
    command, options = RUNS[name]
    run, arguments = factorize, {"checkpoint": native if "export" in options else exact, **options}
    if command == "apply":
        plan = make_plan(switch, stats, method="mc-smoe-refit", experts=3, **options)
        run, arguments = apply, {"checkpoint": switch, "plan": plan}
    arguments |= {"stats": stats, "workers": 1}
    start = time.monotonic()
    run(**arguments, out=tmp_path / "whole")
    duration = time.monotonic() - start
    moments, kills = random.Random(name), 0
    arguments |= {"force": True, "resume": True}
    while kills < 3:
        killed = kill_after(duration * moments.uniform(0.1, 0.8), run, **arguments, out=tmp_path / "out")
        kills += killed
        duration *= 1 if killed else 0.7  # the machine has become faster
    run(**arguments, out=tmp_path / "out")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }
    assert {file.name for file in tmp_path.iterdir()} == {"out", "whole"}


def interrupted(checkpoint, out, **options):
    """Stop a run by hand after its first layer."""

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        factorize(checkpoint, out, workers=1, progress=stop, **options)


def test_a_resumed_run_factorises_only_the_layers_that_are_missing(exact, tmp_path):
    interrupted(exact, tmp_path / "out", rank=4)
    calls = []
    report = factorize(exact, tmp_path / "out", rank=4, resume=True, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]
    assert {entry["layer"] for entry in report.matrices} == set(LAYERS[1:])  # the first one is in the report as well


def test_what_other_options_left_is_not_resumed(exact, tmp_path):
    interrupted(exact, tmp_path / "out", rank=4)
    with pytest.raises(UserError, match="left by a run with other inputs"):
        factorize(exact, tmp_path / "out", rank=5, resume=True)
    assert (tmp_path / ".out.msmoe-partial").exists()


def test_without_resume_a_killed_run_starts_afresh(exact, stats, factorized, tmp_path):
    interrupted(exact, tmp_path / "out", stats=stats, target_ratio=0.8)
    factorize(exact, tmp_path / "out", stats=stats, rank=4)
    assert weight_files(tmp_path / "out") == weight_files(factorized)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.7}, {"rank": 4, "svd": "plain"}])
def test_decompositions_that_another_checkpoint_left_are_not_used(options, exact, stats, tmp_path):
    interrupted(save_switch(tmp_path / "other", seed=1), tmp_path / "out", energy=0.7)
    (tmp_path / ".out.msmoe-partial").rename(tmp_path / "removed")
    factorize(exact, tmp_path / "out", stats=stats, resume=True, **options)
    factorize(exact, tmp_path / "fresh", stats=stats, **options)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "fresh")


def test_decompositions_of_the_other_kind_are_not_used(exact, stats, tmp_path):
    interrupted(exact, tmp_path / "out", stats=stats, energy=0.7, svd="plain")
    (tmp_path / ".out.msmoe-partial").rename(tmp_path / "removed")
    factorize(exact, tmp_path / "out", stats=stats, energy=0.7, resume=True)
    factorize(exact, tmp_path / "fresh", stats=stats, energy=0.7)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "fresh")


def test_another_router_is_not_taken_from_a_killed_run(switch, stats, tmp_path):
    native = {"export": "native", "budget": "uniform", "keep_layers": ["none"]}
    plan = make_plan(switch, stats, method="mc-smoe", rank=4, experts=3, **native)

    def stop(done, total):
        if total == len(LAYERS):  # the merge, which counts groups, is over
            raise KeyboardInterrupt

    how = {"stats": stats, "export": "native", "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        apply(switch, plan, tmp_path / "out", router="dominant", progress=stop, **how)
    (tmp_path / ".out.msmoe-partial").rename(tmp_path / "removed")
    apply(switch, plan, tmp_path / "out", router="mean", resume=True, **how)
    apply(switch, plan, tmp_path / "fresh", router="mean", **how)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "fresh")
