"""Runs that were killed or broke off: what they leave, and that going on ends where an untouched run ends."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import logits_of, random_records, write_records
from trials import edited, lesson, read_log, short, stop_after, values_of

from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.files import locked
from msmoe.recovery.state import load_tensors, save_tensors

BATCH = random_records(6, seed=21)
NUM_STEPS = 20

# Every run is a process of its own, forked before torch starts a thread. The killed one ends at no chosen place: the
# parent watches the folder for the state of step 6 or later and sends SIGKILL.
KILLED = """
    import json, os, shutil, signal, sys, time
    from pathlib import Path
    from msmoe.recovery.run import recover

    def child(**job):
        process = os.fork()
        if process == 0:
            recover(**job)
            os._exit(0)
        return process

    for folder, job in json.loads(sys.argv[1]).items():
        folder = Path(folder)
        whole, process = (child(out=folder / name, **job) for name in ("whole", "out"))
        late = lambda: any(int(f.stem[6:]) >= 6 for f in (folder / "out.training").glob("state-*.safetensors"))
        while not late():
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL, "the run ended before it could be killed"
        assert os.waitpid(whole, 0)[1] == 0
        (folder / "names").write_text(json.dumps([file.name for file in folder.iterdir()]))
        shutil.copytree(folder / "out.training", folder / "left" / "out.training")
        assert os.waitpid(child(out=folder / "out", resume=True, **job), 0)[1] == 0
"""


@pytest.fixture(scope="module")
def killed_runs(student, factorised, teacher, lessons, tmp_path_factory):
    """Name -> folder with an untouched run, what a killed one left, and `out`, gone on with; and its options."""
    work = tmp_path_factory.mktemp("killed")
    common = {
        "data": lessons, "teacher": teacher, "steps": NUM_STEPS, "batch_size": 8, "learning_rate": 3e-3,
        "validation_share": 0.2, "evaluate_every": 4, "save_every": 3,
    }  # fmt: skip
    loud = edited(student, work / "loud", dropout_rate=0.2, router_jitter_noise=0.1)
    kinds = {
        "distilled": {"student": loud},
        "pruned": {"student": factorised, "keep_rows": 0.25, "prune_final": 0.1, "cache_teacher": True},
    }
    jobs = {str(work / name): common | choices for name, choices in kinds.items()}
    for folder in jobs:
        os.mkdir(folder)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(jobs, default=str)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return {name: (work / name, jobs[str(work / name)]) for name in kinds}


@pytest.fixture(params=["distilled", "pruned"])
def killed(request, killed_runs):
    return killed_runs[request.param]


def test_a_killed_run_leaves_no_output(killed):
    folder, _ = killed
    assert set(json.loads((folder / "names").read_text())) == {"whole", "whole.training", "out.training"}


def test_a_killed_run_goes_on_to_the_same_bytes(killed):
    folder, _ = killed
    names = [file.name for file in (folder / "whole").iterdir()]
    assert "model.safetensors" in names
    assert {n: (folder / "out" / n).read_bytes() for n in names} == {
        n: (folder / "whole" / n).read_bytes() for n in names
    }


def test_a_run_that_goes_on_logs_each_step_once_with_the_same_numbers(killed):
    folder, _ = killed
    whole, resumed = (read_log(folder / f"{name}.training" / "metrics.jsonl") for name in ("whole", "out"))
    assert [r["step"] for r in resumed if "loss" in r] == list(range(1, NUM_STEPS + 1))
    assert resumed == whole


def test_tensorboard_shows_each_step_once_after_a_kill(killed):
    folder, _ = killed
    events = EventAccumulator(str(folder / "out.training" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, NUM_STEPS + 1))


def test_a_killed_run_leaves_a_state_and_the_best_weights_that_it_names(killed):
    left = killed[0] / "left" / "out.training"
    newest = sorted(left.glob("state-*.safetensors"))[-1]
    _, about = load_tensors(newest)
    assert about["step"] == int(newest.stem[6:])
    assert load_tensors(left / f"best-{about['best_step']:08d}.safetensors")[1] == {"step": about["best_step"]}


@pytest.fixture
def left(killed_runs, tmp_path):
    """A copy of what the killed distillation left, and the arguments to go on with it."""
    folder, job = killed_runs["distilled"]
    shutil.copytree(folder / "left" / "out.training", tmp_path / "out.training")
    return job | {"out": tmp_path / "out", "resume": True}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"temperature": 3.0}, {"steps": 21}, {"train": "all"}, {"teacher": None}, {"batch_size": 4}]
)
def test_a_run_of_other_options_is_not_gone_on_with(change, left, tmp_path):
    with pytest.raises(UserError, match=r"out\.training was left by a run with other inputs; remove it or run without"):
        short(**left | change)
    assert list((tmp_path / "out.training").glob("state-*.safetensors"))


def test_a_run_of_other_data_is_not_gone_on_with(left, tmp_path):
    left["data"] = write_records(tmp_path / "other.jsonl", lesson(48, seed=4))
    with pytest.raises(UserError, match=r"out\.training was left by a run with other inputs"):
        short(**left)


def test_a_run_of_another_student_is_not_gone_on_with(left, factorised):
    with pytest.raises(UserError, match=r"out\.training was left by a run with other inputs"):
        short(**left | {"student": factorised})


def test_records_that_changed_sides_are_other_data(dense, tmp_path):
    records = lesson(12)

    def sides(count: int) -> dict:
        parts = {"data": records[:count], "validation": records[count:]}
        return {side: write_records(tmp_path / f"{side}-{count}.jsonl", part) for side, part in parts.items()}

    choices = {"teacher": None, "train": "all", "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        short(dense, tmp_path / "out", **sides(8), **choices, progress=stop_after(2))
    with pytest.raises(UserError, match=r"out\.training was left by a run with other inputs"):
        short(dense, tmp_path / "out", **sides(7), **choices, resume=True)


def test_a_truncated_state_is_named(left, tmp_path):
    state = sorted((tmp_path / "out.training").glob("state-*.safetensors"))[-1]
    os.truncate(state, state.stat().st_size - 100)
    with pytest.raises(UserError, match=rf"{state.name} is damaged: .*start without --resume"):
        short(**left)


def test_without_resume_a_killed_run_starts_afresh(left, tmp_path):
    tensors, about = load_tensors(sorted((tmp_path / "out.training").glob("state-*.safetensors"))[-1])
    spoilt = {name: tensor * 0 for name, tensor in tensors.items()}
    save_tensors(tmp_path / "out.training" / "state-00000019.safetensors", spoilt, about | {"step": 19})
    report = short(**left | {"resume": False, "steps": 2, "evaluate_every": 2})
    assert list(values_of(report.log, "loss")) == [1, 2]
    assert report.validation_before == pytest.approx(values_of(report.log, "validation_loss")[0])


def test_resume_without_anything_left_is_a_fresh_run(student, lessons, tmp_path):
    for name, resume in (("one", False), ("two", True)):
        short(student, tmp_path / name, data=lessons, teacher=None, resume=resume)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


# A loss that is not finite


@pytest.mark.parametrize("evaluate_every", [4, 1])
def test_a_run_that_diverges_stops_and_goes_on_with_a_lower_rate(evaluate_every, student, lessons, tmp_path):
    # weights of about 1e30 after the first step: their products overflow in the second one, or in its validation
    choices = {"data": lessons, "teacher": None, "warmup": 0.0, "evaluate_every": evaluate_every}
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        short(student, out, **choices, learning_rate=1e30)
    message = str(error.value)
    assert " at step " in message
    assert f"The state of step 0 is kept in {out}.training" in message
    assert "--resume with a lower --learning-rate goes on from there" in message
    assert not out.exists()
    report = short(student, out, **choices, learning_rate=1e-3, resume=True)
    assert list(values_of(report.log, "loss")) == [1, 2, 3, 4]
    assert logits_of(load(out), BATCH).isfinite().all()


def test_a_diverged_run_names_the_step_and_the_loss(student, lessons, tmp_path):
    with pytest.raises(UserError, match=r"the loss is nan at step 2; training stopped"):
        short(student, tmp_path / "out", data=lessons, teacher=None, warmup=0.0, learning_rate=1e30, evaluate_every=4)


def test_a_state_saved_between_validations_is_one_to_go_on_from(student, lessons, tmp_path):
    choices = {"data": lessons, "teacher": None, "warmup": 0.0, "evaluate_every": 4, "save_every": 1}
    with pytest.raises(UserError, match="at step 2"):
        short(student, tmp_path / "out", **choices, learning_rate=1e30)
    report = short(student, tmp_path / "out", **choices, learning_rate=1e-3, resume=True)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in values_of(report.log, "loss").values())


def test_a_diverged_step_is_not_taken(student, lessons, tmp_path):
    choices = {"data": lessons, "teacher": None, "warmup": 0.0, "evaluate_every": 4}
    with pytest.raises(UserError, match="training stopped"):
        short(student, tmp_path / "diverged", **choices, learning_rate=1e30)
    short(student, tmp_path / "diverged", **choices, learning_rate=1e-3, resume=True)
    short(student, tmp_path / "calm", **choices, learning_rate=1e-3)
    diverged, calm = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("diverged", "calm"))
    assert diverged == calm


# The folder of a run


def test_a_strangers_folder_under_the_name_of_the_training_folder_is_left_alone(student, lessons, tmp_path):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "precious").write_text("keep")
    with pytest.raises(UserError, match=r"out\.training is in the way, and no training folder"):
        short(student, tmp_path / "out", data=lessons, teacher=None)
    assert (tmp_path / "out.training" / "precious").read_text() == "keep"


def test_an_error_before_the_first_step_leaves_nothing(student, lessons, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # bytes of a file: no state has room
    try:
        with pytest.raises(UserError, match=r"cannot write .*out\.training.*: the file would be larger"):
            short(student, tmp_path / "out", data=lessons, teacher=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_stopped_by_hand_keeps_its_states(student, lessons, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        short(student, tmp_path / "out", data=lessons, teacher=None, progress=stop_after(2))
    assert list((tmp_path / "out.training").glob("state-*.safetensors"))


def test_two_runs_with_one_output_are_refused(student, lessons, tmp_path):
    (tmp_path / "out.training").mkdir()
    with locked(tmp_path / "out.training" / ".lock"), pytest.raises(UserError, match="another process is writing"):
        short(student, tmp_path / "out", data=lessons, teacher=None)
