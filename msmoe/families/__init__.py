"""Architectures: the only place that knows Hugging Face names. One adapter per architecture, one table."""

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.families.protocol import ExpertKeys, Family, MoELayer, Routing
from msmoe.families.switch import SwitchFamily

FAMILIES: dict[str, Family] = {family.model_type: family for family in (SwitchFamily(),)}


def family_of(checkpoint: Checkpoint) -> Family:
    """Adapter of a checkpoint that can be compressed.

    Raises:
        UserError: for an architecture without adapter, a compressed checkpoint, or one without MoE layer.
    """
    family = inspectable_family_of(checkpoint)
    if checkpoint.model_type == family.compressed_model_type:
        raise UserError(f"{checkpoint.path} is compressed already: start from its original")
    if not family.layers(checkpoint):
        raise UserError(f"{checkpoint.path} is not a Mixture-of-Experts model: it has no router")
    return family


def inspectable_family_of(checkpoint: Checkpoint) -> Family:
    """Adapter of an original or `exact` checkpoint.

    Raises:
        UserError: for an architecture without adapter, or a checkpoint that contradicts itself.
    """
    for family in FAMILIES.values():
        if checkpoint.model_type in (family.model_type, family.compressed_model_type):
            family.check(checkpoint)
            return family
    raise UserError(f"{checkpoint.path} is of architecture {checkpoint.model_type!r}; supported: {', '.join(FAMILIES)}")


__all__ = ["FAMILIES", "ExpertKeys", "Family", "MoELayer", "Routing", "family_of", "inspectable_family_of"]
