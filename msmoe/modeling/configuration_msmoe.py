"""Configuration of a Switch Transformer whose MoE layers share their experts among groups."""

from transformers import SwitchTransformersConfig


class MsmoeSwitchConfig(SwitchTransformersConfig):
    """Switch configuration plus what the MoE layers store.

    Args:
        moe_layers: module path of each MoE layer, e.g. `encoder.block.1.layer.1.mlp`, to its number of groups.
            `num_experts` stays the number of experts before compression, and of router rows unless `router_rows`
            says otherwise.
        factors: module path of each MoE layer with factorised experts, to the rank and the number of kept rows of
            its matrices, e.g. `{"wi": [32, 307], "wo": [32, 77]}`; a matrix not named is dense.
        router_rows: module path of each MoE layer whose router lost rows, to their number. Its capacity grows by as
            much as its router shrinks.
        constants: module path of each MoE layer that puts a mean output in the place of some experts, to their number.
    """

    model_type = "msmoe_switch_transformers"

    moe_layers: dict | None = None
    factors: dict | None = None
    router_rows: dict | None = None
    constants: dict | None = None
