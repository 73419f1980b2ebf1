"""Make the compressed model known to transformers' Auto classes."""

import sys
from pathlib import Path


def register() -> None:
    """Register configuration and model classes; importing them costs seconds and 200 MB."""
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

    from msmoe.modeling.configuration_msmoe import MsmoeSwitchConfig
    from msmoe.modeling.dispatch import EarlierConfigOfFile, SwitchConfigOfFile
    from msmoe.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration, MsmoeSwitchModel

    for config in (SwitchConfigOfFile, EarlierConfigOfFile):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MsmoeSwitchConfig, MsmoeSwitchForConditionalGeneration, exist_ok=True)
    AutoModel.register(MsmoeSwitchConfig, MsmoeSwitchModel, exist_ok=True)
    MsmoeSwitchConfig.register_for_auto_class()  # `save_pretrained` then writes the code beside the weights
    MsmoeSwitchForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
    MsmoeSwitchModel.register_for_auto_class("AutoModel")


def is_command() -> bool:
    """Whether this process is the `msmoe` command, which registers when it loads a model and not before."""
    return Path(sys.argv[0] if sys.argv else "").stem == "msmoe"
