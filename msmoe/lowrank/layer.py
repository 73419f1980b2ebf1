"""Factorise the experts of one layer, as many at once as a worker's memory allows.

An expert is its front, all input matrices one below the other, and its output matrix. Decompose both with what the
experts saw, truncate the front, solve the output again for the hidden activations that this gives, truncate it. Biases
stay as they are.

Shapes: C experts at once, T sampled tokens of an expert, D d_model, F d_ff, N input matrices.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint, to_dtype
from msmoe.families.protocol import Family, MoELayer
from msmoe.files import explain_os_errors, sync
from msmoe.layer.expert import Expert
from msmoe.layer.tokens import TokenSample
from msmoe.lowrank.decompose import Decomposition, decompose
from msmoe.lowrank.factors import Factors, truncate
from msmoe.lowrank.measures import MatrixReport, stable_rank
from msmoe.lowrank.options import FactorOptions
from msmoe.lowrank.shapes import LayerFactors, break_even_rank, largest_rank
from msmoe.merge.refit import Refit, refit_output

CHUNK_VALUES = 10**7  # weights of the experts that one worker decomposes at once
LEAST_SENSITIVITY = 1e-2  # of the mean, for hidden neurons that the sampled tokens never switched on


@dataclass(frozen=True)
class ExpertTokens:
    """The sampled tokens of one stored expert.

    Attributes:
        inputs: (T, D); gate: (T,); weights: (T,) tokens that each stands for; held_out: (T,) bool.
    """

    inputs: Tensor
    gate: Tensor
    weights: Tensor
    held_out: Tensor

    @property
    def scale(self) -> Tensor:
        """(T, 1) square root of what a squared error at this token counts: number of tokens times squared gate."""
        return (self.gate * self.weights.sqrt().float())[:, None]


class Seen(NamedTuple):
    """The tokens of an expert and its hidden activations (T, F) on them."""

    tokens: ExpertTokens
    hidden: Tensor


@dataclass(frozen=True)
class FactorSources:
    """What factorising an expert reads."""

    family: Family
    checkpoint: Checkpoint
    options: FactorOptions
    stats: Stats | None
    maps: dict[str, Tensor]  # layer -> router row, or expert of the statistics, -> stored expert

    def tokens(self, layer: str) -> "list[ExpertTokens] | None":
        """Sampled tokens of each stored expert of a layer; a router that lost rows chooses for them again."""
        if self.stats is None:
            return None
        stats, mapping = self.stats.layers[layer], self.maps[layer]
        sample: TokenSample = stats.tokens()
        weights, held_out, expert, gate = sample.weights(stats.dispatched), sample.held_out, sample.expert, sample.gate
        if len(mapping) < stats.num_experts:
            router = self.family.router(self.checkpoint, layer)
            assert router is not None
            expert, gate = router(sample.routed_on)
        routed = replace(sample, expert=mapping[expert], gate=gate)
        found = []
        for g in range(int(mapping.max()) + 1):  # choices of a token may meet in one stored expert: weights add up
            mine, gates = routed.among(torch.tensor([g]))
            rows = mine[:, 0]
            found.append(ExpertTokens(sample.inputs[rows], gates[rows, 0], weights[rows], held_out[rows]))
        return found


def decompose_layer(
    sources: FactorSources, layer: MoELayer, count: int, scratch: Path | None
) -> dict[str, Decomposition]:
    """Decompositions of a layer's stacks; kept in `scratch`, as far as any storable rank needs them."""
    file = scratch / f"{layer.name}.safetensors" if scratch else None
    if file and file.exists():
        stored, names = load_file(file), Decomposition.__annotations__
        return {m: Decomposition(*(stored[f"{m}/{name}"] for name in names)) for m in layer.matrices}
    tokens = sources.tokens(layer.name)
    parts: dict[str, list[Decomposition]] = {matrix: [] for matrix in layer.matrices}
    for chunk in chunks(layer, count):
        experts = [sources.family.load_expert(sources.checkpoint, layer.name, g) for g in chunk]
        seen = look(experts, [tokens[g] for g in chunk]) if tokens else None
        pair = zip(layer.matrices, decompose_experts(experts, seen, svd=sources.options.svd or "plain"), strict=True)
        for matrix, decomposition in pair:
            limit = largest_rank(*layer.shape(matrix), layer.itemsize(matrix))
            parts[matrix].append(decomposition.cut(max(limit, 1)))
    stacks = {
        matrix: Decomposition(*(torch.cat([getattr(p, n) for p in split]) for n in Decomposition.__annotations__))
        for matrix, split in parts.items()
    }
    if file:
        tensors = {f"{m}/{n}": t.contiguous() for m, stack in stacks.items() for n, t in vars(stack).items()}
        partial = file.with_suffix(".partial")
        with explain_os_errors(file):
            save_file(tensors, partial)
            sync(partial)
            os.replace(partial, file)
    return stacks


def chunks(layer: MoELayer, count: int) -> Iterator[range]:
    """The experts of a layer, as many at once as a worker's memory allows; the same on every machine."""
    size = max(1, CHUNK_VALUES // sum(math.prod(layer.shape(matrix)) for matrix in layer.matrices))
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def look(experts: Sequence[Expert], tokens: Sequence[ExpertTokens]) -> list[Seen]:
    """The tokens of some experts, with the hidden activations that the experts give them."""
    return [Seen(t, expert.hidden(t.inputs)) for expert, t in zip(experts, tokens, strict=True)]


def decompose_experts(
    experts: Sequence[Expert], seen: Sequence[Seen] | None, *, svd: str
) -> tuple[Decomposition, Decomposition]:
    """Decompositions of front and output of several experts at once."""
    front, output = torch.stack([e.front for e in experts]), torch.stack([e.output for e in experts])
    if svd == "plain" or seen is None:
        return decompose(front), decompose(output)
    inputs = [tokens.inputs * tokens.scale for tokens, _ in seen]
    hidden = [activations * tokens.scale for tokens, activations in seen]
    scales = [output_sensitivity(e, tokens.inputs, tokens.scale) for e, (tokens, _) in zip(experts, seen, strict=True)]
    return decompose(front, inputs, row_scale=torch.stack(scales)), decompose(output, hidden)


def output_sensitivity(expert: Expert, inputs: Tensor, scale: Tensor) -> Tensor:
    """(N F,) how much an error of each pre-activation moves the output, root mean square over the tokens.

    The norm of the neuron's output column, times the root of the (weighted) mean square of the activation's slope; for
    ReLU the share of tokens that switch the neuron on.

    Args:
        inputs: (T, D); scale: (T, 1) the weights.
    """
    total, pre_activations = scale.square().sum(), expert.pre_activations(inputs)
    slopes = expert.activation.pull_back(pre_activations, torch.ones_like(pre_activations[0]))
    norm, parts = expert.output.norm(dim=0), []
    for slope in slopes:
        square = (slope.square() * scale.square()).sum(0) / total if total > 0 else torch.ones_like(norm)
        parts.append(norm * square.sqrt())
    sensitivity = torch.cat(parts)
    mean = sensitivity.mean()
    return sensitivity.clamp(min=LEAST_SENSITIVITY * float(mean)) if mean > 0 else torch.ones_like(sensitivity)


@dataclass(frozen=True)
class FactorizedExpert:
    """The stored form of one expert, factors or a dense matrix for front and output, and what it cost."""

    stored: dict[str, Factors | Tensor]
    reports: list[MatrixReport]


def factorize_layer(
    sources: FactorSources, layer: MoELayer, count: int, shapes: LayerFactors, scratch: Path | None
) -> list[FactorizedExpert]:
    """Factorise every stored expert of a layer, a chunk at a time."""
    options = sources.options
    tokens = sources.tokens(layer.name)
    cached = decompose_layer(sources, layer, count, scratch) if scratch else None
    results = []
    for chunk in chunks(layer, count):
        experts = [sources.family.load_expert(sources.checkpoint, layer.name, g) for g in chunk]
        seen = look(experts, [tokens[g] for g in chunk]) if tokens else None
        if cached:
            at = slice(chunk.start, chunk.stop)
            parts = {m: Decomposition(*(t[at] for t in vars(cached[m]).values())) for m in layer.matrices}
        else:
            pair = decompose_experts(experts, seen, svd=options.svd or "plain")
            parts = dict(zip(layer.matrices, pair, strict=True))
        done = factorize_experts(experts, seen, parts, shapes, options, dtypes_of(layer))
        held = {
            m: parts[m].captured(shapes[m].rank).tolist() if m in shapes else [1.0] * len(chunk) for m in layer.matrices
        }
        for i, (g, (stored, after, refit)) in enumerate(zip(chunk, done, strict=True)):
            energy = {matrix: held[matrix][i] for matrix in layer.matrices}
            about = seen[i] if seen and len(seen[i].tokens.inputs) else None
            reports = matrix_reports(layer, g, experts[i], after, about, shapes, energy, refit)
            results.append(FactorizedExpert(stored, reports))
    return results


def dtypes_of(layer: MoELayer) -> dict[str, torch.dtype]:
    """Dtypes in which the stacks of a layer are stored, the front's first."""
    return {matrix: to_dtype(layer.dtype(matrix)) for matrix in layer.matrices}


def factorize_experts(
    experts: list[Expert],
    seen: list[Seen] | None,
    decompositions: dict[str, Decomposition],
    shapes: LayerFactors,
    options: FactorOptions,
    dtypes: dict[str, torch.dtype],
) -> list[tuple[dict[str, Factors | Tensor], Expert, Refit | None]]:
    """Truncate the front, solve the output again for what that gives, truncate the output.

    Args:
        decompositions, dtypes: of the front and of the output, by their names in the layer, in this order.

    Returns:
        per expert what is stored, the expert that it stands for, and how the output was solved again.
    """

    def truncated(matrix: str, weights: Tensor) -> tuple[list[Factors | Tensor], Tensor]:
        dtype = dtypes[matrix]
        if matrix not in shapes:
            return list(weights.to(dtype)), weights.to(dtype).float()
        factors = truncate(weights, decompositions[matrix], shapes[matrix], row_score=options.row_score, dtype=dtype)
        return [Factors(*parts) for parts in zip(*factors, strict=True)], factors.dense()

    front_name, output_name = dtypes
    fronts, fronts_dense = truncated(front_name, torch.stack([e.front for e in experts]))
    approximate = [expert.with_front(front) for expert, front in zip(experts, fronts_dense, strict=True)]
    refits: list[Refit | None] = [None] * len(experts)
    if options.refit and seen is not None:
        refits = [
            refit_output(
                changed,
                tokens.inputs,
                tokens.gate,
                expert.read_out(hidden).mul_(tokens.gate[:, None]),
                tokens.weights,
                tokens.held_out,
            )
            for changed, expert, (tokens, hidden) in zip(approximate, experts, seen, strict=True)
        ]
    wanted = torch.stack([refit.output if refit else e.output for refit, e in zip(refits, experts, strict=True)])
    outputs, outputs_dense = truncated(output_name, wanted)
    return [
        ({front_name: fronts[i], output_name: outputs[i]}, changed.with_output(outputs_dense[i]), refits[i])
        for i, changed in enumerate(approximate)
    ]


def relative_error(before: Tensor, after: Tensor, scale: Tensor) -> float | None:
    """Squared error of values (T, N) relative to their square, tokens weighted by the square of `scale` (T, 1)."""
    total = float((before * scale).double().square().sum())
    return float(((after - before) * scale).double().square().sum()) / total if total else None


def matrix_reports(
    layer: MoELayer,
    g: int,
    before: Expert,
    after: Expert,
    seen: Seen | None,
    shapes: LayerFactors,
    energy: dict[str, float],
    refit: Refit | None,
) -> list[MatrixReport]:
    """What factorising one expert cost, for front and output."""
    errors: dict[str, float | None] = dict.fromkeys(layer.matrices)
    if seen is not None:
        tokens, hidden = seen
        now = after.hidden(tokens.inputs)
        errors[layer.front] = relative_error(hidden, now, tokens.scale)
        errors[layer.output] = relative_error(before.read_out(hidden), after.read_out(now), tokens.scale)
    reports = []
    pairs = (before.front, after.front), (before.output, after.output)
    for matrix, (old, new) in zip(layer.matrices, pairs, strict=True):
        shape = shapes.get(matrix)
        reports.append(
            MatrixReport(
                layer=layer.name,
                expert=g,
                matrix=matrix,
                rank=shape.rank if shape else None,
                num_rows=shape.num_rows if shape else None,
                break_even_rank=break_even_rank(*layer.shape(matrix), shape.num_rows if shape else 0),
                stable_rank=stable_rank(old),
                energy=energy[matrix],
                weight_error=float((old - new).norm() / old.norm().clamp(min=1e-30)),
                output_error=errors[matrix],
                refit=refit.describe() if refit and matrix == layer.output else None,
            )
        )
    return reports
