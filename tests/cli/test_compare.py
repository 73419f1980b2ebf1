"""`msmoe compare` as people call it: on the embedded checkpoint with real tasks, and its refusals."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from msmoe.cli.compare import cost_rows, fitting, print_wide
from msmoe.demo import CALIBRATION, CHECKPOINT, TASKS

MSMOE = Path(sys.executable).with_name("msmoe")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run([MSMOE, "compare", *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """Three methods at one size on two tasks of the demo, 40 examples each."""
    out = tmp_path_factory.mktemp("compare") / "out"
    tasks = [a for name in ("sms_spam", "question_type") for a in ("--tasks", TASKS / f"{name}.jsonl")]
    done = run(
        CHECKPOINT, "--data", CALIBRATION, *tasks, "--methods", "m-smoe,m-smoe-refit,reap:others=nearest", "--experts",
        "4", "--seeds", "1", "--samples", "64", "--max-examples", "40", "--processes", "2", "--no-cost", "--out", out,
    )  # fmt: skip
    return done, out


def test_the_terminal_has_one_table_with_every_method_and_the_references(demo_run):
    text = demo_run[0].stdout
    for name in ("full", "dense", "m-smoe", "m-smoe-refit", "reap:others=nearest", "sms_spam", "question_type"):
        assert name in text


def test_small_tasks_are_warned_of(demo_run):
    assert "warning: sms_spam is small: 40 examples" in " ".join(demo_run[0].stdout.split())


def test_tables_and_figures_lie_beside_the_results(demo_run):
    names = {file.name for file in demo_run[1].iterdir()}
    tables = {"results.json", "comparison.md", "comparison.csv", "comparison.tex"}
    assert tables | {"pareto.png", "pareto.svg", "tasks.png", "layer_loss.svg"} <= names


def test_everything_can_be_made_again_from_the_results_alone(demo_run, tmp_path):
    from msmoe.analysis.compare import write_all

    results = json.loads((demo_run[1] / "results.json").read_text())
    for file in write_all(results, tmp_path / "again"):
        if file.suffix in (".md", ".csv", ".tex"):
            assert file.read_bytes() == (demo_run[1] / file.name).read_bytes()


def test_the_answers_of_the_full_model_are_those_of_evaluate(demo_run):
    """The same examples, right or wrong one by one."""
    from msmoe.calibration.profile import load_tokenizer
    from msmoe.evaluation.run import evaluate
    from msmoe.families.loading import load

    results = json.loads((demo_run[1] / "results.json").read_text())
    full = next(cell for cell in results["cells"] if cell["method"] == "full")
    expected = evaluate(
        load(CHECKPOINT), TASKS / "question_type.jsonl", metrics=["exact_match"], samples=40,
        tokenizer=load_tokenizer(CHECKPOINT), count_flops=False,
    )  # fmt: skip
    assert full["tasks"]["question_type"]["examples"] == "".join(map(str, expected.right))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_column_and_no_value_is_lost_however_narrow_the_terminal_is(width):
    headings = ["method", *[f"task number {i}" for i in range(9)]]
    rows = [[Text(f"method {i}"), *[Text(f"0.{i}{j} [0.100, 0.900] ≈†") for j in range(9)]] for i in range(3)]
    out = Console(width=width, file=io.StringIO())
    print_wide(out, "8 experts per layer", headings, rows)
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for shown in (*headings, *[cell.plain for row in rows for cell in row]):
        assert shown in text


def test_columns_that_fit_stay_in_one_table():
    assert fitting([10, 8, 8], room=30) == [[0, 1, 2]]
    # 10 + 2 + 8 + 2 + 8 = 30 columns: one less breaks it
    assert fitting([10, 8, 8], room=29) == [[0, 1], [0, 2]]


def test_costs_are_shown_beside_what_they_are_times_the_full_models():
    stage = {"tokens_per_second": 200.0, "p50_seconds": 0.5, "p95_seconds": 1.0}
    full = {"flops_per_token": 4e6, "peak_memory_bytes": 2e6, "prefill": stage, "generation": stage}
    headings, rows = cost_rows({"reap/4": full | {"flops_per_token": 2e6, "full": full}})
    assert headings[:2] == ["method / experts", "MFLOP per token"]
    assert [cell.plain for cell in rows[0][:3]] == ["reap/4", "2 (0.50)", "200 (1.00)"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "reep"], "unknown method 'reep' - did you mean 'reap'"),
        (["--experts", "four"], "--experts must be comma-separated numbers, got 'four'"),
        (["--experts", "17"], "--experts must be between 1 and 16"),
        (["--tasks", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--recover-steps", "0,-5"], "--recover-steps must not be negative"),
        (["--metric", "accuracy"], "--metric is exact_match or loss, not accuracy"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, complaint, tmp_path):
    given = {"--methods": "reap", "--experts": "4", "--tasks": TASKS / "sms_spam.jsonl"} | dict([arguments])
    done = run(
        CHECKPOINT, "--data", CALIBRATION, "--out", tmp_path / "out", *[w for pair in given.items() for w in pair],
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
