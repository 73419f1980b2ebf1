"""Which configuration class a file is of, for transformers' Auto classes."""

from typing import Any

from transformers import SwitchTransformersConfig

from msmoe.modeling.configuration_msmoe import COMPRESSED_TYPE, MsmoeSwitchConfig


class SwitchConfigOfFile(SwitchTransformersConfig):
    """Stands for the stock configuration, and for the compressed one where the file says so."""

    @classmethod
    def from_dict(cls, config_dict: dict, **options: Any) -> Any:
        compressed = COMPRESSED_TYPE in (config_dict.get("compressed_model_type"), config_dict.get("model_type"))
        return (MsmoeSwitchConfig if compressed else SwitchTransformersConfig).from_dict(config_dict, **options)


class EarlierConfigOfFile(SwitchConfigOfFile):
    """Stands for the compressed configuration of exports that had a `model_type` of their own."""

    model_type = COMPRESSED_TYPE
