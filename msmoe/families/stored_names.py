"""Parameters of a model in memory as the tensors that its checkpoint stores: the library's rules of names, run back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msmoe.checkpoint.reader import Checkpoint
from msmoe.families import find_family
from msmoe.families.names import DiskNames


def stored_tensors(model: Any, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a model that was loaded from a checkpoint, under their names on disk.

    Args:
        tensors: name in memory -> values. What shares a stored tensor with one of them comes along from the model; what
            the checkpoint does not store is left out. Those of an encoder-decoder keep their names, all of them.
    """
    family = find_family(checkpoint)
    if family is None or not family.is_causal or not tensors:
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    origins = DiskNames(model, checkpoint).origins
    touched = {source.key for name in tensors if name in origins for source in origins[name].sources}
    device = next(iter(tensors.values())).device
    state: Mapping[str, Tensor] = model.state_dict()
    together = {
        name: tensors[name] if name in tensors else state[name].to(device)
        for name, origin in origins.items()
        if any(source.key in touched for source in origin.sources)
    }
    as_they_are = {name: together.pop(name) for name in tensors if name in together and name in checkpoint}
    return revert_weight_conversion(model, together) | as_they_are
