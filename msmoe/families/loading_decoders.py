"""Load a decoder checkpoint, original, `native` or `exact`, every weight of it from the file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError, explain_library_errors, warn
from msmoe.families.generic import GENERIC
from msmoe.families.names import DiskNames
from msmoe.families.quantised import why_unread
from msmoe.strict_json import shown

if TYPE_CHECKING:
    import torch
    from torch import nn

SHOWN = 3  # tensors named in a message
QUANTISATIONS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}  # that can be undone on the way in
KINDS = ("missing_keys", "mismatched_keys", "unexpected_keys")


def decoder_class(checkpoint: Checkpoint) -> Any:
    """The model class of a decoder checkpoint: the family's own, or that of its `exact` exports."""
    from msmoe.formats.modeling.dispatch import decoder_classes

    if GENERIC.is_exact(checkpoint):
        return decoder_classes(str(checkpoint.config["model_type"]))[1]
    return type(GENERIC.discover(checkpoint).model)


def decoder_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint's configuration, on the meta device.

    Raises:
        UserError: for a configuration that no model can have.
    """
    import torch

    if not GENERIC.is_exact(checkpoint):
        return GENERIC.discover(checkpoint).model
    kind = decoder_class(checkpoint)
    with explain_library_errors(f"{checkpoint.path / 'config.json'} describes no model"), torch.device("meta"):
        config = kind.config_class.from_pretrained(checkpoint.path, local_files_only=True)
        return kind._from_config(config, attn_implementation="eager")


def check_decoder(checkpoint: Checkpoint) -> None:
    """Check that the file holds every parameter of the model, by the library's own rules of names.

    Raises:
        UserError: naming what is missing.
    """
    model = decoder_skeleton(checkpoint)
    names = DiskNames(model, checkpoint)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(name for name in parameters - names.origins.keys() if not is_tied(name, tied))
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise UserError(f"{checkpoint.path} lacks {', '.join(missing[:SHOWN])}{more} of the model")
    dropped = GENERIC.dropped(checkpoint)
    quantised = checkpoint.config.get("quantization_config") is not None
    unknown = [name for name in names.unknown if name not in dropped]
    if unknown and not quantised:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        warn(f"{checkpoint.path} holds {', '.join(unknown[:SHOWN])}{more}, which the model does not use")


def is_tied(name: str, tied: set[str]) -> bool:
    return any(re.fullmatch(pattern, name) or name.endswith(pattern) for pattern in tied)


def load_decoder(checkpoint: Checkpoint, *, dtype: torch.dtype | str) -> Any:
    """The model in evaluation mode; quantised weights become plain ones.

    Raises:
        UserError: if the checkpoint is damaged or incomplete, or quantised in a way that cannot be undone here.
    """
    check_decoder(checkpoint)
    kind, options = decoder_class(checkpoint), dequantising(checkpoint)
    with explain_library_errors(f"{checkpoint.path} cannot be loaded"):
        model, found = kind.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            use_safetensors=not checkpoint.is_pickled,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    for key in KINDS[:2]:
        if names := sorted(str(name) for name in found.get(key) or ()):
            raise UserError(f"{checkpoint.path}: {key.replace('_', ' ')} of the model: {', '.join(names[:SHOWN])}")
    return model.eval()


def dequantising(checkpoint: Checkpoint) -> dict[str, Any]:
    """Options that undo the quantisation of a checkpoint while it is loaded.

    Raises:
        UserError: for one that cannot be undone.
    """
    import transformers

    if reason := why_not_run(checkpoint):
        raise UserError(f"{checkpoint.path}: {reason}")
    if (method := quantisation(checkpoint)) is None:
        return {}
    return {"quantization_config": getattr(transformers, QUANTISATIONS[method])(dequantize=True)}


def quantisation(checkpoint: Checkpoint) -> str | None:
    """How the weights of a checkpoint are quantised, by its configuration; None for plain ones."""
    given = checkpoint.config.get("quantization_config")
    if given is None:
        return None
    return str(given.get("quant_method")) if isinstance(given, dict) else shown(given)


def why_not_run(checkpoint: Checkpoint) -> str:
    """Why a decoder cannot be run with the values that its quantised weights stand for; "" where it can."""
    method = quantisation(checkpoint)
    if method is None:
        return ""
    if method not in QUANTISATIONS:
        return f"weights quantised by {method!r} cannot be run here; {', '.join(QUANTISATIONS)} can"
    parts = (part for layer in GENERIC.layers(checkpoint) for part in GENERIC.parts(checkpoint, layer.name, 0))
    return next(filter(None, (why_unread(checkpoint, part) for part in parts)), "")
