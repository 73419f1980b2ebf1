"""Architectures: the only place that knows Hugging Face names. Switch, and one adapter for every decoder family."""

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.families.generic import GENERIC
from msmoe.families.protocol import Family, MoELayer
from msmoe.families.switch import SwitchFamily

FAMILIES: tuple[Family, ...] = (SwitchFamily(), GENERIC)


def find_family(checkpoint: Checkpoint) -> Family | None:
    """Adapter of an original or `exact` checkpoint; None for a dense sequence-to-sequence model."""
    return next((family for family in FAMILIES if family.owns(checkpoint)), None)


def drops_tokens(model_type: str | None) -> bool:
    """Whether tokens over an expert's capacity are dropped: in Switch Transformers, and where nothing is said."""
    return model_type in (None, SwitchFamily.model_type, SwitchFamily.compressed_model_type)


def family_of(checkpoint: Checkpoint) -> Family:
    """Adapter of a checkpoint that can be compressed.

    Raises:
        UserError: for an architecture without adapter, a compressed checkpoint, or one without MoE layer.
    """
    family = inspectable_family_of(checkpoint)
    if family.is_exact(checkpoint):
        raise UserError(f"{checkpoint.path} is compressed already: start from its original")
    if not family.layers(checkpoint):
        raise UserError(f"{checkpoint.path} is not a Mixture-of-Experts model: it has no router")
    return family


def inspectable_family_of(checkpoint: Checkpoint) -> Family:
    """Adapter of an original or `exact` checkpoint.

    Raises:
        UserError: for an architecture without adapter, or a checkpoint that contradicts itself.
    """
    family = find_family(checkpoint)
    if family is None:
        raise UserError(
            f"{checkpoint.path} is of architecture {checkpoint.model_type!r}; supported: switch_transformers and the "
            "decoders that `msmoe families` lists"
        )
    family.check(checkpoint)
    return family


__all__ = ["FAMILIES", "Family", "MoELayer", "drops_tokens", "family_of", "find_family", "inspectable_family_of"]
