"""Which configuration class a file is of, for transformers' Auto classes."""

from functools import cache
from typing import Any

import transformers
from transformers import SwitchTransformersConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from msmoe.formats.modeling.configuration_msmoe import COMPRESSED_TYPE, MsmoeSwitchConfig

DECODER_PREFIX = "msmoe_"  # of `compressed_model_type`, before the family's own


class SwitchConfigOfFile(SwitchTransformersConfig):
    """Stands for the stock configuration, and for the compressed one where the values say so; never made itself."""

    def __new__(cls, *arguments: Any, **values: Any) -> Any:
        return cls.of(values)(*arguments, **values)

    @classmethod
    def from_dict(cls, config_dict: dict, **options: Any) -> Any:
        return cls.of(config_dict).from_dict(config_dict, **options)

    @classmethod
    def of(cls, values: dict) -> type[SwitchTransformersConfig]:
        types = values.get("compressed_model_type"), values.get("model_type"), cls.model_type
        return MsmoeSwitchConfig if COMPRESSED_TYPE in types else SwitchTransformersConfig


class EarlierConfigOfFile(SwitchConfigOfFile):
    """Stands for the compressed configuration of exports that had a `model_type` of their own."""

    model_type = COMPRESSED_TYPE


class DecoderConfigOfFile:
    """Stands for a decoder's stock configuration class, and for that of its `exact` exports where the values say so.

    Nothing of the family is imported before it is asked for; whatever else is asked of it is asked of the stock class.
    """

    def __init__(self, model_type: str):
        self.model_type = model_type
        module = model_type_to_module_name(model_type)
        # as of transformers: code from a folder, once trusted, goes before what others registered
        self.__module__ = f"transformers.models.{module}.configuration_{module}"

    def __call__(self, *arguments: Any, **values: Any) -> Any:
        return self.of(values)(*arguments, **values)

    def __getattr__(self, name: str) -> Any:
        return getattr(stock_config(self.model_type), name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, stock_config(self.model_type))

    def from_dict(self, config_dict: dict, **options: Any) -> Any:
        return self.of(config_dict).from_dict(config_dict, **options)

    def of(self, values: dict) -> type:
        if values.get("compressed_model_type") == DECODER_PREFIX + self.model_type:
            return decoder_classes(self.model_type)[0]
        return stock_config(self.model_type)


def stock_config(model_type: str) -> type:
    """The configuration class of a family."""
    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


@cache
def decoder_classes(model_type: str) -> tuple[type, type]:
    """Configuration and model class of a decoder's `exact` exports, known to the Auto classes from now on."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from msmoe.formats.modeling.modeling_msmoe_decoder import classes

    base = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    made = classes(base, stock_config(model_type))
    AutoModelForCausalLM.register(*made, exist_ok=True)
    return made
