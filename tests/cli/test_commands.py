"""The commands: JSON, dry runs, every kind of bad input, and a process killed half-way."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import LAYERS, load_tensors, profile_small, save_switch, weight_files, write_records

from msmoe.checkpoint import Checkpoint
from msmoe.cli import COMMANDS, app, main
from msmoe.demo import CALIBRATION, CHECKPOINT
from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.planning.planner import plan as make_plan

MSMOE = Path(sys.executable).with_name("msmoe")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def msmoe(monkeypatch, capsys):
    """Run a command line in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def work(switch, stats, records, tmp_path, monkeypatch):
    """The current folder: a checkpoint that may be damaged, its statistics, a plan and data."""
    shutil.copytree(switch, tmp_path / "ckpt")
    stats.save(tmp_path / "stats")
    make_plan(switch, stats, experts=3).save(tmp_path / "plan.json")
    write_records(tmp_path / "data.jsonl", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict:
    return {file: file.read_bytes() if file.is_file() else None for file in sorted(folder.rglob("*"))}


def size_of(folder: Path) -> int:
    """Bytes of all stored tensors."""
    return sum(t.numel() * t.element_size() for t in load_tensors(folder).values())


# JSON, dry runs, help


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("inspect ckpt", "layers"),
        ("profile ckpt --data data.jsonl --out new", "layers"),
        ("plan ckpt --stats stats --experts 3 --out new", "layers"),
        ("plan ckpt --stats stats --experts 3 --dry-run", "predicted"),
        ("apply ckpt --plan plan.json --stats stats --out new", "bytes"),
        ("compress ckpt --data data.jsonl --experts 3 --out new", "bytes"),
        ("methods", "m-smoe-refit"),
    ],
)
def test_json_is_all_that_is_printed(command, key, work, msmoe):
    code, out, err = msmoe(*command.split(), "--json")
    assert (code, err) == (0, "")
    assert key in json.loads(out)


def test_evaluate_prints_the_records_of_results_json(work, msmoe):
    code, out, err = msmoe(*["evaluate", "ckpt", "--data", "data.jsonl", "--out", "results.json", "--json"])
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(Path("results.json").read_text())["results"]


def test_a_folder_stands_for_its_task_files(work, records, msmoe):
    Path("tasks").mkdir()
    for name in ("b", "a"):
        write_records(Path(f"tasks/{name}.jsonl"), records[:4])
    _, out, _ = msmoe(*["evaluate", "ckpt", "--data", "tasks", "--json"])
    assert [result["task"] for result in json.loads(out)] == ["a", "b"]


def test_a_dry_run_writes_nothing_even_where_a_name_is_given(work, msmoe):
    before = snapshot(work)
    assert msmoe(*["plan", "ckpt", "--stats", "stats", "--experts", "3", "--out", "new.json", "--dry-run"])[0] == 0
    assert snapshot(work) == before


@pytest.mark.parametrize(
    ("export", "choices"),
    [
        ("exact", "--experts 2.5"),
        ("native", "--experts 3 --budget uniform --keep-layer none"),
        ("dense", "--experts 1 --keep-layer none"),
    ],
)
def test_a_dry_run_predicts_the_bytes_that_apply_writes(export, choices, work, msmoe):
    planning = f"plan ckpt --stats stats --export {export} {choices}"
    _, out, _ = msmoe(*planning.split(), "--dry-run", "--json")
    msmoe(*planning.split(), "--out", "made.json")
    assert msmoe(*f"apply ckpt --plan made.json --stats stats --export {export} --out out".split())[0] == 0
    predicted = json.loads(out)["predicted"]
    assert predicted["bytes"] == size_of(work / "out")
    assert predicted["num_parameters"] == sum(p.numel() for p in load(work / "out").parameters())


def test_a_dry_run_of_compress_predicts_the_bytes_and_writes_nothing(work, msmoe):
    before = snapshot(work)
    code, out, err = msmoe(*COMPRESS.split(), "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert snapshot(work) == before
    assert msmoe(*COMPRESS.split())[0] == 0
    assert json.loads(out)["predicted"]["bytes"] == size_of(work / "new")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_an_example_that_parses(name, msmoe):
    code, out, _ = msmoe(name, "--help")
    example = re.search(r"Example: msmoe (.+)", out)
    assert code == 0
    assert example
    words = shlex.split(example[1])
    assert words[0] == name
    app.get_command(None, name).make_context(name, words[1:])  # raises for an option that does not exist


def test_without_arguments_the_commands_are_listed(msmoe):
    code, out, err = msmoe()
    assert (code, out) == (2, "")
    assert all(re.search(rf"^ +{name} ", err, re.MULTILINE) for name in COMMANDS)


# Bad input: each is damaged by a function of the folder, and named by the one line on stderr


def edit_json(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def remove_weights(work):
    (work / "ckpt" / "model.safetensors").unlink()


def truncate_weights(work):
    os.truncate(work / "ckpt" / "model.safetensors", 20_000)


def corrupt_header(work):
    with (work / "ckpt" / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"\xff\xff\xff")


def lose_a_shard(work):
    shutil.rmtree(work / "ckpt")
    save_switch(work / "ckpt", max_shard_size="20KB")
    sorted((work / "ckpt").glob("*.safetensors"))[1].unlink()


NAN_KEY = f"{LAYERS[2]}.experts.expert_1.wo.weight"


def put_nan(work):
    def edit(tensors):
        tensors[NAN_KEY][7, 11] = float("nan")

    edit_weights(work / "ckpt", edit)


def drop_the_experts(work):
    def edit(tensors):
        for name in [n for n in tensors if ".experts." in n or ".router." in n]:
            del tensors[name]

    edit_weights(work / "ckpt", edit)


def rename_architecture(work):
    edit_json(work / "ckpt" / "config.json", lambda config: config.update(model_type="mixtral"))


def replace_checkpoint(work):
    shutil.rmtree(work / "ckpt")
    save_switch(work / "ckpt", seed=1)


def edit_members(first: list[int]):
    """Give the first group of a layer these members, with equal weights."""

    def edit(plan):
        group = plan["layers"][LAYERS[1]]["groups"][0]
        group.update(dominant=first[0], members=first, weights=[1 / len(first)] * len(first))

    return lambda work: edit_json(work / "plan.json", edit)


def name_a_path(work):
    def edit(plan):
        plan["layers"]["../../etc/passwd"] = plan["layers"].pop(LAYERS[1])

    edit_json(work / "plan.json", edit)


def replace_stats(work):
    replace_checkpoint(work)
    shutil.rmtree(work / "stats")
    profile_small(work / "ckpt", work / "data.jsonl").save(work / "stats")
    shutil.rmtree(work / "ckpt")
    save_switch(work / "ckpt")


def write_data(text: str):
    return lambda work: (work / "data.jsonl").write_text(text)


def occupy(work):
    (work / "new").mkdir()
    (work / "new" / "precious").write_text("keep")


def nothing(work):
    pass


INSPECT = "inspect ckpt"
PROFILE = "profile ckpt --data data.jsonl --out new"
PLAN = "plan ckpt --stats stats --experts 3 --out new"
APPLY = "apply ckpt --plan plan.json --stats stats --out new"
COMPRESS = "compress ckpt --data data.jsonl --experts 3 --out new"
EVALUATE = "evaluate ckpt --data data.jsonl --out new"
GOOD_LINE = '{"input_ids": [5, 6], "labels": [7]}\n'
BAD = {
    "missing weights": (remove_weights, [INSPECT, COMPRESS], "ckpt holds no model.safetensors"),
    "truncated weights": (truncate_weights, [INSPECT, COMPRESS, EVALUATE], "model.safetensors is truncated"),
    "corrupted header": (corrupt_header, [INSPECT, PROFILE], "model.safetensors has a corrupted safetensors header"),
    "missing shard": (lose_a_shard, [INSPECT, COMPRESS], "model-00002-of-"),
    "missing checkpoint": (nothing, ["inspect elsewhere"], "no checkpoint folder at elsewhere"),
    "NaN": (put_nan, [PROFILE, COMPRESS], NAN_KEY),
    "no experts": (drop_the_experts, [PROFILE, COMPRESS], "ckpt is not a Mixture-of-Experts model"),
    "unknown architecture": (rename_architecture, [INSPECT, COMPRESS, EVALUATE], "architecture 'mixtral'"),
    "plan of another checkpoint": (replace_checkpoint, [APPLY], "plan was made for another checkpoint than ckpt"),
    "expert twice": (edit_members([0, 0]), [APPLY], f"{LAYERS[1]}: expert 0 is named twice"),
    "expert out of range": (edit_members([6]), [APPLY], f"{LAYERS[1]}: expert 6 is out of range"),
    "path as layer": (name_a_path, [APPLY], "'../../etc/passwd' is not a layer name"),
    "no plan": (nothing, [APPLY.replace("plan.json", "data.jsonl")], "data.jsonl is not a"),
    "statistics of another model": (replace_stats, [PLAN, APPLY], "statistics are of another checkpoint than ckpt"),
    "missing statistics": (nothing, ["plan ckpt --stats gone --out new"], "gone is not a statistics directory"),
    "empty data": (write_data(""), [PROFILE, COMPRESS, EVALUATE], "data.jsonl holds no records"),
    "malformed line": (
        write_data(GOOD_LINE + "{oops\n"),
        [PROFILE, COMPRESS, EVALUATE],
        "data.jsonl, line 2: not JSON",
    ),
    "wrong record": (
        write_data(GOOD_LINE * 2 + '{"a": 1}\n'),
        [PROFILE, COMPRESS, EVALUATE],
        "data.jsonl, line 3: exp",
    ),
    "padding only": (
        write_data('{"input_ids": [0, 0], "labels": [7]}\n'),
        [PROFILE, COMPRESS, EVALUATE],
        "data.jsonl, line 1 is all padding",
    ),
    "missing data": (nothing, [PROFILE.replace("data.jsonl", "gone.jsonl")], "cannot read gone.jsonl"),
    "too many experts": (
        nothing,
        [f"{PLAN} --experts 7", f"{COMPRESS} --experts 7"],
        "between 1 and 6 (num_experts of",
    ),
    "occupied output": (occupy, [PROFILE, PLAN, APPLY, COMPRESS, EVALUATE], "new exists; use --force to replace it"),
    "unwritable output": (
        lambda folder: (folder / "file").touch(),
        [f"{c.rsplit(' ', 1)[0]} file/new" for c in (PROFILE, PLAN, APPLY, COMPRESS, EVALUATE)],
        "cannot write file/new",
    ),
    "unknown method": (nothing, [f"{PLAN} --method m-smo", f"{COMPRESS} --method m-smo"], "did you mean 'm-smoe'"),
    "unknown similarity": (nothing, [f"{PLAN} --similarity router-logit"], "did you mean 'router-logits'"),
    "unknown export": (nothing, [f"{APPLY} --export onnx", f"{COMPRESS} --export onnx"], "unknown export 'onnx'"),
    "unknown metric": (nothing, [f"{EVALUATE} --metrics bleu"], "unknown metric 'bleu'"),
    "refit without statistics": (nothing, [APPLY.replace(" --stats stats", "")], "needs --stats for its refit"),
    "wrong size": (nothing, [f"{APPLY} --max-shard-size huge"], "--max-shard-size must look like 5GB"),
    "unknown option": (nothing, [f"{PLAN} --expert 3"], "--expert"),
    "unknown command": (nothing, ["squeeze ckpt"], "squeeze"),
    "missing option": (nothing, ["apply ckpt --plan plan.json"], "--out"),
    "no batch": (nothing, [f"{c} --batch-size 0" for c in (PROFILE, COMPRESS, EVALUATE)], "--batch-size"),
    "no samples": (nothing, [f"{c} --samples 0" for c in (PROFILE, COMPRESS, EVALUATE, "demo --out new")], "--samples"),
    "negative seed": (nothing, [f"{c} --seed -1" for c in (PROFILE, PLAN, COMPRESS, EVALUATE)], "--seed"),
    "no shard size": (nothing, [f"{APPLY} --max-shard-size 0"], "--max-shard-size must look like 5GB"),
    "unknown device": (nothing, [f"{PROFILE} --device abacus", f"{COMPRESS} --device abacus"], "abacus"),
    "unknown parameter in the plan": (
        lambda work: edit_json(work / "plan.json", lambda plan: plan["parameters"].update(align="weights")),
        [APPLY],
        "unknown align 'weights' - did you mean 'weight'?",
    ),
    "folder without tasks": (nothing, ["evaluate ckpt --data stats"], "stats is a folder without *.jsonl files"),
    "endless shard size": (nothing, [f"{APPLY} --max-shard-size inf"], "--max-shard-size must look like 5GB"),
    "unwritable demo": (nothing, ["demo --out plan.json/new"], "cannot write plan.json/new"),
    "unknown method of the demo": (nothing, ["demo --out new --method m-smo"], "did you mean 'm-smoe'"),
    "no number": (nothing, [f"{PLAN} --seed many"], "many"),
}


@pytest.mark.parametrize(
    ("damage", "command", "named"),
    [
        pytest.param(damage, command, named, id=f"{name}: {command.split()[0]}")
        for name, (damage, commands, named) in BAD.items()
        for command in commands
    ],
)
def test_a_bad_input_ends_with_one_line_that_names_it_and_leaves_nothing(damage, command, named, work, msmoe):
    damage(work)
    before = snapshot(work)
    code, out, err = msmoe(*command.split())
    assert code == 2
    assert out == ""
    assert err.startswith("msmoe: ")
    assert err.count("\n") == 1
    assert named in err
    assert snapshot(work) == before


def test_nan_in_a_merged_expert_is_named_while_applying(work, msmoe):
    layer = json.loads(Path("plan.json").read_text())["layers"][LAYERS[2]]
    member = max(layer["groups"], key=lambda group: len(group["members"]))["members"][-1]
    key = f"{LAYERS[2]}.experts.expert_{member}.wi.weight"

    def edit(tensors):
        tensors[key][12, 8] = float("nan")

    edit_weights(work / "ckpt", edit)
    fingerprint = Checkpoint(work / "ckpt").fingerprint
    for file in (work / "plan.json", work / "stats" / "stats.json"):
        edit_json(file, lambda content: content["checkpoint"].update(fingerprint=fingerprint))
    edit_json(work / "plan.json", lambda content: content.update(stats={}))
    before = snapshot(work)
    code, _, err = msmoe(*APPLY.split())
    assert (code, err.count("\n")) == (2, 1)
    assert key in err
    assert snapshot(work) == before


def test_force_replaces_an_earlier_output(work, msmoe):
    occupy(work)
    Path("new/msmoe.json").touch()
    assert msmoe(*APPLY.split(), "--force")[0] == 0
    assert not Path("new/precious").exists()
    assert load(work / "new").config.num_experts == 6


def test_debug_anywhere_raises_the_error_itself(work, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["msmoe", "--debug", "inspect", "elsewhere"])
    with pytest.raises(UserError, match="no checkpoint folder at elsewhere"):
        main()


def test_debug_shows_a_traceback(tmp_path):
    command = [MSMOE, "inspect", "elsewhere", "--debug"]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr.startswith("Traceback (most recent call last)")
    assert run.stderr.rstrip().endswith("no checkpoint folder at elsewhere")


# A killed process


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Arguments of a `compress` of the embedded checkpoint that was killed in the middle of merging, and its folder."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["compress", str(CHECKPOINT), "--data", str(CALIBRATION), "--samples", "24", "--experts", "4"]
    arguments += ["--token-sample", "1024", "--out", str(folder / "out")]
    process = subprocess.Popen([MSMOE, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    journal = folder / ".out.msmoe-partial" / "journal"
    while process.poll() is None and not (journal.exists() and journal.read_text().count('{"notes":') >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the command ended before it could be killed"
    return folder, arguments


def test_a_killed_compress_leaves_nothing_under_the_final_name(killed):
    assert [file.name for file in killed[0].iterdir()] == [".out.msmoe-partial"]


def test_resume_finishes_a_killed_compress_to_the_same_weights(killed, msmoe, tmp_path):
    folder, arguments = killed
    whole = [*arguments[:-1], str(tmp_path / "whole")]
    assert msmoe(*arguments, "--resume")[0] == 0
    assert msmoe(*whole)[0] == 0
    assert [file.name for file in folder.iterdir()] == ["out"]
    assert weight_files(folder / "out") == weight_files(tmp_path / "whole")
