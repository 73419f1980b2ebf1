"""The transformers model that a configuration describes, on the meta device: structure without weights."""

from __future__ import annotations

import contextlib
import importlib
import json
from dataclasses import dataclass, field
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
        kind = CONFIG_MAPPING[config["model_type"]]
        return kind.of({}) if hasattr(kind, "of") else kind  # the family's own, whatever stands for it by now
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
    fitting = [found for found in vars(modules[-1]).values() if takes(found, kind)]
    if fitting:
        return min(fitting, key=lambda c: ("ForCausalLM" not in c.__name__, "Model" not in c.__name__, len(c.__name__)))
    raise UserError(f"{place}: transformers has no model class for {shown(config.get('architectures'))}")


def takes(found: Any, config_kind: type) -> bool:
    """Whether something is a model class that is built from a kind of configuration."""
    if not isinstance(found, type) or not hasattr(found, "_from_config") or found.__name__.endswith("PreTrainedModel"):
        return False
    wanted = found.__init__.__annotations__.get("config") if "__init__" in vars(found) else found.config_class
    return (wanted if isinstance(wanted, str) else getattr(wanted, "__name__", "")) == config_kind.__name__


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
    return _skeleton(Described(json.dumps(config, sort_keys=True), place))


@dataclass(frozen=True)
class Described:
    """Content of a `config.json`, the same wherever it stands."""

    text: str
    place: str = field(compare=False)


@lru_cache(maxsize=8)
def _skeleton(described: Described) -> nn.Module:
    import torch

    config, place = json.loads(described.text), described.place
    kind, parsed = model_class(config, place), parse_config(config, place)
    with explain_library_errors(f"{place} describes no model"), torch.device("meta"):
        return kind._from_config(parsed, attn_implementation="eager").eval()
