"""What `msmoe compare` does once for all methods on a synthetic switch-base checkpoint: calibration and planning.

    python scripts/bench/compare.py                     calibration at 8 experts (2.5 GB), planning at 32 (7.9 GB)
    python scripts/bench/compare.py --only planning --experts 8 --records 64

Calibration: recording the statistics that every method together needs, beside one stock transformers forward pass over
the same batches, head left out; no more than 1.5 x. Output gradients are recorded for `FISHER_RECORDS` of 256 records,
or the same share of fewer. Loading the model and saving the statistics count for neither.

Planning: every method of the table, one after the other, by one `Planner` in all 12 MoE layers; under a minute. The
first of the methods that share what experts give pays for all. Aligning neurons belongs to `apply`.

The checkpoint is that of scripts/bench/pipeline.py. Each stage is a process of its own.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

SCRIPT = sys.argv[0]
if "--stage" in sys.argv:
    sys.argv[0] = "msmoe"  # as the command does: the model classes are imported where a stage needs them

from pipeline import (  # noqa: E402
    BATCH_SIZE,
    NUM_RECORDS,
    build,
    data_of,
    geometry,
    load_calibrated,
    run_stage_of,
    time_recording,
)

from msmoe.comparison.settings import FISHER_RECORDS  # noqa: E402
from msmoe.evaluation.run import peak_memory  # noqa: E402
from msmoe.planning.methods import METHODS  # noqa: E402

NUM_KEPT = 8
MAX_CALIBRATION, MAX_PLANNING = 1.5, 60.0  # stock forward passes; seconds
HEADROOM = 1.1  # disk beyond the checkpoint's bytes, for statistics and plans


def stage_calibration(folder: Path, work: Path, num_records: int) -> dict:
    """Recorded forward passes and output gradients beside stock forward passes, on the same loaded model."""
    from msmoe.calibration.output_gradients import output_gradients

    family, model, records = load_calibrated(folder, num_records)
    stock, recorded, layers = time_recording(family, model, records)
    some = records[: num_fisher(num_records)]
    started = time.perf_counter()
    output_gradients(family, model, layers, some, batch_size=BATCH_SIZE, seed=0)
    return {"stock": stock, "recorded": recorded, "gradients": time.perf_counter() - started}


def stage_stats(folder: Path, work: Path, num_records: int) -> dict:
    """The statistics that planning reads."""
    import msmoe

    stats = msmoe.profile(folder, data_of(folder), samples=num_records, fisher=num_fisher(num_records))
    stats.save(work / "stats", force=True)
    return {}


def stage_planning(folder: Path, work: Path, num_records: int) -> dict:
    """Seconds of opening checkpoint and statistics, and of every method's plan."""
    from msmoe.planning.planner import Planner

    started = time.perf_counter()
    planner = Planner(folder, work / "stats")
    seconds = {"open checkpoint and statistics": time.perf_counter() - started}
    for name, method in METHODS.items():
        kept = {} if method.fixed else {"experts": NUM_KEPT}
        started = time.perf_counter()
        planner.plan(name, keep_layers=["none"], **kept)
        seconds[name] = time.perf_counter() - started
    return {"seconds": seconds}


def num_fisher(num_records: int) -> int:
    return max(1, round(FISHER_RECORDS * num_records / NUM_RECORDS))


def prepare(workdir: Path, num_experts: int, num_records: int) -> tuple[Path, Path, list[Path]]:
    """Build the checkpoint unless it is there.

    Returns:
        its folder, the folder for what is made of it, and everything that was not there before.

    Raises:
        SystemExit: if it would not fit on the disk.
    """
    folder, work = workdir / f"switch-base-{num_experts}", workdir / f"compare-{num_experts}"
    made = [path for path in (folder, data_of(folder), work) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    if folder in made:
        needed = HEADROOM * sum(spec.num_bytes for spec in geometry(num_experts)[1])
        free = shutil.disk_usage(workdir).free
        if free < needed:
            raise SystemExit(
                f"the checkpoint of {num_experts} experts needs {needed / 1e9:.1f} GB in {workdir}, which has "
                f"{free / 1e9:.1f} GB free: give --workdir on a larger disk, or fewer --experts"
            )
        build(folder, num_experts)
    work.mkdir(exist_ok=True)
    return folder, work, made


def bench(name: str, workdir: Path, num_experts: int, num_records: int, *, keep: bool) -> dict:
    """Run the stages of one part."""
    folder, work, made = prepare(workdir, num_experts, num_records)
    try:
        result = {}
        for stage in ("stats", "planning") if name == "planning" else ("calibration",):
            result = run_stage_of(SCRIPT, stage, folder, work, "--records", str(num_records))
    finally:
        for path in () if keep else made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return result


def print_calibration(found: dict, num_experts: int, num_records: int) -> None:
    stock = found["stock"]
    rows = {
        "stock forward pass, head left out": (stock, None),
        "recorded forward pass": (found["recorded"], None),
        "of these, the hooks": (found["recorded"] - stock, None),
        f"output gradients of {num_fisher(num_records)} records": (found["gradients"], None),
        "all statistics": (found["recorded"] + found["gradients"], MAX_CALIBRATION),
    }
    print(f"\nCalibration, {num_experts} experts per layer, {num_records} records\n")
    print("| | seconds | beside the stock pass | limit |\n|---|---|---|---|")
    for name, (seconds, limit) in rows.items():
        print(f"| {name} | {seconds:.2f} | {seconds / stock:.2f} x | {f'{limit} x' if limit else ''} |")


def print_planning(found: dict, num_experts: int, num_records: int) -> None:
    print(f"\nPlanning, {num_experts} experts per layer, {NUM_KEPT} kept, statistics of {num_records} records\n")
    print("| method | seconds | limit |\n|---|---|---|")
    for name, seconds in found["seconds"].items():
        print(f"| {name} | {seconds:.2f} | |")
    print(f"| all | {sum(found['seconds'].values()):.2f} | {MAX_PLANNING:.0f} |")


def describe_machine(found: dict) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} cores, {found['threads']} threads, load average {load}; peak {found['peak'] / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32, help="experts per layer in planning (default 32)")
    parser.add_argument("--calibration-experts", type=int, default=8, help="the same in calibration (default 8)")
    parser.add_argument("--records", type=int, default=NUM_RECORDS, help=f"calibration records, at most {NUM_RECORDS}")
    parser.add_argument("--only", choices=("calibration", "planning"), help="one of the two parts")
    parser.add_argument("--workdir", type=Path, default=Path("build/bench"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints that were built for the next run")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.records <= NUM_RECORDS:
        parser.error(f"--records must be between 1 and {NUM_RECORDS}, got {args.records}")
    if args.experts < NUM_KEPT:
        parser.error(f"--experts must be at least {NUM_KEPT}, the experts kept, got {args.experts}")
    if args.stage:
        found = globals()[f"stage_{args.stage}"](args.folder, args.work, args.records)
        print(json.dumps(found | {"peak": peak_memory(), "threads": torch.get_num_threads()}))
        return
    parts = {
        "calibration": (args.calibration_experts, print_calibration),
        "planning": (args.experts, print_planning),
    }
    for name, (num_experts, show) in parts.items():
        if args.only in (None, name):
            found = bench(name, args.workdir, num_experts, args.records, keep=args.keep)
            show(found, num_experts, args.records)
            print(f"\n{describe_machine(found)}", flush=True)


if __name__ == "__main__":
    main()
