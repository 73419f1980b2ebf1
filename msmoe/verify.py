"""Compare a compressed checkpoint with what it stands for: the stock model with merged weights in every member."""

from pathlib import Path

import torch
from torch import nn

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.families.base import load_stored_expert


@torch.no_grad()
def reference_model(original: str | Path, compressed: str | Path) -> nn.Module:
    """The original architecture, each expert overwritten by the merged expert of its group (`exact` export).

    Knows nothing of the compressed model's code: it reads the stored tensors and the maps, and runs the stock class.

    Raises:
        UserError: for a checkpoint that no stock model stands for: its routers lost rows, or it holds mean outputs.
    """
    source, target = Checkpoint(original), Checkpoint(compressed)
    family = family_of(source)
    model = family.load_model(source.path, dtype=torch.float32)
    for layer in family.layers(source):
        mapping = target.read(family.expert_map_key(layer.name)).tolist()
        if len(mapping) < layer.num_experts or family.constants_key(layer.name) in target:
            raise UserError(f"no stock model stands for {target.path}: {layer.name} has removed experts")
        stored = {g: load_stored_expert(family, target, layer.name, g) for g in set(mapping)}
        for e, g in enumerate(mapping):
            for key, values in zip(family.expert_keys(layer.name, e), stored[g], strict=True):
                model.get_parameter(key).copy_(values)
    return model
