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
    """Stands for a decoder's stock configuration, and for that of its `exact` exports; never made itself.

    There is one for every family: a class that imports the family's when it is used.
    """

    model_type: str

    def __new__(cls, *arguments: Any, **values: Any) -> Any:
        return cls.of(values)(*arguments, **values)

    @classmethod
    def from_dict(cls, config_dict: dict, **options: Any) -> Any:
        return cls.of(config_dict).from_dict(config_dict, **options)

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:
        config_dict, options = transformers.PreTrainedConfig.get_config_dict(path, **options)
        return cls.from_dict(config_dict, **options)

    @classmethod
    def of(cls, values: dict) -> type:
        if values.get("compressed_model_type") == DECODER_PREFIX + cls.model_type:
            return decoder_classes(cls.model_type)[0]
        return stock_config(cls.model_type)


def decoder_config_of_file(model_type: str) -> type:
    """The stand-in for the configurations of a decoder's files.

    It says that it is of transformers: code from a folder, once trusted, goes before what others than transformers
    registered.
    """
    names = {"model_type": model_type, "__module__": f"transformers.models.{model_type_to_module_name(model_type)}"}
    return type(CONFIG_MAPPING_NAMES[model_type], (DecoderConfigOfFile,), names)


def stock_config(model_type: str) -> type:
    """The configuration class of a family."""
    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


def stock_names(model_type: str) -> tuple[str, str]:
    """Names of a family's causal model class and of its configuration class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], CONFIG_MAPPING_NAMES[model_type]


@cache
def decoder_classes(model_type: str) -> tuple[type, type]:
    """Configuration and model class of a decoder's `exact` exports, known to the Auto classes from now on."""
    from transformers import AutoModelForCausalLM

    from msmoe.formats.modeling.modeling_msmoe_decoder import classes

    model, config = stock_names(model_type)
    made = classes(getattr(transformers, model), getattr(transformers, config))
    AutoModelForCausalLM.register(*made, exist_ok=True)
    return made
