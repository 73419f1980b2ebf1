"""Which configuration class a file is of, for transformers' Auto classes."""

from typing import Any

from transformers import SwitchTransformersConfig

from msmoe.formats.modeling.configuration_msmoe import COMPRESSED_TYPE, MsmoeSwitchConfig


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
