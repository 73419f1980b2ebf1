"""What the command line says about data: formats, columns, standard input, warnings, and mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_records

from msmoe.calibration.stats import Stats
from msmoe.cli import main
from msmoe.demo import CHECKPOINT, TASKS

MSMOE = Path(sys.executable).with_name("msmoe")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line: (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    lines = (TASKS / "sms_spam.jsonl").read_text(encoding="utf-8").split("\n")[:6]
    return [json.loads(line) for line in lines]


@pytest.fixture
def table(pairs, tmp_path) -> Path:
    """The pairs as CSV with columns of other names, and a blank record."""
    rows = ["question\tanswer", *(f"{r['source']}\t{r['target']}" for r in pairs), "only a question\t"]
    (tmp_path / "d.tsv").write_text("\n".join(rows).replace('"', "''"), encoding="utf-8")
    return tmp_path / "d.tsv"


COLUMNS = ("--columns", "source=question,target=answer")


def test_profile_reads_the_columns_and_says_what_it_skipped(run, table, tmp_path):
    code, _, err = run("profile", CHECKPOINT, "--data", table, *COLUMNS, "--out", tmp_path / "stats", "--json")
    assert code == 0
    assert err.strip().splitlines() == [f"msmoe: warning: {table}: 1 of 7 records are blank: skipped"]
    data = Stats.load(tmp_path / "stats").data
    assert (data["num_records"], data["num_skipped"], data["columns"]) == (
        6,
        1,
        {"source": "question", "target": "answer"},
    )


def test_evaluate_reads_the_columns_and_records_what_it_cut(run, table):
    code, out, err = run(
        "evaluate", CHECKPOINT, "--data", table, *COLUMNS, "--metrics", "loss", "--max-source-length", 4, "--json"
    )
    [result] = json.loads(out)
    assert code == 0
    assert result["settings"]["num_cut"] == {"sources": 6, "targets": 0}
    assert "msmoe: warning: 6 of 6 sources were cut to 4 tokens (--max-source-length)" in err.splitlines()


def test_profile_reads_standard_input(switch, records, data, stats, tmp_path):
    with data.open("rb") as stream:
        command = [MSMOE, "profile", switch, "--data", "-", "--samples", "64", "--out", tmp_path / "stats"]
        done = subprocess.run(command, stdin=stream, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = Stats.load(tmp_path / "stats").data
    assert found == stats.data | {"source": "-"}


def test_a_sequential_refit_reads_standard_input_twice(switch, data, tmp_path):
    with data.open("rb") as stream:
        command = [MSMOE, "compress", switch, "--data", "-", "--experts", "3", "--refit", "sequential"]
        done = subprocess.run(
            [*command, "--out", tmp_path / "out"], stdin=stream, env=ENVIRONMENT, capture_output=True, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--columns", "question"), "--columns must look like source=question,target=answer, got 'question'"),
        (("--columns", "source=a,source=b"), "--columns names a field or a column twice"),
        (("--columns", "src=a"), "--columns: 'src' is no field of a record"),
        (("--columns", "source=nope"), "no column 'nope'; there are input_ids, labels"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--dtype", "int3"), "unknown --dtype 'int3'; choose from auto, float32, bfloat16, float16"),
    ],
)
@pytest.mark.parametrize("command", ["profile", "evaluate", "compress", "recover"])
def test_a_mistake_is_one_line(command, arguments, complaint, run, switch, data, tmp_path):
    extra = {"compress": ["--experts", "3"], "recover": ["--teacher", "none", "--steps", "1"]}.get(command, [])
    code, _, err = run(command, switch, "--data", data, "--out", tmp_path / "out", *extra, *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert complaint in err
    assert not (tmp_path / "out").exists()


def test_compare_refuses_standard_input(run, switch, data, tmp_path):
    code, _, err = run(
        "compare", switch, "--data", "-", "--tasks", data, "--methods", "m-smoe", "--out", tmp_path / "c"
    )
    assert code == 2
    assert "reads its data more than once: give a file in place of standard input" in err


def test_a_folder_of_tasks_of_several_formats_is_evaluated_file_by_file(run, switch, records, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_records(tasks / "a.jsonl", records[:3])
    (tasks / "b.json").write_text(json.dumps(records[3:6]))
    code, out, _ = run("evaluate", switch, "--data", tasks, "--json")
    assert code == 0
    assert [result["task"] for result in json.loads(out)] == ["a", "b"]


def test_a_loss_that_is_not_finite_writes_no_results(run, switch, records, tmp_path):
    from msmoe.families.loading import load

    model = load(switch)
    model.decoder.final_layer_norm.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "ckpt")
    data = write_records(tmp_path / "d.jsonl", records[:2])
    code, _, err = run("evaluate", tmp_path / "ckpt", "--data", data, "--out", tmp_path / "results.json")
    assert code == 2
    assert "though every weight is finite" in err
    assert not (tmp_path / "results.json").exists()
