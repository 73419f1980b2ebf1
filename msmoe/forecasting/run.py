"""Statistics and weights -> forecast.

Shapes: S sampled tokens, R records.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.forecasting.curves import Forecast, LayerForecast
from msmoe.forecasting.trial import Trial
from msmoe.layer.tokens import TokenSample, mix
from msmoe.planning.methods import METHODS, resolve, variant
from msmoe.planning.planner import Planner
from msmoe.workers import Progress, in_order

HELD_OUT = 4  # one record of so many is held out


def forecast(
    checkpoint: str | Path | Checkpoint,
    stats: Stats | str | Path,
    *,
    method: str = "m-smoe-refit",
    sizes: Sequence[int] | None = None,
    keep_layers: list[str] | None = None,
    tokens: int = 1024,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Predict what a method does to each layer at each size, without writing a checkpoint.

    The compressed layer is the one that `apply` would write from statistics without the records held out: the numbers
    tend to be a little high. Costs what merging the layers at these sizes costs, less the alignments that sizes share;
    holds the experts of one layer in memory, float32.

    Args:
        checkpoint: the checkpoint to compress.
        stats: its statistics; with output gradients (`msmoe profile --fisher 64`) the KL divergence is predicted too.
        method: a key of `METHODS`, perhaps with choices of its own such as `m-smoe:align=none`; every layer keeps the
            same number of experts.
        sizes: experts kept; by default all up to 16 experts, and powers of two and the middles between them beyond.
        keep_layers: layers left as they are; by default the first MoE layer of the encoder, `["none"]` for none.
        tokens: most tokens per layer for the output error, and again for the KL divergence.
        workers: sizes computed at the same time; by default one per core.
        progress: called with (layers done, layers in all).

    Raises:
        UserError: for statistics of another checkpoint, of too few records or without what the method needs; for a
            method of one size, or one that factorises; for an impossible size.
    """
    name, choices = variant(method)
    parameters = resolve(name, choices)
    if fixed := METHODS[name].fixed:
        raise UserError(f"method {name} keeps {fixed} of a layer's experts: there are no sizes to forecast")
    if parameters.factors is not None:
        raise UserError(f"method {method} also factorises, which a forecast does not: choose one that merges or prunes")
    if parameters.refit == "sequential":
        raise UserError("a forecast looks at one layer at a time: choose --refit independent, not sequential")
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    fitted, held_out = split_records(stats, gradients_first="output gradients" not in parameters.needs)
    planner = Planner(checkpoint, fitted)
    layers = planner.compressible(keep_layers)
    num_experts = min((layer.num_experts for layer in layers), default=1)
    if sizes is None and parameters.loses_rows and planner.family.is_causal:
        sizes = [n for n in default_sizes(num_experts) if n in planner.family.counts(planner.source)]
    sizes = check_sizes(sizes, num_experts)
    choices |= {"budget": "uniform"}
    plans = [planner.decide(name, keep_layers=keep_layers, experts=size, **choices) for size in sizes]
    num_targets = target_tokens(planner, stats)
    result: dict[str, LayerForecast] = {}
    for layer in layers:
        trial = Trial(planner, layer, held_out[layer.name], tokens=tokens, num_targets=num_targets)
        measured = list(in_order(trial.measure, plans, workers or os.cpu_count() or 1))
        errors, kl = zip(*measured, strict=True)
        result[layer.name] = LayerForecast(layer.num_experts, tuple(sizes), errors, None if None in kl else kl)
        if progress:
            progress(len(result), len(layers))
    return Forecast(method, result)


def check_sizes(sizes: Sequence[int] | None, num_experts: int) -> list[int]:
    """The sizes, ascending, or the default ones; `UserError` for one that is not between 1 and the layer's experts."""
    if sizes is None:
        return default_sizes(num_experts)
    for size in sizes:
        if size != int(size) or not 1 <= size <= num_experts:
            raise UserError(f"sizes must be whole numbers between 1 and {num_experts}, got {size:g}")
    if not sizes:
        raise UserError("no size to forecast: sizes is empty")
    return sorted({int(size) for size in sizes})


def default_sizes(num_experts: int) -> list[int]:
    """Every size up to 16 experts; beyond, powers of two, the middles between them, and all experts."""
    if num_experts <= 16:
        return list(range(1, num_experts + 1))
    powers = [2**i for i in range(num_experts.bit_length())]
    chosen = {*powers, *(3 * p // 2 for p in powers if p > 1), num_experts}
    return sorted(size for size in chosen if size <= num_experts)


def split_records(stats: Stats, *, gradients_first: bool) -> tuple[Stats, dict[str, TokenSample]]:
    """Statistics whose token samples lack a quarter of the records, and the samples (layer -> tokens) of that quarter.

    The sums stay those of all records.

    Args:
        gradients_first: hold out the records whose output gradients are known before any other, as they alone tell of
            the KL divergence; otherwise a quarter of these too.

    Raises:
        UserError: if there are too few records.
    """
    samples = {name: layer.tokens() for name, layer in stats.layers.items()}
    records = torch.cat([sample.record for sample in samples.values()]).unique()
    known = torch.cat([sample.record[sample.has_gradient] for sample in samples.values()])
    if len(records) < HELD_OUT:
        raise UserError(
            f"the token sample holds tokens of {len(records)} records and a forecast holds one in {HELD_OUT} out: "
            "profile more records (msmoe profile --samples)"
        )
    last = ~torch.isin(records, known) if gradients_first else torch.zeros(len(records), dtype=torch.bool)
    draw = mix(records.numpy().astype(np.uint64)) << np.uint64(
        1
    )  # the bit that halves the records of a refit is left out
    order = np.lexsort((draw, last.numpy()))
    chosen = records[torch.from_numpy(order[: len(records) // HELD_OUT])]
    out = {name: torch.isin(sample.record, chosen) for name, sample in samples.items()}
    fitted = {n: replace(layer, sample=samples[n].select(~out[n])) for n, layer in stats.layers.items()}
    return replace(stats, layers=fitted), {name: sample.select(out[name]) for name, sample in samples.items()}


def target_tokens(planner: Planner, stats: Stats) -> int:
    """Target tokens of the calibration data.

    Of an encoder-decoder all tokens less those of the encoder, where it has MoE layers.
    """
    if "num_targets" in stats.data:
        return stats.data["num_targets"]
    encoder = planner.family.default_kept_layers(planner.layers)
    if encoder:
        return stats.data["num_tokens"] - stats.layers[encoder[0]].num_tokens
    return stats.layers[planner.layers[0].name].num_tokens
