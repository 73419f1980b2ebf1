"""`msmoe recover`: what it prints, and every kind of bad input in one line."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import layer_plan, load_tensors, plan_for, random_records, save_switch, write_records
from transformers import T5Config, T5ForConditionalGeneration

from msmoe.checkpoint import Checkpoint
from msmoe.cli import main
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.families.loading import load

SMALL = {
    "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    "num_experts": 4,
}  # fmt: skip
LAYERS = ("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp")
RECOVER = "recover small --teacher big --data data.jsonl --out new --steps 2"


@pytest.fixture
def msmoe(monkeypatch, capsys):
    """Run a command line in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msmoe", *map(str, arguments)])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder with an original `big`, its `exact` export `small`, that one factorised, and a T5."""
    folder = tmp_path_factory.mktemp("checkpoints")
    big = save_switch(folder / "big", **SMALL)
    apply(big, plan_for(Checkpoint(big), {n: layer_plan(4, [0, 1], [2, 3]) for n in LAYERS}), folder / "small")
    factorize(folder / "small", folder / "factorised", rank=4, keep_rows=0.25, keep_layers=["none"])
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=1, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    return folder


@pytest.fixture
def work(checkpoints, tmp_path, monkeypatch):
    """The current folder: checkpoints that may be damaged, and data."""
    for source in checkpoints.iterdir():
        shutil.copytree(source, tmp_path / source.name)
    write_records(tmp_path / "data.jsonl", random_records(24))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict:
    return {file: file.read_bytes() if file.is_file() else None for file in sorted(folder.rglob("*"))}


def test_json_is_all_that_is_printed_and_holds_the_report(work, msmoe):
    code, out, err = msmoe(*RECOVER.split(), "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["out"], report["steps"]) == ("new", 2)
    assert report["num_train"] + report["num_validation"] == 24
    assert report["num_bytes"] == sum(t.numel() * t.element_size() for t in load_tensors(work / "new").values())
    assert Path(report["log"]).read_text().count('"loss"') == 2


def test_the_losses_before_and_after_are_printed(work, msmoe):
    numbers = json.loads(msmoe(*RECOVER.split(), "--json")[1])
    code, out, err = msmoe(*RECOVER.split(), "--force")
    assert (code, err) == (0, "")
    assert f"2 steps on {numbers['num_train']} records" in out
    assert f"{numbers['validation_before']:.4f} -> {numbers['validation_after']:.4f}" in out
    assert f"wrote new: {numbers['num_parameters']:,} parameters" in out


def test_the_options_reach_the_run(work, msmoe):
    text = """--learning-rate 0.002 --batch-size 3 --accumulate 2 --kd-weight 0.3 --ce-weight 0.9 --temperature 3
        --hidden-weight 0.1 --warmup 0.5 --weight-decay 0.2 --clip 0.7 --validation-share 0.3 --evaluate-every 1
        --save-every 1 --train all --seed 5 --prune-warmup 0.1 --prune-final 0.2 --row-score magnitude --keep-rows 0.2
        --max-source-length 9 --max-target-length 8"""
    choices = text.split()
    assert msmoe(*RECOVER.replace("small", "factorised").split(), *choices)[0] == 0
    recovery = json.loads((work / "new" / "msmoe.json").read_text())["recovery"]
    given = dict(zip(choices[::2], choices[1::2], strict=True))
    assert {name: str(recovery[name.removeprefix("--").replace("-", "_")]) for name in given} == given | {
        "--temperature": "3.0"
    }


def test_without_a_length_three_epochs_are_run(work, msmoe):
    _, out, _ = msmoe(*RECOVER.replace(" --steps 2", "").split(), "--batch-size", "5", "--json")
    report = json.loads(out)
    assert report["steps"] == 3 * -(-report["num_train"] // 5)


def test_no_teacher_is_plain_fine_tuning(work, msmoe):
    code, _, err = msmoe(*RECOVER.replace("big", "none").split())
    assert (code, err) == (0, "")
    assert json.loads((work / "new" / "msmoe.json").read_text())["recovery"]["teacher"] is None


def test_a_student_that_did_not_get_better_is_said_to_be_unchanged(work, msmoe):
    data = [{"input_ids": [5, 6, 7], "labels": [n, n]} for n in range(2, 26)]  # nothing that holds for other records
    write_records(work / "data.jsonl", data)
    code, out, _ = msmoe(*RECOVER.split(), "--learning-rate", "50", "--warmup", "0")
    assert code == 0
    assert "no step was better than the student as it was: its weights were written unchanged" in out


def test_force_replaces_an_earlier_output(work, msmoe):
    occupy(work)
    Path("new/msmoe.json").touch()
    assert msmoe(*RECOVER.split(), "--force")[0] == 0
    assert not Path("new/precious").exists()
    assert load(work / "new").config.num_experts == 4


# Bad input: each is damaged by a function of the folder, and named by the one line on stderr


def nothing(work):
    pass


def occupy(work):
    (work / "new").mkdir()
    (work / "new" / "precious").write_text("keep")


def write_data(text: str):
    return lambda work: (work / "data.jsonl").write_text(text)


def put_nan(folder: str, name: str):
    def damage(work):
        tensors = load_file(work / folder / "model.safetensors")
        tensors[name].view(-1)[7] = float("nan")
        save_file(tensors, work / folder / "model.safetensors", {"format": "pt"})

    return damage


def replace_teacher(**options):
    def damage(work):
        shutil.rmtree(work / "big")
        save_switch(work / "big", **SMALL | options)

    return damage


def truncate_weights(work):
    os.truncate(work / "small" / "model.safetensors", 9000)


STACK = f"{LAYERS[1]}.experts.wo"
EXPERT = f"{LAYERS[0]}.experts.expert_2.wi.weight"
FACTORISED = RECOVER.replace("small", "factorised")
BAD = {
    "steps and epochs": (nothing, f"{RECOVER} --epochs 1", "give one of --steps and --epochs"),
    "no steps": (nothing, f"{RECOVER} --steps 0", "--steps must be above 0, got 0"),
    "endless epochs": (nothing, f"{RECOVER.replace('--steps 2', '--epochs inf')}", "--epochs"),
    "unknown part": (nothing, f"{RECOVER} --train head", "unknown --train 'head'; choose one of experts, router, all"),
    "validation share": (nothing, f"{RECOVER} --validation-share 1.5", "--validation-share must be between 0 and 1"),
    "no number": (nothing, f"{RECOVER} --clip much", "much"),
    "missing teacher option": (nothing, RECOVER.replace("--teacher big ", ""), "--teacher"),
    "missing student": (nothing, RECOVER.replace("small", "gone"), "no checkpoint folder at gone"),
    "missing teacher": (nothing, RECOVER.replace("big", "gone"), "no checkpoint folder at gone"),
    "missing data": (nothing, RECOVER.replace("data.", "gone."), "cannot read gone.jsonl"),
    "truncated student": (truncate_weights, RECOVER, "model.safetensors is truncated"),
    "empty data": (write_data(""), RECOVER, "data.jsonl holds no records"),
    "sources alone": (write_data('{"source": "a"}\n'), RECOVER, "data.jsonl, line 1: expected"),
    "no target token": (
        write_data('{"input_ids": [5], "labels": [0]}\n{"input_ids": [5], "labels": [0, -100]}\n'),
        RECOVER,
        "data.jsonl, line 1 is all padding: no target token left",
    ),
    "one record": (
        write_data('{"input_ids": [5], "labels": [7]}\n'),
        RECOVER,
        "data.jsonl leaves no record to train on beside 1 for validation",
    ),
    "all for validation": (nothing, f"{RECOVER} --validation data.jsonl", "data.jsonl leaves no record to train on"),
    "another vocabulary": (
        replace_teacher(vocab_size=80),
        RECOVER,
        "must share their vocabulary: small has 64 tokens, big has 80",
    ),
    "another width": (replace_teacher(d_model=32), f"{RECOVER} --hidden-weight 1", "--hidden-weight"),
    "another depth": (
        replace_teacher(num_layers=4, num_sparse_encoder_layers=2),
        f"{RECOVER} --hidden-weight 1",
        "--hidden-weight",
    ),
    "hidden states of a cache": (nothing, f"{RECOVER} --hidden-weight 1 --cache-teacher", "--cache-teacher keeps no"),
    "NaN in the student": (put_nan("small", STACK), RECOVER, f"tensor {STACK} of small holds NaN"),
    "NaN in the teacher": (put_nan("big", EXPERT), RECOVER, f"tensor {EXPERT} of big holds NaN"),
    "experts of a dense model": (
        nothing,
        RECOVER.replace("small", "t5"),
        "the student has no experts: use --train all",
    ),
    "rows of a dense student": (
        nothing,
        f"{RECOVER} --keep-rows 0.1",
        "--keep-rows prunes factorised experts, and the student has none: give --rank as well",
    ),
    "rank alone": (nothing, f"{RECOVER} --rank 4", "--rank factorises in memory with every row kept: give --keep-rows"),
    "large rank": (nothing, f"{RECOVER} --rank 17 --keep-rows 0.1", "--rank must be between 1 and 16, got 17"),
    "wasteful rank": (nothing, f"{RECOVER} --rank 16 --keep-rows 0.5", "would store more than the dense experts"),
    "rank of an original": (
        nothing,
        f"{RECOVER.replace('small', 'big')} --rank 4 --keep-rows 0.1",
        "--rank needs an exact checkpoint of msmoe as student; big is none",
    ),
    "rank of a factorised student": (nothing, f"{FACTORISED} --rank 4 --keep-rows 0.1", "factorised"),
    "more rows than there are": (
        nothing,  # a quarter is stored, 6 of 24 rows; half of them are asked for
        f"{FACTORISED} --keep-rows 0.5",
        "--keep-rows 0.5 asks for 12 rows of encoder.block.1.layer.1.mlp.experts.wi, which has 6",
    ),
    "occupied output": (occupy, RECOVER, "new exists; use --force to replace it"),
    "unwritable output": (nothing, RECOVER.replace("new", "data.jsonl/new"), "cannot write data.jsonl/new"),
}


@pytest.mark.parametrize(("damage", "command", "named"), BAD.values(), ids=BAD)
def test_a_bad_input_ends_with_one_line_that_names_it_and_leaves_nothing(damage, command, named, work, msmoe):
    damage(work)
    before = snapshot(work)
    code, out, err = msmoe(*command.split())
    assert (code, out) == (2, "")
    assert err.startswith("msmoe: ")
    assert err.count("\n") == 1
    assert named in err
    assert snapshot(work) == before


def test_a_diverging_run_ends_with_one_line_and_keeps_its_folder(work, msmoe):
    code, out, err = msmoe(*RECOVER.split(), "--learning-rate", "1e30", "--warmup", "0", "--evaluate-every", "2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the loss is nan at step 2; training stopped. The state of step 0 is kept in new.training" in err
    assert not Path("new").exists()
    assert msmoe(*RECOVER.split(), "--warmup", "0", "--evaluate-every", "2", "--resume")[0] == 0
