"""Runs in processes of their own: two that train together, and one that knows of transformers only."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import batch_of, logits_of, random_records
from trials import check_same_weights, short, values_of

from msmoe.families.loading import load

BATCH = random_records(6, seed=21)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAUNCH = [
    Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def together(crowded, teacher, lessons, tmp_path_factory):
    """Folder with `pair`, trained by two processes with two batches of 2 records each, and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    words = f"""recover {crowded} --teacher {teacher} --data {lessons} --out {folder / "pair"} --json --steps 4
        --batch-size 2 --accumulate 2 --learning-rate 1e-3 --validation-share 0.2""".split()
    # on a machine without accelerator `--multi_gpu` is the launcher's only way to start several processes
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "1"}
    result = subprocess.run([*LAUNCH, "-m", "msmoe.cli", *words], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def alone(crowded, teacher, lessons, tmp_path_factory):
    """The same run in one process with 8 records at once."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return short(crowded, out, data=lessons, teacher=teacher, learning_rate=1e-3)


def test_two_processes_train_like_one_with_the_whole_batch(together, alone, crowded):
    check_same_weights(alone.out, together[0] / "pair", crowded)


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
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.inference_mode():
            results[folder] = [type(model).__name__, model(**torch.load(batch, weights_only=True)).logits]
    assert not any(name.partition(".")[0] == "msmoe" for name in sys.modules)
    torch.save(results, out)
"""


@pytest.fixture(scope="module")
def fresh(student, factorised, lessons, tmp_path_factory):
    """Exact outputs, as a process sees them that imports transformers only: folder -> class name, logits on `BATCH`."""
    work = tmp_path_factory.mktemp("fresh")
    choices = {"data": lessons, "teacher": None}
    outs = [
        short(student, work / "recovered", **choices).out,
        short(factorised, work / "pruned", keep_rows=0.25, **choices).out,
    ]
    torch.save(batch_of(BATCH), work / "batch.pt")
    arguments = [work / "batch.pt", work / "results.pt", *outs]
    environment = ENVIRONMENT | {"HF_MODULES_CACHE": str(work / "modules")}  # the one at home may hold older code
    command = [sys.executable, "-c", textwrap.dedent(FRESH), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(work / "results.pt", weights_only=True)


def test_plain_transformers_loads_recovered_and_pruned_checkpoints_with_their_own_code(fresh):
    assert len(fresh) == 2
    for folder, (name, logits) in fresh.items():
        assert name == "MsmoeSwitchForConditionalGeneration"
        torch.testing.assert_close(logits, logits_of(load(folder), BATCH), rtol=1e-5, atol=1e-5)
