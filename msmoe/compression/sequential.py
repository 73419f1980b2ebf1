"""Refit layer by layer in order: each layer sees what the already compressed layers before it hand on.

Shapes: B batch, S sampled tokens, E experts, G groups, D d_model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from msmoe.calibration.batches import batch_indices, collate, record_key
from msmoe.calibration.profile import load_records
from msmoe.calibration.records import TokenRecord
from msmoe.calibration.tokenizer import special_tokens
from msmoe.compression.group import GroupReport, Sources, merge_one
from msmoe.compression.refitting import layer_tokens
from msmoe.errors import UserError
from msmoe.families.protocol import Routing as Recorded
from msmoe.formats.layout import Layout
from msmoe.layer.expert import Expert
from msmoe.layer.routing import Routing, SoftmaxTop1
from msmoe.layer.tokens import TokenSample

BATCH_SIZE = 16


@dataclass(frozen=True)
class MovedInputs:
    """What the sampled tokens of a layer look like once earlier layers are compressed.

    Attributes:
        inputs: (S, D); expert: (S,) routed expert; gate: (S,) gate value; 0 for a token that is dropped now.
    """

    inputs: Tensor
    expert: Tensor
    gate: Tensor


def merge_sequentially(
    sources: Sources, layout: Layout, data: str | Path, routers: Mapping[str, Tensor]
) -> Iterator[tuple[Expert, GroupReport]]:
    """Merge and refit every group, in the order of `layout.merged`; holds the model.

    The model keeps all its experts, those of a group with the same weights. A router that loses rows chooses among
    the experts that are kept, or the dominant ones.

    Args:
        routers: layer -> rows (G, D) of its reduced router.

    Raises:
        UserError: if the data are not those that the statistics were made from.
    """
    assert sources.stats is not None
    described = sources.stats.data
    records, digest = load_records(
        sources.checkpoint,
        data,
        samples=described.get("samples", described["num_records"]),
        seed=described.get("seed", 0),
        max_source_length=described.get("max_source_length", 512),
        max_target_length=described.get("max_target_length", 128),
        columns=described.get("columns"),
    )
    if digest != described["sha256"]:
        raise UserError(f"{data} is not the calibration data that the statistics were made from")
    model = sources.family.load_model(sources.checkpoint.path, dtype=torch.float32)
    pad_id = special_tokens(sources.checkpoint.config, sources.checkpoint.path / "config.json").pad_id
    for layer, keys in groupby(layout.merged, key=lambda key: key[0]):
        sample, plan = sources.stats.layers[layer].tokens(), sources.plan.layers[layer]
        router = kept_router(sources, layer, routers.get(layer))
        if router is not None:
            sources.family.narrow_router(model, layer, *router, config=layout.config)
        moved = moved_inputs(sources, model, layer, sample, records, pad_id=pad_id)
        routing = Routing(torch.tensor(plan.expert_map)[moved.expert], moved.gate)
        tokens = layer_tokens(sources, layout, layer, routing, inputs=moved.inputs)
        current = replace(sources, tokens=lambda _, tokens=tokens: tokens)
        for _, g in keys:
            expert, report = merge_one(current, layout, layer, g)
            install(sources, model, layer, report.members, expert)
            yield expert, report


def kept_router(sources: Sources, layer: str, reduced: Tensor | None) -> tuple[tuple[int, ...], SoftmaxTop1] | None:
    """The experts that a layer's router still chooses among, and the router of these; None if it keeps its rows."""
    plan = sources.plan.layers[layer]
    if reduced is not None:
        return tuple(plan.groups[g].dominant for g in plan.stored_order), SoftmaxTop1(reduced)
    rows = plan.routes(sources.plan.parameters).rows
    if len(rows) == plan.num_experts:
        return None
    return rows, sources.family.router(sources.checkpoint, layer).keeping(rows)


@torch.inference_mode()
def moved_inputs(
    sources: Sources, model: nn.Module, layer: str, sample: TokenSample, records: list[TokenRecord], *, pad_id: int
) -> MovedInputs:
    """Run the partly compressed model and read, at the sampled tokens, what the layer's router now sees and does."""
    family, num_tokens = sources.family, len(sample)
    moved = MovedInputs(sample.inputs.clone(), sample.expert.clone(), torch.zeros(num_tokens, sample.top_k))
    places: dict[int, list[int]] = {}
    for i, key in enumerate(sample.record.tolist()):
        places.setdefault(key, []).append(i)
    keys = [record_key(r) for r in records]
    if not places.keys() <= set(keys):
        raise UserError("the tokenizer is no longer the one that the statistics were made with: profile again")
    chosen: list[int] = []

    def hook(_: nn.Module, inputs: tuple, outputs: tuple) -> None:
        routing: Recorded = family.routing(inputs, outputs)
        for row, i in enumerate(chosen):
            at = torch.tensor(places.get(keys[i], []), dtype=torch.int64)
            position = sample.position[at]
            moved.inputs[at] = routing.inputs[row, position].float()
            moved.expert[at] = routing.logits[row, position].argmax(-1, keepdim=True)
            moved.gate[at] = (routing.gate * routing.dispatched)[row, position].float()[:, None]

    handle = family.routers(model)[layer].register_forward_hook(hook)
    try:
        for chosen in batch_indices(records, BATCH_SIZE):
            for _ in family.forward(model, collate([records[i] for i in chosen], pad_id=pad_id)):
                pass
    finally:
        handle.remove()
    return moved


@torch.no_grad()
def install(sources: Sources, model: nn.Module, layer: str, members: tuple[int, ...], expert: Expert) -> None:
    """Give every member of a group the merged weights."""
    for member in members:
        for part in sources.family.memory_parts(sources.checkpoint, layer, member):
            part.place_in(model.get_parameter(part.key)).copy_(part.join(expert.weights))
