"""What a method asks of a layer that not every family's layers can give: refused before anything is computed."""

from collections.abc import Iterable

from msmoe.errors import UserError
from msmoe.families import Family, MoELayer
from msmoe.planning.parameters import OUTPUT_GRADIENTS, OUTPUTS, Parameters

ROUTED_SIMILARITIES = ("router-weight", "router-weight-feature", "expert-output", "expert-output-token", "ream")


def check_layers(
    family: Family, layers: Iterable[MoELayer], parameters: Parameters, *, method: str, export: str
) -> None:
    """Raise `UserError`, naming the reason, if some layer cannot be compressed as asked for.

    Args:
        layers: those that are compressed.
    """
    if parameters.refit == "sequential" and family.is_causal:
        raise UserError("--refit sequential is for encoder-decoder models: choose independent")
    for layer in layers:
        if layer.merges and parameters.others == "merge":
            raise UserError(f"method {method} merges experts, but {layer.name}: {layer.merges}")
        if layer.refits and parameters.refit != "none":
            raise UserError(f"--refit {parameters.refit} cannot solve for the experts of {layer.name}: {layer.refits}")
        if layer.unseen and not {OUTPUTS, OUTPUT_GRADIENTS}.isdisjoint(parameters.needs):
            raise UserError(f"method {method} needs the outputs of the experts of {layer.name}, which cannot be "
                            f"recorded: {layer.unseen}")  # fmt: skip
        if layer.unasked and (asking := what_asks(parameters, export)):
            raise UserError(f"{asking} of method {method} cannot ask the router of {layer.name}: {layer.unasked}")


def what_asks(parameters: Parameters, export: str) -> str:
    """The choice that asks a router about tokens without the model; "" if none does."""
    if parameters.others != "merge" and parameters.selection != "top":
        return f"--selection {parameters.selection}"
    if parameters.others in ("merge", "nearest") and parameters.similarity in ROUTED_SIMILARITIES:
        return f"--similarity {parameters.similarity}"
    if parameters.refit != "none" and (export == "native" or parameters.loses_rows):
        return f"--refit {parameters.refit}"
    return ""
