"""Configuration of a Switch Transformer whose MoE layers share their experts among groups."""

from transformers import SwitchTransformersConfig


class MsmoeSwitchConfig(SwitchTransformersConfig):
    """Switch configuration plus the number of stored experts of each MoE layer.

    Args:
        moe_layers: module path of each MoE layer, e.g. `encoder.block.1.layer.1.mlp`, to its number of groups.
            `num_experts` stays the number of router rows.
    """

    model_type = "msmoe_switch_transformers"

    moe_layers: dict | None = None
