"""`msmoe factorize`, and factorising inside `plan`, `apply`, `compress` and `inspect`: output and bad input."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import LAYERS, load_tensors, profile_small, save_switch, size_of, weight_files, write_records

from msmoe.cli import main
from msmoe.compression.factorize import factorize
from msmoe.planning.planner import plan as make_plan


@pytest.fixture
def msmoe(monkeypatch, capsys):
    """Run a command line in this process; gives (exit code, stdout, stderr)."""

    def run(line: str, *more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msmoe", *line.split(), *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def work(switch, exact, factorized, stats, records, tmp_path, monkeypatch):
    """The current folder: an original, a merged and a factorised checkpoint, statistics, a plan and data."""
    shutil.copytree(switch, tmp_path / "ckpt")
    shutil.copytree(exact, tmp_path / "merged")
    (tmp_path / "small").symlink_to(factorized)
    stats.save(tmp_path / "stats")
    make_plan(switch, stats, method="mc-smoe", rank=4, experts=3).save(tmp_path / "plan.json")
    write_records(tmp_path / "data.jsonl", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict:
    return {file: file.read_bytes() if file.is_file() else None for file in sorted(folder.rglob("*"))}


FACTORIZE = "factorize merged --stats stats --rank 4 --out new"
PLAN = "plan ckpt --stats stats --method mc-smoe --experts 3 --out new"
APPLY = "apply ckpt --plan plan.json --stats stats --out new"
COMPRESS = "compress ckpt --data data.jsonl --method mc-smoe --experts 3 --samples 12 --out new"
RANKS = "inspect merged --ranks"


def test_json_is_all_that_is_printed_and_says_what_was_written(work, msmoe):
    code, out, err = msmoe(f"{FACTORIZE} --json")
    content = json.loads(out)
    assert (code, err) == (0, "")
    assert content["bytes"] == size_of(work / "new")
    assert content["shapes"] == {layer: {"wi": [4, 2], "wo": [4, 2]} for layer in LAYERS[1:]}
    assert content["matrices"] == json.loads((work / "new" / "msmoe.json").read_text())["factors"]["matrices"]
    assert content["dense"] == []


def test_the_command_writes_what_the_function_writes(work, factorized, msmoe):
    assert msmoe(FACTORIZE)[0] == 0
    assert weight_files(work / "new") == weight_files(factorized)


def test_every_option_reaches_the_function(work, stats, exact, tmp_path, msmoe):
    line = "factorize merged --stats stats --out new --rank 5 --keep-rows 0.2 --svd plain --row-score magnitude"
    assert msmoe(f"{line} --no-refit --keep-layer {LAYERS[0]} --keep-layer {LAYERS[3]}")[0] == 0
    options = {"keep_rows": 0.2, "svd": "plain", "row_score": "magnitude", "refit": False}
    factorize(exact, tmp_path / "same", stats=stats, rank=5, keep_layers=[LAYERS[0], LAYERS[3]], **options)
    assert weight_files(work / "new") == weight_files(tmp_path / "same")


@pytest.mark.parametrize("options", ["--target-ratio 0.9", "--target-bytes 100000", "--energy 0.7"])
def test_sizes_are_chosen_on_the_command_line(options, work, msmoe):
    code, out, err = msmoe(f"factorize merged --stats stats --out new {options} --json")
    assert (code, err) == (0, "")
    assert json.loads(out)["bytes"] == size_of(work / "new") <= 0.9 * size_of(work / "merged")


def test_the_native_export_is_written_from_an_original(work, msmoe):
    assert msmoe("factorize ckpt --rank 4 --export native --out new")[0] == 0
    assert load_tensors(work / "new").keys() == load_tensors(work / "ckpt").keys()


def test_the_table_has_a_row_per_layer_and_matrix_and_the_size(work, msmoe):
    code, out, err = msmoe(FACTORIZE)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.startswith(LAYERS[1:])]
    assert [(row[0], row[1]) for row in rows] == [(layer, m) for layer in LAYERS[1:] for m in ("wi", "wo")]
    assert all(row[3:5] == ["4", "2"] for row in rows)
    assert f"{size_of(work / 'new'):,} bytes" in out


def test_stable_ranks_before_merging_are_shown_where_the_original_is_named(work, msmoe):
    _, out, _ = msmoe(f"{FACTORIZE} --original ckpt --json")
    assert all(entry["stable_rank_before"] >= 1 for entry in json.loads(out)["matrices"])


def test_a_matrix_that_stays_dense_is_named(work, msmoe):
    _, out, _ = msmoe("factorize merged --rank 9 --keep-rows 0.05 --out new")
    assert out.count("stays dense: its factors would be larger") == 3
    assert f"wo of {LAYERS[2]} stays dense" in out


def test_the_help_tells_what_the_defaults_are(msmoe):
    code, out, _ = msmoe("factorize --help")
    assert code == 0
    assert "default 32" in out
    assert "default 0.10" in out
    assert "Example: msmoe factorize switch-small --stats stats --rank 32 --keep-rows 0.10 --out switch-tiny" in out


def test_a_dry_run_predicts_the_bytes_that_apply_writes(work, msmoe):
    _, out, _ = msmoe("plan ckpt --stats stats --method mc-smoe --experts 3 --rank 4 --dry-run --json")
    assert msmoe(APPLY)[0] == 0
    assert json.loads(out)["predicted"]["bytes"] == size_of(work / "new")


def test_a_dry_run_that_cannot_know_the_size_says_so(work, msmoe):
    code, out, err = msmoe("plan ckpt --stats stats --method mc-smoe --experts 3 --energy 0.8 --dry-run")
    assert (code, err) == (0, "")
    assert "predicted: known once the merged experts are decomposed" in out


def test_compress_factorises_in_one_go(work, msmoe):
    code, out, err = msmoe(f"{COMPRESS} --rank 4 --json")
    content = json.loads(out)
    assert (code, err) == (0, "")
    assert content["bytes"] == size_of(work / "new")
    assert {entry["layer"] for entry in content["factors"]} == set(LAYERS[1:])
    assert {"new", "new.merged", "new.partial", "new.spectra"} & {f.name for f in work.iterdir()} == {"new"}


def test_apply_prints_the_factors_below_the_merging(work, msmoe):
    _, out, _ = msmoe(APPLY)
    assert "merged groups" in out
    assert "Factors (errors relative" in out


def test_inspecting_ranks_prints_the_entries_of_every_stored_expert(work, msmoe):
    code, out, err = msmoe(f"{RANKS} --rank 3 --stats stats --original ckpt --json")
    ranks = json.loads(out)["ranks"]
    counts = json.loads((work / "merged" / "config.json").read_text())["moe_layers"]
    assert (code, err) == (0, "")
    assert len(ranks) == 2 * sum(counts.values())
    assert {entry["rank"] for entry in ranks} == {3}
    assert all("output_error" in entry for entry in ranks)


def test_inspecting_ranks_of_a_factorised_checkpoint_shows_what_is_stored(work, msmoe):
    _, out, _ = msmoe("inspect small --ranks --json")
    stored = json.loads((work / "small" / "msmoe.json").read_text())["factors"]["matrices"]
    assert json.loads(out)["ranks"] == stored


# Bad input


def put_nan(work):
    key = f"{LAYERS[2]}.experts.wo"
    tensors = load_file(work / "merged" / "model.safetensors")
    tensors[key][0, 7, 11] = float("nan")
    save_file(tensors, work / "merged" / "model.safetensors", {"format": "pt"})


def truncate(work):
    os.truncate(work / "merged" / "model.safetensors", 20_000)


def occupy(work):
    (work / "new").mkdir()
    (work / "new" / "precious").write_text("keep")


def replace_stats(work):
    shutil.rmtree(work / "stats")
    profile_small(save_switch(work / "other", seed=1), work / "data.jsonl").save(work / "stats")


def lose_data(work):
    (work / "data.jsonl").unlink()


def nothing(work):
    pass


WITHOUT_STATS = "factorize merged --out new"
BAD = {
    "rank beyond the matrix": (nothing, [f"{c} --rank 17" for c in (FACTORIZE, PLAN, RANKS)], "between 1 and 16"),
    "rank zero": (nothing, [f"{c} --rank 0" for c in (FACTORIZE, PLAN, COMPRESS, RANKS)], "--rank must be at least 1"),
    "no rank": (nothing, [f"{FACTORIZE} --rank many"], "many"),
    "share of rows": (
        nothing,
        [f"{c} --keep-rows 1.5" for c in (FACTORIZE, PLAN, COMPRESS)],
        "--keep-rows must be between 0 and 1, got 1.5",
    ),
    "energy": (
        nothing,
        [f"{WITHOUT_STATS} --energy 0", f"{PLAN} --energy 0"],
        "--energy must be above 0 and at most 1",
    ),
    "ratio": (
        nothing,
        [f"{WITHOUT_STATS} --stats stats --target-ratio 1.5", f"{COMPRESS} --target-ratio 1.5"],
        "--target-ratio must be above 0 and at most 1, got 1.5",
    ),
    "two sizes": (
        nothing,
        [f"{c} --rank 4 --energy 0.5" for c in (FACTORIZE, PLAN, COMPRESS)],
        "give one of --rank, --energy, not 2",
    ),
    "budget below the smallest": (
        nothing,
        [f"{WITHOUT_STATS} --stats stats --target-bytes 1000", f"{PLAN} --target-bytes 1000"],
        "the budget of 1,000 bytes is below the smallest possible model: 9",
    ),
    "budget without statistics": (nothing, [f"{WITHOUT_STATS} --target-ratio 0.9"], "--target-ratio needs --stats"),
    "weighting without statistics": (nothing, [f"{WITHOUT_STATS} --svd activation"], "--svd activation needs --stats"),
    "refit without statistics": (nothing, [f"{WITHOUT_STATS} --refit"], "--refit needs --stats"),
    "statistics of another model": (replace_stats, [FACTORIZE], "statistics are of another checkpoint"),
    "missing statistics": (nothing, [f"{WITHOUT_STATS} --stats gone"], "gone is not a statistics directory"),
    "factorised already": (nothing, ["factorize small --rank 2 --out new"], "small is factorised already"),
    "unknown decomposition": (
        nothing,
        [f"{c} --svd whitened" for c in (FACTORIZE, PLAN, COMPRESS)],
        "svd 'whitened'",
    ),
    "unknown score": (
        nothing,
        [f"{c} --row-score usage" for c in (FACTORIZE, PLAN, COMPRESS)],
        "row-score 'usage'",
    ),
    "unknown layer": (nothing, [f"{FACTORIZE} --keep-layer encoder.block.2"], f"choose from {LAYERS[0]}"),
    "every layer kept": (
        nothing,
        [f"{FACTORIZE} {' '.join(f'--keep-layer {layer}' for layer in LAYERS)}"],
        "every MoE layer is kept: nothing to factorise",
    ),
    "NaN": (put_nan, [FACTORIZE, f"{WITHOUT_STATS} --energy 0.7", RANKS], f"tensor {LAYERS[2]}.experts.wo of merged"),
    "truncated weights": (truncate, [FACTORIZE, RANKS], "model.safetensors is truncated"),
    "missing checkpoint": (nothing, ["factorize gone --rank 4 --out new"], "no checkpoint folder at gone"),
    "occupied output": (occupy, [FACTORIZE, PLAN, APPLY, COMPRESS], "new exists; use --force to replace it"),
    "unwritable output": (
        nothing,
        [f"{FACTORIZE[: -len('new')]}plan.json/new", f"{WITHOUT_STATS[: -len('new')]}plan.json/new --energy 0.7"],
        "cannot write plan.json/new",
    ),
    "dense export": (nothing, [f"{c} --export dense" for c in (FACTORIZE, PLAN, APPLY, COMPRESS)], "--export dense"),
    "native export of an exact checkpoint": (nothing, [f"{FACTORIZE} --export native"], "needs a stock checkpoint"),
    "budget for the native export": (
        nothing,
        ["factorize ckpt --stats stats --target-ratio 0.9 --export native --out new"],
        "--export native multiplies the factors out",
    ),
    "kept rows without factors": (
        nothing,
        [f"{c.replace('mc-smoe', 'm-smoe')} --keep-rows 0.2" for c in (PLAN, COMPRESS)],
        "--keep-rows has no effect with method m-smoe",
    ),
    "plan without statistics": (nothing, [APPLY.replace(" --stats stats", "")], "this plan needs --stats"),
    "rank before profiling": (lose_data, [f"{COMPRESS} --rank 17"], "--rank must be between 1 and 16"),
    "budget before profiling": (lose_data, [f"{COMPRESS} --target-bytes 1000"], "below the smallest possible model"),
    "export before profiling": (lose_data, [f"{COMPRESS} --export dense"], "--export dense cannot"),
    "wrong shard size": (nothing, [f"{FACTORIZE} --max-shard-size huge"], "--max-shard-size must look like 5GB"),
    "ranks not asked for": (nothing, ["inspect merged --rank 4", "inspect merged --stats stats"], "without --ranks"),
    "original of another model": (
        replace_stats,
        [f"{c} --original other" for c in ("factorize merged --rank 4 --out new", RANKS)],
        "plan was made for another checkpoint than other",
    ),
}


@pytest.mark.parametrize(
    ("damage", "command", "named"),
    [
        pytest.param(damage, command, named, id=f"{name}: {command.split()[0]} {i}")
        for name, (damage, commands, named) in BAD.items()
        for i, command in enumerate(commands)
    ],
)
def test_a_bad_input_ends_with_one_line_that_names_it_and_leaves_nothing(damage, command, named, work, msmoe):
    damage(work)
    before = snapshot(work)
    code, out, err = msmoe(command)
    assert code == 2
    assert out == ""
    assert err.startswith("msmoe: ")
    assert err.count("\n") == 1
    assert named in err
    assert snapshot(work) == before


def test_force_replaces_an_earlier_output(work, msmoe):
    occupy(work)
    Path("new/msmoe.json").touch()
    assert msmoe(f"{FACTORIZE} --force")[0] == 0
    assert not Path("new/precious").exists()
    assert size_of(work / "new") < size_of(work / "merged")
