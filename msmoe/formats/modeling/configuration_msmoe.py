"""Configuration of a Switch Transformer whose MoE layers share their experts among groups."""

from transformers import SwitchTransformersConfig

COMPRESSED_TYPE = "msmoe_switch_transformers"
HOW_TO_LOAD = "msmoe: load with AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)"


class MsmoeSwitchConfig(SwitchTransformersConfig):
    """Switch configuration plus what the MoE layers store.

    On disk `model_type` is the stock one, for which tokenizers and tools are known, and `dense_act_fn` says how to load
    the model: the stock class, which would fill the experts with random numbers, stops there with that line.

    Args:
        compressed_model_type: tells the configuration from a stock one.
        moe_layers: module path of each MoE layer, e.g. `encoder.block.1.layer.1.mlp`, to its number of groups.
            `num_experts` stays the number of experts before compression, and of router rows unless `router_rows`
            says otherwise.
        factors: module path of each MoE layer with factorised experts, to the rank and the number of kept rows of
            its matrices, e.g. `{"wi": [32, 307], "wo": [32, 77]}`; a matrix not named is dense.
        router_rows: module path of each MoE layer whose router lost rows, to their number. Its capacity grows by as
            much as its router shrinks.
        constants: module path of each MoE layer that puts a mean output in the place of some experts, to their number.
    """

    model_type = "switch_transformers"

    compressed_model_type: str = COMPRESSED_TYPE
    moe_layers: dict | None = None
    factors: dict | None = None
    router_rows: dict | None = None
    constants: dict | None = None

    def __post_init__(self, **kwargs):
        if self.dense_act_fn == HOW_TO_LOAD:
            self.dense_act_fn = "relu"
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        return super().to_dict() | {"dense_act_fn": HOW_TO_LOAD}
