"""Layout of a factorised checkpoint, before anything is computed."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from msmoe.checkpoint import Checkpoint
from msmoe.families.protocol import Family, MoELayer
from msmoe.formats.layout import Export, Slot
from msmoe.lowrank.factors import Factors
from msmoe.lowrank.shapes import LayerFactors


def factor_layout(
    export: str,
    family: Family,
    source: Checkpoint,
    stored: Sequence[tuple[MoELayer, int]],
    shapes: dict[str, LayerFactors],
) -> Export:
    """Layout of the output; the experts of layers in `shapes` are to be written, everything else is copied."""
    if export == "native":
        layout = Export(export, dict(source.config))
        changed = {
            key
            for layer, count in stored
            for g in range(count if layer.name in shapes else 0)
            for key in family.expert_keys(layer.name, g)
        }
        for name in source:
            layout.tensors.append(source.spec(name))
            if name not in changed:
                layout.copies.append((Slot(name), name))
        return layout
    used = {name: factors for name, factors in shapes.items() if factors}
    layout = Export("exact", family.exact_config(source.config, {n.name: count for n, count in stored}, used))
    compressed = source.model_type == family.compressed_model_type
    if compressed:
        replaced = {key for layer, _ in stored for key in family.stacked_keys(layer.name)}
        layout.indices |= {family.expert_map_key(layer.name) for layer, _ in stored}
    else:
        replaced = {k for layer, count in stored for g in range(count) for k in family.expert_keys(layer.name, g)}
    for name in source:
        if name not in replaced:
            layout.add_copy(source.spec(name), name)
    for layer, count in stored:
        layout.add_stacked(family, layer, count, shapes.get(layer.name, {}))
        stacked = family.stacked_keys(layer.name)
        if layer.name in shapes:
            pass
        elif compressed:
            layout.copies.extend((Slot(key), key) for key in stacked)
        else:
            layout.copies.extend(
                (Slot(key, g), name)
                for g in range(count)
                for key, name in zip(stacked, family.expert_keys(layer.name, g), strict=True)
            )
        if not compressed:
            layout.add_map(family, layer, layer.num_experts)
    return layout


def expert_slots(
    export: str, family: Family, layer: str, g: int, stored: dict[str, Factors | Tensor]
) -> Iterator[tuple[str, int | None, Tensor]]:
    """Tensors of one stored expert: name, index in the stack, content."""
    for matrix, content in stored.items():
        if export == "native":
            values = content.dense() if isinstance(content, Factors) else content
            yield getattr(family.expert_keys(layer, g), matrix), None, values
        elif isinstance(content, Factors):
            yield from zip(family.factor_keys(layer, matrix), [g] * len(content), content, strict=True)
        else:
            yield getattr(family.stacked_keys(layer), matrix), g, content
