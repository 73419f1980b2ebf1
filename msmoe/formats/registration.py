"""Make the compressed model known to transformers' Auto classes, without importing transformers before others do."""

from msmoe.formats.imports import when_imported

AUTO = "transformers.models.auto"


def register_when_needed() -> None:
    """Register with the Auto classes when somebody imports them; at once where somebody has."""
    when_imported(f"{AUTO}.configuration_auto", register_configuration)
    when_imported(f"{AUTO}.modeling_auto", register)


def register_configuration() -> None:
    """Let `AutoConfig` read the configuration of a compressed checkpoint."""
    from transformers import AutoConfig

    from msmoe.formats.modeling.configuration_msmoe import MsmoeSwitchConfig
    from msmoe.formats.modeling.dispatch import EarlierConfigOfFile, SwitchConfigOfFile

    for config in (SwitchConfigOfFile, EarlierConfigOfFile):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    MsmoeSwitchConfig.register_for_auto_class()  # `save_pretrained` then writes the code beside the weights


def register() -> None:
    """Register configuration and model classes now; importing them costs seconds and 200 MB."""
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    from msmoe.formats.modeling.configuration_msmoe import MsmoeSwitchConfig
    from msmoe.formats.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration, MsmoeSwitchModel

    register_configuration()
    AutoModelForSeq2SeqLM.register(MsmoeSwitchConfig, MsmoeSwitchForConditionalGeneration, exist_ok=True)
    AutoModel.register(MsmoeSwitchConfig, MsmoeSwitchModel, exist_ok=True)
    MsmoeSwitchForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
    MsmoeSwitchModel.register_for_auto_class("AutoModel")
