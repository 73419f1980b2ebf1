"""Factorise the experts of one layer, as many at once as a worker's memory allows.

Decompose `wi` and `wo` with what the experts saw, truncate `wi`, solve `wo` again for the hidden activations that the
truncated `wi` gives, truncate `wo`.

Shapes: C experts at once, T sampled tokens of an expert, D d_model, F d_ff.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint, to_dtype
from msmoe.families.protocol import MATRICES, Expert, Family, MoELayer, load_stored_expert
from msmoe.files import explain_os_errors, sync
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
            rows, bias = self.checkpoint.read_finite(self.family.router_key(layer)), self.family.router_bias_key(layer)
            logits = sample.inputs @ rows.T
            logits = logits + self.checkpoint.read_finite(bias) if bias in self.checkpoint else logits
            gate, expert = logits.softmax(-1).max(-1)
        stored = mapping[expert]
        return [
            ExpertTokens(sample.inputs[mine], gate[mine], weights[mine], held_out[mine])
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
        seen = look(experts, [tokens[g] for g in chunk]) if tokens else None
        pair = zip(MATRICES, decompose_experts(experts, seen, svd=sources.options.svd or "plain"), strict=True)
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
    size = max(1, CHUNK_VALUES // (2 * layer.d_model * layer.d_ff))
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def look(experts: Sequence[Expert], tokens: Sequence[ExpertTokens]) -> list[Seen]:
    """The tokens of some experts, with the hidden activations that the experts give them."""
    return [Seen(t, expert.hidden(t.inputs)) for expert, t in zip(experts, tokens, strict=True)]


def decompose_experts(
    experts: Sequence[Expert], seen: Sequence[Seen] | None, *, svd: str
) -> tuple[Decomposition, Decomposition]:
    """Decompositions of `wi` and `wo` of several experts at once."""
    wi, wo = torch.stack([e.wi for e in experts]), torch.stack([e.wo for e in experts])
    if svd == "plain" or seen is None:
        return decompose(wi), decompose(wo)
    inputs = [tokens.inputs * tokens.scale for tokens, _ in seen]
    hidden = [activations * tokens.scale for tokens, activations in seen]
    scales = [output_sensitivity(e, h, tokens.scale) for e, h, (tokens, _) in zip(experts, hidden, seen, strict=True)]
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
    options = sources.options
    tokens = sources.tokens(layer.name)
    cached = decompose_layer(sources, layer, count, scratch) if scratch else None
    results = []
    for chunk in chunks(layer, count):
        experts = [load_stored_expert(sources.family, sources.checkpoint, layer.name, g) for g in chunk]
        seen = look(experts, [tokens[g] for g in chunk]) if tokens else None
        if cached:
            at = slice(chunk.start, chunk.stop)
            parts = {m: Decomposition(*(t[at] for t in vars(cached[m]).values())) for m in MATRICES}
        else:
            parts = dict(zip(MATRICES, decompose_experts(experts, seen, svd=options.svd or "plain"), strict=True))
        done = factorize_experts(experts, seen, parts, shapes, options, dtypes_of(layer))
        held = {m: parts[m].captured(shapes[m].rank).tolist() if m in shapes else [1.0] * len(chunk) for m in MATRICES}
        for i, (g, (stored, after, refit)) in enumerate(zip(chunk, done, strict=True)):
            energy = {matrix: held[matrix][i] for matrix in MATRICES}
            about = seen[i] if seen and len(seen[i].tokens.inputs) else None
            reports = matrix_reports(layer, g, experts[i], after, about, shapes, energy, refit)
            results.append(FactorizedExpert(stored, reports))
    return results


def dtypes_of(layer: MoELayer) -> dict[str, torch.dtype]:
    """Dtypes in which the stacks of a layer are stored."""
    return {matrix: to_dtype(layer.dtype(matrix)) for matrix in MATRICES}


def factorize_experts(
    experts: list[Expert],
    seen: list[Seen] | None,
    decompositions: dict[str, Decomposition],
    shapes: LayerFactors,
    options: FactorOptions,
    dtypes: dict[str, torch.dtype],
) -> list[tuple[dict[str, Factors | Tensor], Expert, Refit | None]]:
    """Truncate `wi`, solve `wo` again for what that gives, truncate `wo`.

    Returns:
        per expert what is stored, the expert that it stands for, and how `wo` was solved again.
    """

    def truncated(matrix: str, weights: Tensor) -> tuple[list[Factors | Tensor], Tensor]:
        dtype = dtypes[matrix]
        if matrix not in shapes:
            return list(weights.to(dtype)), weights.to(dtype).float()
        factors = truncate(weights, decompositions[matrix], shapes[matrix], row_score=options.row_score, dtype=dtype)
        return [Factors(*parts) for parts in zip(*factors, strict=True)], factors.dense()

    wi, wi_dense = truncated("wi", torch.stack([e.wi for e in experts]))
    refits: list[Refit | None] = [None] * len(experts)
    if options.refit and seen is not None:
        refits = [
            refit_output(
                Expert(approximate, expert.wo),
                tokens.inputs,
                tokens.gate,
                (hidden @ expert.wo.T).mul_(tokens.gate[:, None]),
                tokens.weights,
                tokens.held_out,
            )
            for approximate, expert, (tokens, hidden) in zip(wi_dense, experts, seen, strict=True)
        ]
    wanted = torch.stack([refit.wo if refit else e.wo for refit, e in zip(refits, experts, strict=True)])
    wo, wo_dense = truncated("wo", wanted)
    return [({"wi": wi[i], "wo": wo[i]}, Expert(wi_dense[i], wo_dense[i]), refits[i]) for i in range(len(experts))]


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
    """What factorising one expert cost, for `wi` and for `wo`."""
    errors: dict[str, float | None] = dict.fromkeys(MATRICES)
    if seen is not None:
        tokens, hidden = seen
        now = after.hidden(tokens.inputs)
        errors["wi"] = relative_error(hidden, now, tokens.scale)
        errors["wo"] = relative_error(hidden @ before.wo.T, now @ after.wo.T, tokens.scale)
    reports = []
    for matrix in MATRICES:
        shape, old, new = shapes.get(matrix), getattr(before, matrix), getattr(after, matrix)
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
                refit=refit.describe() if refit and matrix == "wo" else None,
            )
        )
    return reports
