"""Make the compressed model known to transformers' Auto classes, without importing transformers before others do."""

from msmoe.formats.imports import when_imported

AUTO = "transformers.models.auto"

# Mixture-of-Experts decoders with a causal model in transformers 5.24 whose experts are chosen by a router
DECODERS = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "flint", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4",
    "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba", "jetmoe", "kimi_linear", "kolibri1",
    "laguna", "lara_mini", "lfm2_moe", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text", "sarvam_mla", "sarvam_moe", "solar_open",
    "zaya",
)  # fmt: skip


def register_when_needed() -> None:
    """Register with the Auto classes when somebody imports them; at once where somebody has."""
    when_imported(f"{AUTO}.configuration_auto", register_configuration)
    when_imported(f"{AUTO}.modeling_auto", register)


def register_configuration() -> None:
    """Let `AutoConfig` read the configuration of a compressed checkpoint."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    from msmoe.formats.modeling.configuration_msmoe import MsmoeSwitchConfig
    from msmoe.formats.modeling.dispatch import DecoderConfigOfFile, EarlierConfigOfFile, SwitchConfigOfFile

    for config in (SwitchConfigOfFile, EarlierConfigOfFile):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for model_type in CONFIG_MAPPING_NAMES.keys() & DECODERS:
        CONFIG_MAPPING.register(model_type, DecoderConfigOfFile(model_type), exist_ok=True)
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
