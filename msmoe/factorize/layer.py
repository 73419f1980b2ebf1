"""Factorise the experts of one layer, as many at once as a worker's memory allows.

Decompose `wi` and `wo` with what the experts saw, truncate `wi`, solve `wo` again for the hidden activations that the
truncated `wi` gives, truncate `wo`.

Shapes: C experts at once, T sampled tokens of an expert, D d_model, F d_ff.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msmoe.calibration.sample import TokenSample
from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint, to_dtype
from msmoe.checkpoint.writer import explain_os_errors
from msmoe.factorize.decompose import Decomposition, decompose
from msmoe.factorize.factors import Factors, truncate
from msmoe.factorize.measures import MatrixReport, stable_rank
from msmoe.factorize.options import FactorOptions
from msmoe.factorize.shapes import LayerFactors, largest_rank
from msmoe.families.base import MATRICES, Expert, Family, MoELayer, load_stored_expert
from msmoe.merge.refit import Refit, refit_output

CHUNK_VALUES = 2**25  # weights of the experts that one worker decomposes at once
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


@dataclass(frozen=True)
class FactorSources:
    """What factorising an expert reads."""

    family: Family
    checkpoint: Checkpoint
    options: FactorOptions
    stats: Stats | None
    maps: dict[str, Tensor]  # layer -> expert of the statistics -> stored expert

    def tokens(self, layer: str) -> "list[ExpertTokens] | None":
        """Sampled tokens of each stored expert of a layer."""
        if self.stats is None:
            return None
        stats, mapping = self.stats.layers[layer], self.maps[layer]
        sample: TokenSample = stats.tokens()
        weights, held_out, stored = sample.weights(stats.dispatched), sample.held_out, mapping[sample.expert]
        return [
            ExpertTokens(sample.inputs[mine], sample.gate[mine], weights[mine], held_out[mine])
            for mine in (stored == g for g in range(int(mapping.max()) + 1))
        ]


def decompose_layer(
    sources: FactorSources, layer: MoELayer, count: int, scratch: Path | None
) -> dict[str, Decomposition]:
    """Decompositions of a layer's stacks; kept in `scratch`, as far as any storable rank needs them."""
    file = scratch / f"{layer.name}.safetensors" if scratch else None
    if file and file.exists():
        stored = load_file(file)
        return {m: Decomposition(*(stored[f"{m}/{name}"] for name in Decomposition.__annotations__)) for m in MATRICES}
    tokens = sources.tokens(layer.name)
    parts: dict[str, list[Decomposition]] = {matrix: [] for matrix in MATRICES}
    for chunk in chunks(layer, count):
        experts = [load_stored_expert(sources.family, sources.checkpoint, layer.name, g) for g in chunk]
        seen = [tokens[g] for g in chunk] if tokens else None
        pair = zip(MATRICES, decompose_experts(experts, seen, svd=sources.options.svd or "plain"), strict=True)
        for matrix, decomposition in pair:
            limit = largest_rank(*layer.shape(matrix), to_dtype(layer.dtype).itemsize)
            parts[matrix].append(decomposition.cut(max(limit, 1)))
    stacks = {
        matrix: Decomposition(*(torch.cat([getattr(p, n) for p in split]) for n in Decomposition.__annotations__))
        for matrix, split in parts.items()
    }
    if file:
        tensors = {f"{m}/{n}": t.contiguous() for m, stack in stacks.items() for n, t in vars(stack).items()}
        with explain_os_errors(file):
            partial = file.with_suffix(".partial")
            save_file(tensors, partial)
            os.replace(partial, file)
    return stacks


def chunks(layer: MoELayer, count: int) -> Iterator[range]:
    """The experts of a layer, as many at once as a worker's memory allows; the same on every machine."""
    size = max(1, CHUNK_VALUES // (2 * layer.d_model * layer.d_ff))
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def decompose_experts(
    experts: Sequence[Expert], tokens: Sequence[ExpertTokens] | None, *, svd: str
) -> tuple[Decomposition, Decomposition]:
    """Decompositions of `wi` and `wo` of several experts at once."""
    wi, wo = torch.stack([e.wi for e in experts]), torch.stack([e.wo for e in experts])
    if svd == "plain" or tokens is None:
        return decompose(wi), decompose(wo)
    inputs, hidden, scales = [], [], []
    for expert, seen in zip(experts, tokens, strict=True):
        inputs.append(seen.inputs * seen.scale)
        hidden.append(expert.hidden(seen.inputs) * seen.scale)
        scales.append(output_sensitivity(expert, hidden[-1], seen.scale))
    return decompose(wi, inputs, row_scale=torch.stack(scales)), decompose(wo, hidden)


def output_sensitivity(expert: Expert, hidden: Tensor, scale: Tensor) -> Tensor:
    """(F,) how much an error of each hidden pre-activation moves the output, root mean square over the tokens.

    The norm of the neuron's column of `wo`, times the root of the (weighted) share of tokens that switch it on.

    Args:
        hidden: (T, F) activations, weighted; scale: (T, 1) the weights.
    """
    total = scale.square().sum()
    active = ((hidden > 0) * scale.square()).sum(0) / total if total > 0 else torch.ones(hidden.shape[1])
    sensitivity = expert.wo.norm(dim=0) * active.sqrt()
    mean = sensitivity.mean()
    return sensitivity.clamp(min=LEAST_SENSITIVITY * float(mean)) if mean > 0 else torch.ones_like(sensitivity)


@dataclass(frozen=True)
class FactorizedExpert:
    """The stored form of one expert, factors or a dense matrix for `wi` and for `wo`, and what it cost."""

    stored: dict[str, Factors | Tensor]
    reports: list[MatrixReport]


def factorize_layer(
    sources: FactorSources, layer: MoELayer, count: int, shapes: LayerFactors, scratch: Path | None
) -> list[FactorizedExpert]:
    """Factorise every stored expert of a layer, a chunk at a time."""
    tokens = sources.tokens(layer.name)
    cached = decompose_layer(sources, layer, count, scratch) if scratch and scratch.exists() else None
    results = []
    for chunk in chunks(layer, count):
        experts = [load_stored_expert(sources.family, sources.checkpoint, layer.name, g) for g in chunk]
        seen = [tokens[g] for g in chunk] if tokens else None
        if cached:
            at = slice(chunk.start, chunk.stop)
            pair = [Decomposition(*(t[at] for t in vars(cached[matrix]).values())) for matrix in MATRICES]
        else:
            pair = decompose_experts(experts, seen, svd=sources.options.svd or "plain")
        results += factorize_experts(
            experts, seen, dict(zip(MATRICES, pair, strict=True)), shapes, layer, chunk, sources
        )
    return results


def factorize_experts(
    experts: list[Expert],
    tokens: list[ExpertTokens] | None,
    decompositions: dict[str, Decomposition],
    shapes: LayerFactors,
    layer: MoELayer,
    chunk: range,
    sources: FactorSources,
) -> list[FactorizedExpert]:
    """Truncate `wi`, refit `wo` to what the experts gave, truncate `wo`."""
    options, dtype = sources.options, to_dtype(layer.dtype)

    def truncated(matrix: str, weights: Tensor) -> tuple[list[Factors | Tensor], Tensor]:
        if matrix not in shapes:
            return list(weights.to(dtype)), weights.to(dtype).float()
        factors = truncate(weights, decompositions[matrix], shapes[matrix], row_score=options.row_score, dtype=dtype)
        return [Factors(*parts) for parts in zip(*factors, strict=True)], factors.dense()

    wi, wi_dense = truncated("wi", torch.stack([e.wi for e in experts]))
    refits: list[Refit | None] = [None] * len(experts)
    if options.refit and tokens is not None:
        refits = [
            refit_output(
                Expert(approximate, expert.wo),
                seen.inputs,
                seen.gate,
                expert(seen.inputs) * seen.gate[:, None],
                seen.weights,
                seen.held_out,
            )
            for approximate, expert, seen in zip(wi_dense, experts, tokens, strict=True)
        ]
    wanted = torch.stack([refit.wo if refit else e.wo for refit, e in zip(refits, experts, strict=True)])
    wo, wo_dense = truncated("wo", wanted)
    results = []
    for i, g in enumerate(chunk):
        after = Expert(wi_dense[i], wo_dense[i])
        reports = []
        for matrix in MATRICES:
            shape = shapes.get(matrix)
            before, now = getattr(experts[i], matrix), getattr(after, matrix)
            reports.append(
                MatrixReport(
                    layer=layer.name,
                    expert=g,
                    matrix=matrix,
                    rank=shape.rank if shape else None,
                    num_rows=shape.num_rows if shape else None,
                    stable_rank=stable_rank(before),
                    energy=float(decompositions[matrix].captured(shape.rank)[i]) if shape else 1.0,
                    weight_error=float((before - now).norm() / before.norm().clamp(min=1e-30)),
                    output_error=output_error(experts[i], after, tokens[i] if tokens else None, matrix),
                    refit={k: v for k, v in vars(refits[i]).items() if k != "wo"}
                    if matrix == "wo" and refits[i]
                    else None,
                )
            )
        results.append(FactorizedExpert({"wi": wi[i], "wo": wo[i]}, reports))
    return results


def output_error(before: Expert, after: Expert, tokens: ExpertTokens | None, matrix: str) -> float | None:
    """Relative squared error on the calibration tokens, of the hidden activations (`wi`) or of the outputs (`wo`)."""
    if tokens is None or not len(tokens.inputs):
        return None
    compute = (
        (lambda expert: expert.hidden(tokens.inputs)) if matrix == "wi" else (lambda expert: expert(tokens.inputs))
    )
    wanted = compute(before) * tokens.scale
    error = compute(after) * tokens.scale - wanted
    total = float(wanted.double().square().sum())
    return float(error.double().square().sum()) / total if total else None
