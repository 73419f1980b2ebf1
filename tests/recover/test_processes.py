"""Runs in processes of their own: two that train together, and one that knows of transformers only."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import batch_of, load_tensors, logits_of, random_records
from trials import SHORT, short, values_of

from msmoe.loading import load

BATCH = random_records(6, seed=21)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def together(student, teacher, lessons, tmp_path_factory):
    """Folder with `pair`, trained by two processes with 4 records each, and what the command printed."""
    folder = tmp_path_factory.mktemp("together")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    arguments = ["recover", student, "--teacher", teacher, "--data", lessons, "--out", folder / "pair", "--json"]
    options = SHORT | {"batch_size": 4, "learning_rate": 1e-3, "accumulate": 1}
    arguments += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [*launch, "-m", "msmoe.cli", *arguments]
    environment = ENVIRONMENT | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def alone(student, teacher, lessons, tmp_path_factory):
    """The same run in one process with 8 records at once."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return short(student, out, data=lessons, teacher=teacher, learning_rate=1e-3)


def test_two_processes_train_like_one_with_twice_the_batch(together, alone, student):
    first, second, before = (load_tensors(folder) for folder in (alone.out, together[0] / "pair", student))
    for name in (n for n in first if first[n].is_floating_point()):
        distance = float((first[name] - before[name]).abs().max())
        assert float((first[name] - second[name]).abs().max()) <= 0.02 * distance


def test_two_processes_log_the_losses_of_one(together, alone):
    log = together[0] / "pair.training" / "metrics.jsonl"
    for name in ("loss", "cross_entropy", "distillation", "gradient_norm", "validation_loss"):
        assert values_of(log, name) == pytest.approx(values_of(alone.log, name), rel=1e-4)


def test_one_of_two_processes_prints_the_report(together):
    report = json.loads(together[1])
    assert (report["steps"], report["best_step"] > 0) == (4, True)


FRESH = """
    import sys, torch
    from transformers import AutoModelForSeq2SeqLM
    batch, out, *folders = sys.argv[1:]
    results = {}
    for folder in folders:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
        with torch.inference_mode():
            results[folder] = [type(model).__name__, model(**torch.load(batch, weights_only=True)).logits]
    assert not any(name.partition(".")[0] == "msmoe" for name in sys.modules)
    torch.save(results, out)
"""


@pytest.fixture(scope="module")
def fresh(alone, factorised, lessons, tmp_path_factory):
    """Exact outputs, as a process sees them that imports transformers only: folder -> class name, logits on `BATCH`."""
    work = tmp_path_factory.mktemp("fresh")
    pruned = short(factorised, work / "pruned", data=lessons, teacher=None, keep_rows=0.25).out
    torch.save(batch_of(BATCH), work / "batch.pt")
    arguments = [work / "batch.pt", work / "results.pt", alone.out, pruned]
    # its own cache of remote code: the one of the home folder may hold another version
    environment = ENVIRONMENT | {"HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-c", textwrap.dedent(FRESH), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(work / "results.pt", weights_only=True)


def test_plain_transformers_loads_recovered_and_pruned_checkpoints_with_their_own_code(fresh):
    assert len(fresh) == 2
    for folder, (name, logits) in fresh.items():
        assert name == "MsmoeSwitchForConditionalGeneration"
        torch.testing.assert_close(logits, logits_of(load(folder), BATCH), rtol=1e-5, atol=1e-5)
