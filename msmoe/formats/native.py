"""Layout of a native checkpoint of a decoder family: its own class and names, with fewer experts in every layer.

Nothing is read or computed here but headers: what a streaming writer has to do, tensor by tensor.

Shapes: E experts, G experts that are left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, to_dtype
from msmoe.errors import UserError
from msmoe.families.generic import Discovery, GenericFamily, SlicedTensor
from msmoe.families.quantised import to_fp8, to_mxfp4
from msmoe.layer.stored import StoredPart

if TYPE_CHECKING:
    from torch import Tensor

    from msmoe.layer.expert import Expert

PREDICTING = re.compile(r"(^|\.)(mtp|nextn)\w*\.")


class Place(NamedTuple):
    """A stored tensor, or a slice of its leading axis: the entry at `index`, or as many `rows`."""

    tensor: str
    index: int | None = None
    rows: int = 0


class Left(NamedTuple):
    """What is left at a position of a layer.

    Attributes:
        row: expert whose entries stay in the router and all else that has one per expert.
        expert: that is copied with its bytes; None for one that is computed.
    """

    row: int
    expert: int | None


class Cut(NamedTuple):
    """A tensor of which only the entries of some experts are copied."""

    output: str
    source: SlicedTensor
    rows: Mapping[str, tuple[int, ...]]


class Renumbered(NamedTuple):
    """A tensor of expert numbers that become others."""

    output: str
    source: str
    layer: str
    rows: tuple[int, ...]


@dataclass
class NativeLayout:
    """What a native checkpoint holds, and where it comes from.

    Attributes:
        config: content of `config.json`.
        tensors: every tensor of the output, in order.
        copies: (place in the output, place in the input) filled with unchanged bytes.
        cut: tensors that lose entries; renumbered: tensors of expert numbers.
        merged: (layer, position) -> where the experts that are computed go.
        dropped: tensors of the input that the output lacks and that are no experts: layers for multi-token prediction.
    """

    config: dict
    tensors: list[TensorSpec] = field(default_factory=list)
    copies: list[tuple[Place, Place]] = field(default_factory=list)
    cut: list[Cut] = field(default_factory=list)
    renumbered: list[Renumbered] = field(default_factory=list)
    merged: dict[tuple[str, int], tuple[StoredPart, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)


def native_layout(
    family: GenericFamily, checkpoint: Checkpoint, left: Mapping[str, Sequence[Left]], *, round_to: int = 1
) -> NativeLayout:
    """Lay out a native checkpoint.

    Args:
        left: layer -> what is left in it, in stored order; layers that are not named keep everything.

    Raises:
        UserError: for a number of experts, or experts of a group-limited router, that the family cannot hold.
    """
    found = family.discover(checkpoint)
    layers = {layer.name: layer for layer in family.layers(checkpoint)}
    unknown = left.keys() - layers.keys()
    if unknown:
        raise UserError(f"{checkpoint.path} has no MoE layer {min(unknown)}; there are {', '.join(layers)}")
    stays = {name: tuple(left.get(name) or whole(layer.num_experts)) for name, layer in layers.items()}
    rows = {name: tuple(one.row for one in stay) for name, stay in stays.items()}
    count = len(next(iter(rows.values())))
    family.check_count(checkpoint.config, count, kept=rows, round_to=round_to)
    for name, stay in stays.items():
        if layers[name].merges and any(one.expert is None for one in stay):
            raise UserError(f"{name}: {layers[name].merges}")
    complete = all(stay == whole(layers[name].num_experts) for name, stay in stays.items())
    dropped = () if complete else predicting(found, checkpoint)
    layout = NativeLayout(family.reduced_config(checkpoint.config, count, drops_predicted=bool(dropped)))
    layout.dropped = dropped
    handled = set(dropped)
    for name, stay in stays.items():
        handled |= add_experts(layout, found, checkpoint, name, stay)
    for tensor in found.sliced:
        spec = checkpoint.spec(tensor.name)
        shape = tensor.pieces[0][1].shape(spec.shape, count)
        layout.tensors.append(TensorSpec(tensor.name, spec.dtype, shape))
        layout.cut.append(Cut(tensor.name, tensor, {name: rows[name] for name, _ in tensor.pieces}))
        handled.add(tensor.name)
    for block in found.blocks:
        for key in found.names.keys(block.numbers):
            layout.tensors.append(checkpoint.spec(key))
            layout.renumbered.append(Renumbered(key, key, block.name, rows[block.name]))
            handled.add(key)
    for key in checkpoint:
        if key not in handled:
            layout.tensors.append(checkpoint.spec(key))
            layout.copies.append((Place(key), Place(key)))
    order = {key: i for i, key in enumerate(checkpoint)}
    layout.tensors.sort(key=lambda spec: order.get(spec.name, len(order)))
    return layout


def whole(num_experts: int) -> tuple[Left, ...]:
    """A layer that keeps everything."""
    return tuple(Left(e, e) for e in range(num_experts))


def add_experts(
    layout: NativeLayout, found: Discovery, checkpoint: Checkpoint, layer: str, stay: Sequence[Left]
) -> set[str]:
    """Lay out the experts of a layer, and say which tensors of the input are dealt with."""
    count, num_experts = len(stay), found.block(layer).num_experts
    added = {spec.name for spec in layout.tensors}
    handled: set[str] = set()
    for stack in found.stacks[layer]:
        others = stack.entries - num_experts
        behind = [(count + i, num_experts + i) for i in range(others)]
        for position, expert in [*((g, one.expert) for g, one in enumerate(stay)), *behind]:
            source = stack.part(stay[position].row if expert is None else expert)
            for out, given in zip(places(stack.part_of(position, count)), places(source), strict=True):
                is_new = out.tensor not in added
                if is_new:
                    added.add(out.tensor)
                    spec = checkpoint.spec(given.tensor)
                    entries = (
                        spec.shape if out.index is None else ((count + others) * max(out.rows, 1), *spec.shape[1:])
                    )
                    layout.tensors.append(TensorSpec(out.tensor, spec.dtype, entries))
                if expert is not None and (is_new or out.index is not None):
                    layout.copies.append((out, given))
        handled |= {place.tensor for e in range(stack.entries) for place in places(stack.part(e))}
    for g, one in enumerate(stay):
        if one.expert is None:
            layout.merged[layer, g] = tuple(stack.part_of(g, count) for stack in found.stacks[layer])
    return handled


def places(part: StoredPart) -> tuple[Place, ...]:
    """Where a part lies, and where its companions do."""
    return Place(part.key, part.index, part.rows), *(Place(name, index) for name, index in part.companions)


def predicting(found: Discovery, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Tensors of layers for multi-token prediction: unknown to the model, and in none of its layers.

    They hold experts of the old number, and routers over them.
    """
    ours = {numbered_layer(source.key) for origin in found.names.origins.values() for source in origin.sources}
    return tuple(
        key
        for key in found.names.unknown
        if PREDICTING.search(key) or (numbered_layer(key) and numbered_layer(key) not in ours)
    )


def numbered_layer(key: str) -> str:
    """The beginning of a name up to its first number, `model.layers.3` of all tensors of that layer; "" without one."""
    match = re.match(r"(.*?\.\d+)(\.|$)", key)
    return match[1] if match else ""


def contents(
    layout: NativeLayout, family: GenericFamily, checkpoint: Checkpoint, merge: Callable[[str, int], Expert]
) -> Iterator[tuple[Place, Tensor]]:
    """Everything that a layout says, one slice after the other.

    Args:
        merge: (layer, position) -> the expert that goes there, in float32.
    """
    import torch

    for out, given in layout.copies:
        yield out, checkpoint.read(given.tensor, index=given.index, rows=given.rows)
    for output, source, rows in layout.cut:
        pieces = checkpoint.read(source.name).chunk(len(source.pieces), source.dim)
        kept = [axis.select(piece, rows[layer]) for piece, (layer, axis) in zip(pieces, source.pieces, strict=True)]
        yield Place(output), torch.cat(kept, source.dim) if len(kept) > 1 else kept[0]
    found = family.discover(checkpoint)
    for output, source, layer, rows in layout.renumbered:
        block = found.block(layer)
        yield Place(output), block.special.renumbered(checkpoint.read(source), rows, block.num_experts)
    specs = {spec.name: spec for spec in layout.tensors}
    for (layer, position), parts in layout.merged.items():
        expert = merge(layer, position)
        weights = {**expert.inputs, "output": expert.output, "output_bias": expert.output_bias}
        for part in parts:
            yield from stored(part, part.join(weights), specs)


def stored(part: StoredPart, values: Tensor, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[Place, Tensor]]:
    """A part of some values, and its scales where it is quantised.

    Raises:
        UserError: for a quantisation that is not written, or scales that experts share.
    """
    where, *scales = places(part)
    dtype = to_dtype(specs[part.key].dtype)
    if part.encoding == "plain" and not scales:
        yield where, values.to(dtype)
        return
    if (
        part.encoding not in ("fp8", "mxfp4")
        or len(scales) != 1
        or (part.index is not None and scales[0].index is None)
    ):
        raise UserError(f"{part.key} is quantised in a way of which experts can be pruned, but not merged")
    scale = specs[scales[0].tensor]
    shape = scale.shape if scales[0].index is None else scale.shape[1:]
    codes, found = to_fp8(values, dtype, shape) if part.encoding == "fp8" else to_mxfp4(values)
    yield where, codes
    yield scales[0], found.to(to_dtype(scale.dtype))
