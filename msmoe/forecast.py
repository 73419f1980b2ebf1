"""Forecast: how far can a checkpoint go? Predicted error of every layer, and of the model, against experts kept.

From one calibration pass: each layer is compressed to each size in memory, by the code that `apply` runs, on three
quarters of the sampled records, and measured on the other quarter. Layers are measured one at a time on the inputs that
the original model shows them; the model's curve adds them up.

Shapes: E experts, S sampled tokens, T tokens, D d_model, R records.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msmoe.align import Alignment, Match, match
from msmoe.calibration.sample import TokenSample, mix
from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import to_dtype
from msmoe.errors import UserError
from msmoe.export import Export
from msmoe.families import Expert, MoELayer
from msmoe.layer_errors import LayerFunction, Routed, read_layer, relative_errors, route, run_layer
from msmoe.merge import merge_group, refit_output
from msmoe.merging import Sources, merge_one, routed_inputs
from msmoe.methods import METHODS, choose, resolve
from msmoe.parallel import Progress, in_order
from msmoe.plan import Group, Plan
from msmoe.planning import Planner
from msmoe.prune.scores import mean_output

HELD_OUT = 4  # one record of so many is held out
FLAT = 1e-6  # a smaller range of errors is rounding
BEND = 0.1  # of the range of errors: a curve closer to its chord is straight


@dataclass(frozen=True)
class LayerForecast:
    """Curves of one layer, one value per size.

    Attributes:
        num_experts: experts of the original layer.
        sizes: experts kept, ascending.
        output_error: squared error of the layer's gate-weighted output relative to its square, on tokens that the
            compression did not see; NaN for a layer without such tokens.
        kl: predicted KL divergence, nats per target token, of the model with this layer alone compressed, see
            `token_divergence`; None where the statistics hold no output gradients.
    """

    num_experts: int
    sizes: tuple[int, ...]
    output_error: tuple[float, ...]
    kl: tuple[float, ...] | None


@dataclass(frozen=True)
class WholeForecast:
    """Curves of the model with every compressible layer at the same size.

    Attributes:
        sizes: experts kept per layer, ascending.
        output_error: mean over the layers that have tokens.
        kl: sum over layers, nats per target token: their effects are taken as uncorrelated. None without output
            gradients.
    """

    sizes: tuple[int, ...]
    output_error: tuple[float, ...]
    kl: tuple[float, ...] | None


@dataclass(frozen=True)
class Forecast:
    """Predicted curves of every compressible layer.

    Attributes:
        method: what would compress the layers.
        layers: layer -> its curves, in forward order; all have the same sizes.
    """

    method: str
    layers: Mapping[str, LayerForecast]

    def to_frame(self):
        """A pandas DataFrame, one row per (layer, size), layers in forward order and sizes ascending.

        Columns:
            layer: name of the MoE layer.
            num_experts: experts of the original.
            experts: experts kept, 1 to `num_experts`.
            output_error: relative squared error of the layer's output; 0 for an unchanged layer, 1 for an output of
                zeros.
            kl: predicted KL divergence in nats per target token; NaN without output gradients.
        """
        import pandas as pd

        return pd.concat(
            pd.DataFrame(
                {
                    "layer": name,
                    "num_experts": layer.num_experts,
                    "experts": layer.sizes,
                    "output_error": layer.output_error,
                    "kl": layer.kl or float("nan"),
                }
            )
            for name, layer in self.layers.items()
        ).reset_index(drop=True)

    def suggest(self, tolerance: float) -> dict[str, int]:
        """Layer -> the smallest size from which on all larger sizes stay within a relative output error.

        The number of experts itself where no size does, or the error is unknown.

        Raises:
            UserError: for a tolerance that is negative or NaN.
        """
        if not tolerance >= 0:
            raise UserError(f"tolerance must be at least 0, got {tolerance:g}")
        suggested = {}
        for name, layer in self.layers.items():
            suggested[name] = layer.num_experts
            for size, error in zip(reversed(layer.sizes), reversed(layer.output_error), strict=True):
                if not error <= tolerance:
                    break
                suggested[name] = size
        return suggested

    def cliff(self, layer: str) -> int | None:
        """The size below which the output error of a layer takes off.

        The point farthest below the chord from the smallest size to the largest (Kneedle, Satopaa et al. 2011, for a
        falling convex curve). None for a flat curve, one that stays within a tenth of its range of the chord, and one
        with NaN.

        Raises:
            UserError: for a name that is no layer of the forecast.
        """
        curve = self.layers[choose("layer", layer, tuple(self.layers))]
        sizes, errors = np.array(curve.sizes, dtype=float), np.array(curve.output_error)
        span = errors.max() - errors.min()
        if len(sizes) < 3 or not span > FLAT:
            return None
        chord = np.interp(sizes, sizes[[0, -1]], errors[[0, -1]])
        below = (chord - errors) / span
        return curve.sizes[int(below.argmax())] if below.max() > BEND else None

    def whole(self) -> WholeForecast:
        """The curves of the model over sizes that all layers share."""
        layers = list(self.layers.values())
        errors = np.array([layer.output_error for layer in layers])
        known = errors[~np.isnan(errors).any(1)]
        mean = known.mean(0) if len(known) else np.full(errors.shape[1], np.nan)
        kl = [layer.kl for layer in layers if layer.kl is not None]
        summed = tuple(np.nansum(np.array(kl), axis=0).tolist()) if len(kl) == len(layers) else None
        return WholeForecast(layers[0].sizes, tuple(mean.tolist()), summed)


def forecast(
    checkpoint: str | Path,
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
        method: a key of `METHODS`, with its default parameters and the same number of experts in every layer.
        sizes: experts kept; by default all up to 16 experts, and powers of two and the middles between them beyond.
        keep_layers: layers left as they are; by default the first MoE layer of the encoder, `["none"]` for none.
        tokens: most tokens per layer for the output error, and again for the KL divergence.
        workers: sizes computed at the same time; by default one per core.
        progress: called with (layers done, layers in all).

    Raises:
        UserError: for statistics of another checkpoint, of too few records or without what the method needs; for a
            method of one size, or one that factorises; for an impossible size.
    """
    row = METHODS[choose("method", method, METHODS)]
    if row.fixed:
        raise UserError(f"method {method} keeps {row.fixed} of a layer's experts: there are no sizes to forecast")
    parameters = resolve(method, {})
    if parameters.factors is not None:
        raise UserError(f"method {method} also factorises, which a forecast does not: choose one that merges or prunes")
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    fitted, held_out = split_records(stats, gradients_first="output gradients" not in parameters.needs)
    planner = Planner(checkpoint, fitted)
    layers = planner.compressible(keep_layers)
    sizes = check_sizes(sizes, min((layer.num_experts for layer in layers), default=1))
    plans = [planner.plan(method, keep_layers=keep_layers, experts=size, budget="uniform") for size in sizes]
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
    """Target tokens of the calibration data: all tokens less those of the encoder, where it has MoE layers."""
    encoder = planner.family.default_kept_layers(planner.layers)
    if encoder:
        return stats.data["num_tokens"] - stats.layers[encoder[0]].num_tokens
    return stats.layers[planner.layers[0].name].num_tokens


def token_divergence(
    gradient: Tensor, change: Tensor, weights: Tensor, *, num_tokens: float, num_targets: int
) -> float:
    """Predict the KL divergence of the changed model from the original, nats per target token.

    For one record, to second order in the changes d_t of the layer's output, KL(p || p') = 1/2 E (sum_t g_t . d_t)^2
    with g_t the gradient of the record's summed log-likelihood at token t and labels drawn from p: such gradients are
    0 on average and their covariance is the Fisher information. Here the terms of different tokens are taken as
    uncorrelated, 1/2 sum_t E (g_t . d_t)^2, so that a sample of tokens will do, and one draw of labels stands for the
    expectation. With w_t the tokens that each one stands for, n tokens in all and N target tokens, the prediction is
    n / (N sum_t w_t) sum_t w_t (g_t . d_t)^2 / 2: tokens of experts without any gradient count as the average of the
    others. Beyond the second order, and so not in it, are large changes and tokens that later routers send elsewhere.

    Args:
        gradient, change: (T, D) g and d; weights: (T,) float64.
        num_tokens: n, dispatched tokens of the layer; num_targets: N, target tokens of the same data.

    Returns:
        NaN without tokens.
    """
    if len(gradient) == 0:
        return float("nan")
    squares = (gradient.double() * change.double()).sum(1).square()
    return float(weights @ squares / weights.sum()) / 2 * num_tokens / num_targets


class Observed:
    """Held-out tokens of a layer, and what the original layer makes of them.

    Attributes:
        sample: T tokens; weights: (T,) float64 calibration tokens that each one stands for; wanted: (T, D).
    """

    def __init__(self, layer: LayerFunction, sample: TokenSample, stats: LayerStats):
        self.sample, self.weights = sample, sample.weights(stats.dispatched)
        self.wanted = run_layer(layer, Routed(sample.expert, sample.gate), sample.inputs)[0]

    def change(self, compressed: LayerFunction, original: LayerFunction) -> Tensor:
        """What compression adds to the output (T, D)."""
        routed = route(compressed, original, self.sample)
        return run_layer(compressed, routed, self.sample.inputs)[0] - self.wanted


class Trial:
    """One layer, compressed to one size after the other; what the sizes share is computed once.

    Args:
        planner: of statistics without the held-out records.
        held_out: their tokens; tokens: most of them to use.
        num_targets: target tokens of the calibration data.
    """

    def __init__(self, planner: Planner, layer: MoELayer, held_out: TokenSample, *, tokens: int, num_targets: int):
        self.planner, self.layer, self.num_targets = planner, layer, num_targets
        self.stats = planner.stats.layers[layer.name]
        stored = read_layer(planner.family, planner.source, layer.name, layer.num_experts)
        self.experts = [stored.expert(e) for e in range(layer.num_experts)]
        self.original = replace(stored, expert=self.experts.__getitem__)
        self.matches: dict[tuple[int, int], Match] = {}
        fitted, observe = self.stats.tokens(), lambda sample: Observed(self.original, sample, self.stats)
        self.fitted = observe(fitted)
        self.held_out = observe(held_out.drawn(tokens, layer.num_experts))
        known = held_out.select(held_out.has_gradient).drawn(tokens, layer.num_experts)
        self.with_gradient = observe(known) if self.stats.has_output_gradients else None

    def measure(self, plan: Plan) -> tuple[float, float | None]:
        """Output error and KL divergence of the layer under a plan."""
        compressed, seen = self.compressed(plan), self.held_out
        change = seen.change(compressed, self.original)
        error, _ = relative_errors(seen.wanted, change, seen.weights, seen.sample.expert, self.layer.num_experts)
        if self.with_gradient is None:
            return error, None
        return error, token_divergence(
            self.with_gradient.sample.output_gradient,
            self.with_gradient.change(compressed, self.original),
            self.with_gradient.weights,
            num_tokens=float(self.stats.dispatched.sum()),
            num_targets=self.num_targets,
        )

    def compressed(self, plan: Plan) -> LayerFunction:
        """The layer as an `exact` export stores it."""
        layer_plan = plan.layers[self.layer.name]
        routes = layer_plan.routes(plan.parameters)
        rows, bias, dtype = list(routes.rows), self.original.bias, to_dtype(self.layer.dtype)
        stored = [self.merged(plan, g) for g in layer_plan.stored_order]
        stored = [Expert(e.wi.to(dtype).float(), e.wo.to(dtype).float()) for e in stored]
        means = (
            mean_output(self.stats)[list(routes.constants)].to(dtype) if routes.constants else self.original.constants
        )
        return LayerFunction(
            rows=self.original.rows[rows],
            bias=None if bias is None else bias[rows],
            targets=torch.tensor(routes.targets),
            num_stored=len(stored),
            expert=stored.__getitem__,
            constants=means.float(),
        )

    def merged(self, plan: Plan, g: int) -> Expert:
        """What a group becomes, float32: as `merge_one`, with alignments and targets shared by all sizes."""
        group, parameters = plan.layers[self.layer.name].groups[g], plan.parameters
        refits = parameters["refit"] != "none" and len(group.members) > 1
        if group.sole is not None and not refits:
            return self.experts[group.sole]
        if parameters["rule"] != "average" or parameters["align_to"] == "mean" or parameters["canonical"]:
            sources = Sources(self.planner.family, self.planner.source, plan, self.planner.stats)
            return merge_one(sources, Export("exact", {}), self.layer.name, g)[0]
        reference = 0 if parameters["align_to"] == "first" else group.dominant
        load = lambda member: self.aligned(member, reference, parameters["align"])
        expert = merge_group(group.members, group.weights, load, reference=reference, alignment="none").expert
        return self.refit(expert, group) if refits else expert

    def aligned(self, member: int, reference: int, alignment: Alignment) -> Expert:
        """A member in the neuron order that matches a reference."""
        if member == reference or alignment == "none":
            return self.experts[member]
        if (member, reference) not in self.matches:
            inputs = routed_inputs(self.stats, (member, reference)) if alignment != "weight" else None
            pair = self.experts[reference], self.experts[member]
            self.matches[member, reference] = match(*pair, alignment=alignment, inputs=inputs)
        return self.experts[member].permuted(self.matches[member, reference].permutation)

    def refit(self, merged: Expert, group: Group) -> Expert:
        """The merged expert with its output matrix solved for what the members gave."""
        sample = self.fitted.sample
        mine = torch.isin(sample.expert, torch.tensor(group.members)).nonzero().flatten()
        found = refit_output(
            merged, sample.inputs[mine], sample.gate[mine], self.fitted.wanted[mine], self.fitted.weights[mine],
            sample.held_out[mine],
        )  # fmt: skip
        return Expert(merged.wi, found.wo)
