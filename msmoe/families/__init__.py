"""Architectures: the only place that knows Hugging Face names. One adapter per architecture, one table."""

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families.base import Expert, Family, MoELayer, Routing
from msmoe.families.switch import SwitchFamily

FAMILIES: dict[str, Family] = {family.model_type: family for family in (SwitchFamily(),)}


def family_of(checkpoint: Checkpoint) -> Family:
    """Adapter of a checkpoint's architecture.

    Raises:
        UserError: for an architecture without adapter, or a checkpoint without MoE layer.
    """
    if checkpoint.model_type not in FAMILIES:
        raise UserError(
            f"{checkpoint.path} is of architecture {checkpoint.model_type!r}; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[checkpoint.model_type]
    if not family.layers(checkpoint):
        raise UserError(f"{checkpoint.path} has no MoE layer: nothing to compress")
    return family


__all__ = ["FAMILIES", "Expert", "Family", "MoELayer", "Routing", "family_of"]
