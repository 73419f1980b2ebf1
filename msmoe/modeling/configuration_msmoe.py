"""Configuration of a Switch Transformer whose MoE layers share their experts among groups."""

from transformers import SwitchTransformersConfig


class MsmoeSwitchConfig(SwitchTransformersConfig):
    """Switch configuration plus what the MoE layers store.

    Args:
        moe_layers: module path of each MoE layer, e.g. `encoder.block.1.layer.1.mlp`, to its number of groups.
            `num_experts` stays the number of router rows.
        factors: module path of each MoE layer with factorised experts, to the rank and the number of kept rows of
            its matrices, e.g. `{"wi": [32, 307], "wo": [32, 77]}`; a matrix not named is dense.
    """

    model_type = "msmoe_switch_transformers"

    moe_layers: dict | None = None
    factors: dict | None = None
