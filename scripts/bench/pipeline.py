"""Time and peak memory of profile, plan and apply on a synthetic switch-base checkpoint, beside physical floors.

    python scripts/bench/pipeline.py                    8 experts per layer: 620 M parameters, 2.5 GB
    python scripts/bench/pipeline.py --experts 8 32 --no-forward    how plan and apply grow with bytes

The checkpoint has switch-base geometry (d_model 768, d_ff 3072, 12 + 12 blocks, every second one sparse, float32);
its experts are one feed-forward network plus noise, neurons permuted. Floors, measured in the same run: copying the
checkpoint, one stock transformers forward pass over the calibration batches, the matrix products of the alignment.
Each stage is a process of its own; memory is its peak resident size.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch

SCRIPT = sys.argv[0]
if "--stage" in sys.argv:
    sys.argv[0] = "msmoe"  # as the command does: the model classes are imported where a stage needs them

from msmoe.calibration.records import TokenRecord  # noqa: E402
from msmoe.calibration.stats import LayerStats  # noqa: E402
from msmoe.checkpoint import Checkpoint, TensorSpec  # noqa: E402
from msmoe.checkpoint.writer import CheckpointWriter  # noqa: E402
from msmoe.evaluation.run import peak_memory  # noqa: E402
from msmoe.families import Family  # noqa: E402

D_MODEL, D_FF, NUM_BLOCKS, VOCABULARY = 768, 3072, 12, 32128
NUM_RECORDS, SOURCE_LENGTH, TARGET_LENGTH = 256, 64, 16
BATCH_SIZE = 16


def geometry(num_experts: int) -> tuple[dict, list[TensorSpec]]:
    """Configuration and tensors of the synthetic checkpoint."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        num_layers=NUM_BLOCKS, num_decoder_layers=NUM_BLOCKS, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
        d_model=D_MODEL, d_ff=D_FF, num_experts=num_experts, vocab_size=VOCABULARY, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(config)
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    specs = [TensorSpec(n, "F32", tuple(p.shape)) for n, p in model.state_dict().items() if n not in tied]
    return config.to_dict() | {"architectures": [type(model).__name__]}, specs


def build(folder: Path, num_experts: int) -> None:
    """Write the synthetic checkpoint, a tensor at a time, and its calibration records."""
    config, specs = geometry(num_experts)
    generator = torch.Generator().manual_seed(0)
    shared: dict[str, torch.Tensor] = {}
    with CheckpointWriter(folder, specs, identity="bench", force=True) as writer:
        for spec in specs:
            layer, found, rest = spec.name.partition(".experts.expert_")
            if len(spec.shape) == 1:
                tensor = torch.ones(spec.shape)
            elif found:
                expert, _, kind = rest.partition(".")
                fan_in = spec.shape[1]
                if layer + kind not in shared:
                    shared[layer + kind] = torch.randn(spec.shape, generator=generator) * fan_in**-0.5
                noise = torch.randn(spec.shape, generator=generator) * 0.1 * fan_in**-0.5
                order = torch.randperm(
                    D_FF, generator=torch.Generator().manual_seed(zlib.crc32(f"{layer}.{expert}".encode()))
                )
                tensor = shared[layer + kind] + noise
                tensor = tensor[order] if kind.startswith("wi") else tensor[:, order]
            else:
                scale = 1.0 if "router" in spec.name or "shared" in spec.name else spec.shape[1] ** -0.5
                scale = scale * D_MODEL**-0.5 if ".q." in spec.name else scale
                tensor = torch.randn(spec.shape, generator=generator) * scale
            writer.write(spec.name, tensor)
        writer.write_text("config.json", json.dumps(config))
    rows = [
        {
            "input_ids": torch.randint(3, VOCABULARY, (SOURCE_LENGTH,), generator=generator).tolist(),
            "labels": torch.randint(3, VOCABULARY, (TARGET_LENGTH,), generator=generator).tolist(),
        }
        for _ in range(NUM_RECORDS)
    ]
    data_of(folder).write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".jsonl")


def stage_copy(folder: Path, work: Path) -> dict:
    target = work / "copy"
    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    shutil.copytree(folder, target)
    for file in target.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return {"copy": seconds}


def load_calibrated(folder: Path, num_records: int) -> tuple[Family, Any, list[TokenRecord]]:
    """The stock model and a seeded choice of its calibration records."""
    from msmoe.calibration.profile import load_records
    from msmoe.families import family_of

    source = Checkpoint(folder)
    family = family_of(source)
    records, _ = load_records(
        source, data_of(folder), samples=num_records, seed=0, max_source_length=512, max_target_length=128
    )
    return family, family.load_model(folder, dtype=torch.float32), records


def time_recording(
    family: Family, model: Any, records: list[TokenRecord]
) -> tuple[float, float, dict[str, LayerStats]]:
    """Seconds of stock and of recorded forward passes, in turn, batch by batch; and what was recorded."""
    from msmoe.calibration.batches import batch_indices, collate, record_key
    from msmoe.calibration.recorder import Recorder

    order = list(batch_indices(records, BATCH_SIZE))
    batches = [collate([records[i] for i in chosen], pad_id=0) for chosen in order]
    keys = torch.tensor([record_key(r) for r in records])
    recorder = Recorder(family, model, sample_size=4096, seed=0)
    stock = recorded = 0.0
    with torch.inference_mode():
        model(**batches[0])
        for chosen, batch in zip(order, batches, strict=True):
            started = time.perf_counter()
            for _ in family.forward(model, batch):  # the stacks alone: the head is not needed for statistics
                pass
            stock += time.perf_counter() - started
            started = time.perf_counter()
            with recorder.attached():
                recorder.records = keys[chosen]
                for recorder.valid in family.forward(model, batch):
                    pass
            recorded += time.perf_counter() - started
        started = time.perf_counter()
        layers = {name: layer.stats() for name, layer in recorder.layers.items()}
        recorded += time.perf_counter() - started
    return stock, recorded, layers


def stage_profile(folder: Path, work: Path) -> dict:
    stock, recorded, _ = time_recording(*load_calibrated(folder, NUM_RECORDS))
    return {"stock forward": stock, "profile": recorded}


def stage_stats(folder: Path, work: Path) -> dict:
    import msmoe

    started = time.perf_counter()
    msmoe.profile(folder, data_of(folder)).save(work / "stats", force=True)
    return {"profile with loading and saving": time.perf_counter() - started}


def stage_products(folder: Path, work: Path) -> dict:
    """The cost matrices of the plan's alignments, nothing else."""
    plan = json.loads((work / "m-smoe.json").read_text())
    members = sum(len(g["members"]) - 1 for layer in plan["layers"].values() for g in layer["groups"])
    reference, target = torch.randn(D_FF, 2 * D_MODEL), torch.randn(2 * D_MODEL, D_FF)
    reference @ target
    started = time.perf_counter()
    for _ in range(members):
        reference @ target
    return {"matrix products": time.perf_counter() - started, "aligned experts": members}


def stage_plan(folder: Path, work: Path, method: str) -> dict:
    import msmoe

    started = time.perf_counter()
    msmoe.plan(folder, work / "stats", method=method, experts=2).save(work / f"{method}.json")
    return {"plan": time.perf_counter() - started}


def stage_apply(folder: Path, work: Path, method: str) -> dict:
    from msmoe.compression.apply import apply

    started = time.perf_counter()
    apply(folder, work / f"{method}.json", work / f"out-{method}", stats=work / "stats", force=True)
    return {"apply": time.perf_counter() - started}


def stage_forward(folder: Path, work: Path) -> dict:
    """Stock against compressed on one batch, and one grouped layer against a dense one of the same shape."""
    import msmoe
    from msmoe.calibration.batches import collate

    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    batch = collate([TokenRecord(ids(SOURCE_LENGTH), ids(TARGET_LENGTH)) for _ in range(BATCH_SIZE)], pad_id=0)
    compressed = msmoe.load(work / "out-m-smoe")
    layer = compressed.get_submodule("encoder.block.3.layer.1.mlp")
    dense = compressed.get_submodule("encoder.block.0.layer.1.mlp")
    x = torch.randn(BATCH_SIZE, SOURCE_LENGTH, D_MODEL, generator=generator)
    result = {"grouped layer": best_of(lambda: layer(x), 15), "dense layer": best_of(lambda: dense(x), 15)}
    result["compressed forward"] = best_of(lambda: compressed(**batch), 5)
    return result | {"stock forward, one batch": time_stock(folder, batch)}


def time_stock(folder: Path, batch: dict) -> float:
    import msmoe

    stock = msmoe.load(folder)
    return best_of(lambda: stock(**batch), 5)


@torch.inference_mode()
def best_of(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def run_stage(name: str, folder: Path, work: Path, *extra: str) -> dict:
    return run_stage_of(SCRIPT, name, folder, work, *extra)


def run_stage_of(script: str, name: str, folder: Path, work: Path, *extra: str) -> dict:
    """Run a stage of a script in a fresh process; its peak resident memory is the process's own."""
    arguments = [sys.executable, script, "--stage", name, "--folder", str(folder), "--work", str(work), *extra]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"stage {name} failed")
    return json.loads(output.splitlines()[-1])


def bench(num_experts: int, workdir: Path, *, forward: bool) -> dict:
    folder, work = workdir / f"switch-base-{num_experts}", workdir / f"work-{num_experts}"
    work.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        build(folder, num_experts)
    stats = run_stage("stats", folder, work)
    copy = run_stage("copy", folder, work)
    rows = {
        "bytes": Checkpoint(folder).num_bytes,
        "copy": copy["copy"],
        "profile with loading and saving": stats["profile with loading and saving"],
        "profile peak": stats["peak"],
    }
    for method in ("m-smoe", "m-smoe-refit"):
        plan, apply = (run_stage(stage, folder, work, "--method", method) for stage in ("plan", "apply"))
        rows |= {f"{method} plan": plan["plan"], f"{method} apply": apply["apply"]}
        rows[f"{method} peak"] = max(plan["peak"], apply["peak"])
    products = run_stage("products", folder, work)
    rows |= {name: products[name] for name in ("matrix products", "aligned experts")}
    for stage in ("profile", "forward") if forward else ():
        rows |= {name: value for name, value in run_stage(stage, folder, work).items() if name != "peak"}
    floor = rows["copy"] + rows["matrix products"]
    for method in ("m-smoe", "m-smoe-refit"):
        rows[f"{method}: plan + apply / (copy + products)"] = (rows[f"{method} plan"] + rows[f"{method} apply"]) / floor
    if not forward:
        return rows
    rows["profile / stock forward"] = rows["profile"] / rows["stock forward"]
    rows["grouped layer / dense layer"] = rows["grouped layer"] / rows["dense layer"]
    rows["compressed forward / stock forward"] = rows["compressed forward"] / rows["stock forward, one batch"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8])
    parser.add_argument("--workdir", type=Path, default=Path("build/bench"))
    parser.add_argument("--no-forward", action="store_true", help="leave out the comparisons of forward passes")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        function = globals()[f"stage_{args.stage}"]
        result = function(args.folder, args.work, *([args.method] if args.method else []))
        print(json.dumps(result | {"peak": peak_memory()}))
        return
    results = {
        num_experts: bench(num_experts, args.workdir, forward=not args.no_forward) for num_experts in args.experts
    }
    width = max(len(name) for rows in results.values() for name in rows)
    print(f"{'':{width}}" + "".join(f"{num_experts:>14} experts" for num_experts in results))
    for name in next(iter(results.values())):
        cells = [
            f"{rows[name] / 1e9:>19.2f} GB" if "peak" in name or name == "bytes" else f"{rows[name]:>22.2f}"
            for rows in results.values()
        ]
        print(f"{name:{width}}" + "".join(cells))
    (args.workdir / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
