"""The transformers model that a configuration describes, on the meta device: structure without weights."""

from __future__ import annotations

import contextlib
import importlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from msmoe.errors import UserError, explain_library_errors
from msmoe.strict_json import shown

if TYPE_CHECKING:
    from torch import nn


def config_class(config: dict, place: str) -> Any:
    """Configuration class of a `config.json`.

    Raises:
        UserError: for a `model_type` that this version of transformers does not have.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]]
    except KeyError:
        given = shown(config.get("model_type"))
        raise UserError(f"{place}: model_type {given} is unknown to transformers {__version__}") from None


def model_class(config: dict, place: str) -> Any:
    """Model class of a `config.json`: the one that `architectures` names, else the family's causal language model.

    Raises:
        UserError: where transformers has neither.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind = config_class(config, place)
    modules = [transformers]
    with contextlib.suppress(ImportError):
        modules.append(importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_")))
    mapped = [
        getattr(modeling_auto, table).get(config["model_type"])
        for table in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES")
    ]
    for name in (*(config.get("architectures") or ()), *mapped):
        for module in modules if isinstance(name, str) else ():
            found = getattr(module, name, None)
            if isinstance(found, type):
                return found
    raise UserError(f"{place}: transformers has no model class for {shown(config.get('architectures'))}")


def parse_config(config: dict, place: str) -> Any:
    """Configuration object of the content of a `config.json`.

    Raises:
        UserError: if transformers rejects it.
    """
    kind = config_class(config, place)
    with explain_library_errors(f"{place} describes no model"):
        decode = getattr(kind, "_decode_special_floats", lambda content: content)  # {"__float__": "Infinity"}
        return kind.from_dict(decode({name: v for name, v in config.items() if name != "quantization_config"}))


def skeleton(config: dict, place: str = "config.json") -> nn.Module:
    """The model of a configuration, without memory, in evaluation mode; not to be changed: it is shared.

    Args:
        place: where the configuration stands, for messages.

    Raises:
        UserError: for a configuration that no model can have.
    """
    return _skeleton(json.dumps(config, sort_keys=True), place)


@lru_cache(maxsize=8)
def _skeleton(text: str, place: str) -> nn.Module:
    import torch

    config = json.loads(text)
    kind, parsed = model_class(config, place), parse_config(config, place)
    with explain_library_errors(f"{place} describes no model"), torch.device("meta"):
        return kind._from_config(parsed, attn_implementation="eager").eval()
