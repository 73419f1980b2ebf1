"""Configuration and model of the compressed checkpoint, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from msmoe.modeling.configuration_msmoe import MsmoeSwitchConfig
from msmoe.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration

AutoConfig.register(MsmoeSwitchConfig.model_type, MsmoeSwitchConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(MsmoeSwitchConfig, MsmoeSwitchForConditionalGeneration, exist_ok=True)
MsmoeSwitchConfig.register_for_auto_class()
MsmoeSwitchForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["MsmoeSwitchConfig", "MsmoeSwitchForConditionalGeneration"]
