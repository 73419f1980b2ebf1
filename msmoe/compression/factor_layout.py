"""Layout of a factorised checkpoint, before anything is computed."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from msmoe.checkpoint import Checkpoint
from msmoe.families.protocol import ExactShape, Family, MoELayer
from msmoe.formats.build import identity_export
from msmoe.formats.layout import Copy, Layout
from msmoe.layer.stored import Place, StoredPart
from msmoe.lowrank.factors import Factors
from msmoe.lowrank.shapes import LayerFactors


def factor_layout(
    export: str,
    family: Family,
    source: Checkpoint,
    stored: Sequence[tuple[MoELayer, int]],
    shapes: dict[str, LayerFactors],
) -> Layout:
    """Layout of the output; the matrices of layers in `shapes` are to be written, everything else is copied."""
    factors = {name: matrices for name, matrices in shapes.items() if matrices}
    if export == "exact" and not family.is_exact(source):
        layout = identity_export(family, source, factors=factors)
        parts = lambda layer, g, count: family.exact_parts(source, layer.name, g, count)
    else:
        layout = same_layout(export, family, source, stored, factors)
        parts = lambda layer, g, count: stored_parts(family, source, layer, g, count)
    written = {
        place
        for layer, count in stored
        if layer.name in shapes
        for g in range(count)
        for part in parts(layer, g, count)
        if in_matrix(part, layer)
        for place in part.places
    }
    layout.copies = [copy for copy in layout.copies if copy.target not in written]
    return layout


def same_layout(
    export: str,
    family: Family,
    source: Checkpoint,
    stored: Sequence[tuple[MoELayer, int]],
    factors: Mapping[str, LayerFactors],
) -> Layout:
    """The layout that the source has, but for the factors in the place of some matrices."""
    layout = Layout(export, dict(source.config))
    if export == "exact":
        counts = {layer.name: count for layer, count in stored}
        layout.config = family.exact_config(source, ExactShape(counts, factors))
        layout.indices |= {family.expert_map_key(source, layer.name) for layer, _ in stored}
    experts = {
        place.tensor
        for layer, count in stored
        for g in range(count)
        for part in stored_parts(family, source, layer, g, count)
        if in_matrix(part, layer)
        for place in part.places
    }
    split = set(experts) if export == "exact" else set()
    for name in source:
        if name not in split:
            layout.tensors.append(source.spec(name))
        if name not in experts:
            layout.copies.append(Copy(Place(name), Place(name)))
    for layer, count in stored:
        parts = [stored_parts(family, source, layer, g, count) for g in range(count)]
        if export == "exact":
            layout.add_stored(source, family, layer, parts, factors.get(layer.name, {}))
        layout.copies.extend(Copy(place, place) for group in parts for part in group for place in part.places
                             if in_matrix(part, layer))  # fmt: skip
    return layout


def stored_parts(family: Family, source: Checkpoint, layer: MoELayer, g: int, count: int) -> tuple[StoredPart, ...]:
    """Where a stored expert of a checkpoint lies, whatever its export."""
    if family.is_exact(source):
        return family.exact_parts(source, layer.name, g, count)
    return family.parts(source, layer.name, g)


def in_matrix(part: StoredPart, layer: MoELayer) -> bool:
    """Whether a part belongs to one of the two matrices of an expert, and is no bias."""
    return any(role in roles for role in part.roles for roles in layer.matrices.values())


def expert_places(
    layout: Layout, family: Family, source: Checkpoint, layer: MoELayer, g: int, count: int,
    stored: Mapping[str, Factors | Tensor],
) -> Iterator[tuple[Place, Tensor]]:  # fmt: skip
    """Where the matrices of one stored expert go, and their content."""
    for matrix, content in stored.items():
        if isinstance(content, Factors) and layout.kind == "exact":
            names = family.factor_keys(source, layer.name, matrix)
            yield from ((Place(name, g), values) for name, values in zip(names, content, strict=True))
            continue
        dense = content.dense() if isinstance(content, Factors) else content
        roles = layer.matrices[matrix]
        weights = dict(zip(roles, dense.chunk(len(roles)), strict=True))
        exact = layout.kind == "exact" and not family.is_exact(source)
        parts = (
            family.exact_parts(source, layer.name, g, count) if exact else stored_parts(family, source, layer, g, count)
        )
        for part in parts:
            if set(part.roles) <= set(roles):
                yield part.places[0], part.join(weights)
