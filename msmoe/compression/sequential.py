"""Refit layer by layer in order: each layer sees what the already compressed layers before it hand on.

Shapes: B batch, S sampled tokens, E experts, D d_model.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from msmoe.calibration.batches import batch_indices, collate, record_key
from msmoe.calibration.profile import load_records
from msmoe.calibration.records import TokenRecord
from msmoe.calibration.tokenizer import special_tokens
from msmoe.compression.group import GroupReport, MovedInputs, Sources, merge_one
from msmoe.errors import UserError
from msmoe.families import Routing
from msmoe.formats.layout import Export
from msmoe.layer.expert import Expert
from msmoe.layer.tokens import TokenSample

BATCH_SIZE = 16


def merge_sequentially(sources: Sources, layout: Export, data: str | Path) -> Iterator[tuple[Expert, GroupReport]]:
    """Merge and refit every group, in the order of `layout.merged`; holds the model.

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
        sample = sources.stats.layers[layer].tokens()
        moved = moved_inputs(sources, model, layer, sample, records, pad_id=pad_id)
        current = replace(sources, moved_inputs={layer: moved})
        for _, g in keys:
            expert, report = merge_one(current, layout, layer, g)
            install(sources, model, layer, report.members, expert)
            yield expert, report


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
        routing: Routing = family.routing(inputs, outputs)
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
        for key, values in zip(sources.family.expert_keys(layer, member), expert.tensors, strict=True):
            model.get_parameter(key).copy_(values)
