"""Ranks and numbers of kept rows of every matrix: fixed, by energy, or the best that a budget of bytes buys."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from msmoe.checkpoint import Checkpoint
from msmoe.compression.factor_layout import factor_layout
from msmoe.errors import UserError
from msmoe.families.protocol import MoELayer
from msmoe.files import explain_os_errors
from msmoe.lowrank.allocate import Option, allocate, curve
from msmoe.lowrank.decompose import Decomposition
from msmoe.lowrank.layer import FactorSources, decompose_layer
from msmoe.lowrank.options import FactorOptions
from msmoe.lowrank.shapes import FactorShape, LayerFactors, largest_rank
from msmoe.workers import in_order


def fixed_shapes(options: FactorOptions, layers: Sequence[tuple[MoELayer, int]]) -> dict[str, LayerFactors]:
    """Shapes of a fixed rank; a matrix whose factors would not be smaller is left out."""
    assert options.rank is not None
    shapes: dict[str, LayerFactors] = {}
    for layer, _ in layers:
        shapes[layer.name] = {}
        for matrix in layer.matrices:
            num_outputs, num_inputs = layer.shape(matrix)
            shape = FactorShape(options.rank, round(options.keep_rows * num_outputs))
            if shape.saves(num_outputs, num_inputs, layer.itemsize(matrix)):
                shapes[layer.name][matrix] = shape
    return shapes


def choose_shapes(
    sources: FactorSources,
    layers: Sequence[tuple[MoELayer, int]],
    scratch: Path,
    *,
    workers: int,
) -> tuple[dict[str, LayerFactors], float | None]:
    """Shapes of every matrix, and the summed output error that a budget expects.

    Args:
        scratch: folder that keeps the decompositions; those of the same inputs are taken from there.
    """
    options = sources.options
    if options.rank is not None:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run that had its ranks to choose
        return fixed_shapes(options, layers), None
    budget, others = None, 0
    if options.is_budget:
        family, source = sources.family, sources.checkpoint
        layout = factor_layout("exact", family, source, family.stored_layers(source), {})
        others = layout.num_bytes - expert_bytes(layers)
        budget = check_budget(options, layers, others=others, source=source)
    digest = sources.stats.digest if sources.stats else None
    identity = json.dumps([options.svd, sources.checkpoint.fingerprint, digest])
    marker = scratch / "identity.json"
    if not marker.exists() or marker.read_text(encoding="utf-8") != identity:
        shutil.rmtree(scratch, ignore_errors=True)
    with explain_os_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        marker.write_text(identity, encoding="utf-8")
    curves: dict[tuple[str, str], list[Option]] = {}
    shapes: dict[str, LayerFactors] = {layer.name: {} for layer, _ in layers}
    stacked = in_order(lambda job: decompose_layer(sources, job[0], job[1], scratch), list(layers), workers)
    for (layer, _), stacks in zip(layers, stacked, strict=True):
        for matrix, decomposition in stacks.items():
            num_outputs, num_inputs = layer.shape(matrix)
            itemsize = layer.itemsize(matrix)
            max_rank = largest_rank(num_outputs, num_inputs, itemsize)
            if budget is not None:
                curves[layer.name, matrix] = curve(decomposition, num_inputs, itemsize=itemsize, max_rank=max_rank)
                continue
            rank = energy_rank(decomposition, options.energy or 1.0)
            shape = FactorShape(rank, round(options.keep_rows * num_outputs))
            if rank <= max_rank and shape.saves(num_outputs, num_inputs, itemsize):
                shapes[layer.name][matrix] = shape
    if budget is None:
        return shapes, None
    picked = allocate(list(curves.values()), budget - others)
    for (name, matrix), option in zip(curves, picked, strict=True):
        if option.shape is not None:
            shapes[name][matrix] = option.shape
    return shapes, sum(option.error for option in picked)


def energy_rank(decomposition: Decomposition, energy: float) -> int:
    """Smallest rank that holds a share of the energy of all experts of a stack together.

    One more than the decomposition has if none of its ranks does.
    """
    held = decomposition.energy.sum(0).cumsum(0)
    return int((held < energy * decomposition.row_energy.sum() * (1 - 1e-9)).sum()) + 1


def expert_bytes(layers: Sequence[tuple[MoELayer, int]]) -> int:
    """Bytes of the matrices of the stored experts of some layers, dense."""
    return sum(
        count * math.prod(layer.shape(matrix)) * layer.itemsize(matrix)
        for layer, count in layers
        for matrix in layer.matrices
    )


def check_budget(
    options: FactorOptions, layers: Sequence[tuple[MoELayer, int]], *, others: int, source: Checkpoint
) -> int:
    """The budget in bytes.

    Args:
        layers: those to be factorised, with their numbers of stored experts.
        others: bytes of everything else in the output.
        source: what a ratio is of.

    Raises:
        UserError: if it is below the smallest model, rank 1 without kept rows everywhere.
    """
    budget, smallest = options.budget(source.num_bytes), others
    for layer, count in layers:
        for matrix in layer.matrices:
            itemsize = layer.itemsize(matrix)
            dense = math.prod(layer.shape(matrix)) * itemsize
            smallest += count * min(FactorShape(1, 0).num_bytes(*layer.shape(matrix), itemsize), dense)
    if budget < smallest:
        raise UserError(
            f"the budget of {budget:,} bytes is below the smallest possible model: {smallest:,} bytes "
            f"({smallest / source.num_bytes:.3f} of {source.path})"
        )
    return budget


def check_rank(options: FactorOptions, layers: Sequence[tuple[MoELayer, int]]) -> None:
    """Raise `UserError` for a rank that exceeds a matrix."""
    for layer, _ in layers:
        if options.rank is not None and options.rank > min(layer.d_model, layer.d_ff):
            raise UserError(
                f"--rank must be between 1 and {min(layer.d_model, layer.d_ff)}: the experts of {layer.name} are "
                f"{layer.d_ff} x {layer.d_model}; got {options.rank}"
            )
