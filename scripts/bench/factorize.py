"""Time and peak memory of factorising a synthetic switch-base-8 (620 M parameters), and of its forward pass.

    python scripts/bench/factorize.py

The checkpoint is that of scripts/bench/pipeline.py: 88 experts of 3072 x 768 in the 11 layers that are factorised. The
floor is measured in the same run: one full singular value decomposition of the same 176 matrices by torch, a batch per
layer and matrix, and a copy of the bytes read and written. Each stage is a process of its own; memory is its peak
resident size. The forward pass is that of one expert stack on tokens already sorted, at ranks 8 to 256, beside dense.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

SCRIPT = sys.argv[0]
if "--stage" in sys.argv:
    sys.argv[0] = "msmoe"  # as the command does: the model classes are imported where a stage needs them

from pipeline import D_FF, D_MODEL, best_of, build, data_of, run_stage_of  # noqa: E402

from msmoe.checkpoint import Checkpoint  # noqa: E402
from msmoe.evaluation.run import peak_memory  # noqa: E402

VARIANTS = {
    "plain, rank 32, 10 % rows": {"rank": 32},
    "activation + refit, rank 32, 10 % rows": {"rank": 32, "stats": True},
    "activation + refit, budget of half the bytes": {"target_ratio": 0.5, "stats": True},
}
RANKS = (8, 16, 32, 64, 128, 256)
NUM_GROUPS = 8


def stage_stats(folder: Path, work: Path) -> dict:
    import msmoe

    if not (work / "stats").exists():
        msmoe.profile(folder, data_of(folder)).save(work / "stats")
    return {}


def stage_factorize(folder: Path, work: Path, variant: str) -> dict:
    from msmoe.compression.factorize import factorize

    options = dict(VARIANTS[variant])
    stats = work / "stats" if options.pop("stats", False) else None
    started = time.perf_counter()
    report = factorize(folder, work / "factorized", stats=stats, force=True, **options)
    return {"seconds": time.perf_counter() - started, "bytes": report.num_bytes}


def stage_svd(folder: Path, work: Path) -> dict:
    """Full decompositions of the same matrices, a batch per layer and matrix."""
    from msmoe.families import family_of

    source = Checkpoint(folder)
    family = family_of(source)
    seconds = 0.0
    for layer in family.layers(source)[1:]:
        experts = [family.load_expert(source, layer.name, e) for e in range(layer.num_experts)]
        for stack in (torch.stack([e.front for e in experts]), torch.stack([e.output for e in experts])):
            started = time.perf_counter()
            torch.linalg.svd(stack, full_matrices=False)
            seconds += time.perf_counter() - started
    return {"seconds": seconds}


def stage_copy(folder: Path, work: Path) -> dict:
    """Read the input and write the output's bytes."""
    written = work / "factorized"
    started = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**23):
                pass
    with (work / "copy").open("wb", buffering=0) as target:
        for file in sorted(written.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while block := stream.read(2**23):
                    target.write(block)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    (work / "copy").unlink()
    return {"seconds": seconds}


def stage_forward(folder: Path, work: Path) -> dict:
    """One stack of experts, dense and factorised: milliseconds, and floating-point operations beside dense."""
    from msmoe.formats.modeling.configuration_msmoe import MsmoeSwitchConfig
    from msmoe.formats.modeling.modeling_msmoe import GroupedExperts

    config = MsmoeSwitchConfig(d_model=D_MODEL, d_ff=D_FF, dropout_rate=0.0)
    result = {}
    for num_tokens in (16, 1024):
        x = torch.randn(num_tokens, D_MODEL)
        sizes = [num_tokens // NUM_GROUPS] * NUM_GROUPS
        dense = GroupedExperts(config, NUM_GROUPS).eval()
        result[f"{num_tokens} dense"] = best_of(lambda: dense(x, sizes), 15)  # noqa: B023
        for rows in (0.0, 0.1):
            for rank in RANKS:
                factors = {"wi": [rank, round(rows * D_FF)], "wo": [rank, round(rows * D_MODEL)]}
                experts = GroupedExperts(config, NUM_GROUPS, factors).eval()
                result[f"{num_tokens} {rank} {rows:g}"] = best_of(lambda: experts(x, sizes), 15)  # noqa: B023
    return result


def share_of_dense(rank: int, rows: float) -> float:
    """Numbers stored, and multiplied with, beside the dense matrices."""
    stored = 2 * rank * (D_FF + D_MODEL) + round(rows * D_FF) * D_MODEL + round(rows * D_MODEL) * D_FF
    return stored / (2 * D_FF * D_MODEL)


def bench(workdir: Path) -> dict:
    folder, work = workdir / "switch-base-8", workdir / "work-factorize"
    work.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        build(folder, 8)
    run_stage_of(SCRIPT, "stats", folder, work)
    results: dict = {"input bytes": Checkpoint(folder).num_bytes, "variants": {}}
    for name in VARIANTS:
        results["variants"][name] = run_stage_of(SCRIPT, "factorize", folder, work, "--variant", name)
        copy = run_stage_of(SCRIPT, "copy", folder, work)["seconds"]
        results["variants"][name]["copy"] = copy
    results["svd"] = run_stage_of(SCRIPT, "svd", folder, work)["seconds"]
    results["forward"] = run_stage_of(SCRIPT, "forward", folder, work)
    return results


def show(results: dict) -> None:
    """Tables in Markdown."""
    svd = results["svd"]
    print(f"full SVD of the 176 matrices: {svd:.1f} s; input {results['input bytes']:,} bytes\n")
    print("| | seconds | beside SVD + copy | peak resident memory | bytes written |")
    print("|---|---|---|---|---|")
    for name, row in results["variants"].items():
        ratio = row["seconds"] / (svd + row["copy"])
        print(f"| {name} | {row['seconds']:.1f} | {ratio:.2f} x | {row['peak'] / 1e9:.2f} GB | {row['bytes']:,} |")
    forward = results["forward"]
    for num_tokens in (16, 1024):
        dense = forward[f"{num_tokens} dense"]
        print(
            f"\nforward, {num_tokens} tokens over {NUM_GROUPS} experts, dense {1e3 * dense:.2f} ms; time beside dense"
        )
        print("(in brackets: numbers stored and multiplied beside dense)\n")
        print("| kept rows | " + " | ".join(f"rank {rank}" for rank in RANKS) + " |")
        print("|---|" + "---|" * len(RANKS))
        for rows in (0.0, 0.1):
            cells = [
                f"{forward[f'{num_tokens} {rank} {rows:g}'] / dense:.2f} ({share_of_dense(rank, rows):.2f})"
                for rank in RANKS
            ]
            print(f"| {rows:.0%} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        function = globals()[f"stage_{args.stage}"]
        result = function(args.folder, args.work, *([args.variant] if args.variant else []))
        print(json.dumps(result | {"peak": peak_memory()}))
        return
    results = bench(args.workdir)
    show(results)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
