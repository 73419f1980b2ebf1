"""What a compressed model costs to run, beside the original in the same process: the two take turns.

Shapes: B batch.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msmoe.calibration.batches import collate, collate_prompts
from msmoe.calibration.records import TokenRecord
from msmoe.calibration.tokenizer import is_causal
from msmoe.comparison.cells import Job, cell_file, layer_records
from msmoe.compression.apply import apply
from msmoe.evaluation.answers import generating, greedy
from msmoe.evaluation.flops import flop_counter
from msmoe.evaluation.run import peak_memory, special_tokens_of
from msmoe.families.loading import load

BATCH_SIZE = 16
NEW_TOKENS = 16
REPEATS = 10  # of a batch, and single records


@dataclass(frozen=True)
class Speed:
    """Tokens per second in batches, and seconds of single records: median and 95th percentile."""

    tokens_per_second: float
    p50_seconds: float
    p95_seconds: float


def cost_file(job: Job) -> Path:
    return job.out / "cost" / cell_file(job, 0).name


def run_cost(job: Job, path: Path) -> dict:
    """Compress to `path`, and let it and the original take turns: the entry in `results.json`, but for the memory."""
    assert job.plan is not None
    apply(job.checkpoint, job.plan, path, stats=job.stats, export=job.export, workers=1)
    measured = measure_costs({"own": load(path), "full": load(job.checkpoint)}, layer_records(job))
    return measured["own"] | {"full": measured["full"]}


def run_peak(job: Job, path: Path) -> int:
    """Most bytes resident in a process of its own that loads a model and runs a batch through it."""
    with torch.inference_mode():
        load(path)(**batch_of(layer_records(job)[:BATCH_SIZE]))
    return peak_memory()


def batch_of(records: list[TokenRecord]) -> dict[str, Tensor]:
    return collate(records, pad_id=0)


@torch.inference_mode()
def measure_costs(models: dict[str, Any], records: list[TokenRecord]) -> dict[str, dict]:
    """FLOPs executed per token, and speeds of prefill and generation, of models that take turns.

    Prefill is one forward pass over source and target tokens; generation writes a fixed number of tokens, of a decoder
    behind all that a record holds.

    Returns:
        name -> its entry in `results.json`.
    """
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, min(BATCH_SIZE, len(records))).astype(int)]
    causal = is_causal(next(iter(models.values())).config)
    num_tokens = sum(len(r.input_ids) + (0 if causal else len(r.labels)) for r in chosen)
    prefill = speeds(models, chosen, lambda model, batch: model(**batch), num_tokens)
    generation = speeds(models, chosen, generate, NEW_TOKENS * len(chosen))
    return {
        name: {
            "flops_per_token": executed_flops(model, chosen) / num_tokens,
            "prefill": asdict(prefill[name]),
            "generation": asdict(generation[name]),
        }
        for name, model in models.items()
    }


def executed_flops(model: Any, records: list[TokenRecord]) -> int:
    """Floating-point operations of forward passes over single, unpadded records, as torch counts them."""
    with flop_counter() as counter:
        for record in records:
            model(**batch_of([record]))
    return counter.get_total_flops()


def generate(model: Any, batch: dict[str, Tensor]) -> None:
    special = special_tokens_of(model, None)
    settings = greedy(special, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if special.is_causal:
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        inputs = collate_prompts([ids[mask.bool()].tolist() for ids, mask in rows], pad_id=special.pad_id)
    with generating(model, settings):
        model.generate(**inputs, generation_config=settings)


def speeds(
    models: dict[str, Any], records: list[TokenRecord], run: Callable[[Any, dict], Any], num_tokens: int
) -> dict[str, Speed]:
    """Time a batch and single records, one model after the other each time."""
    batch, singles = batch_of(records), [batch_of([r]) for r in records[:REPEATS]]
    together: dict[str, list[float]] = {name: [] for name in models}
    alone: dict[str, list[float]] = {name: [] for name in models}
    for name in models:
        run(models[name], batch)  # warm up
    for _ in range(REPEATS):
        for name, model in models.items():
            together[name].append(timed(run, model, batch))
    for single in singles:
        for name, model in models.items():
            alone[name].append(timed(run, model, single))
    return {
        name: Speed(num_tokens / float(np.median(together[name])), *np.quantile(alone[name], [0.5, 0.95]).tolist())
        for name in models
    }


def timed(run: Callable[[Any, dict], Any], model: Any, batch: dict[str, Tensor]) -> float:
    started = time.perf_counter()
    run(model, batch)
    return time.perf_counter() - started
