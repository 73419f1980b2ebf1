"""What can be wrong with a Switch checkpoint, seen from its configuration and headers: one line that names it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.strict_json import shown

if TYPE_CHECKING:
    from msmoe.families.protocol import Family

POSITIVE = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12,
    "num_heads": 12, "num_experts": 8, "expert_capacity": 64, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}  # fmt: skip
COUNTS = (
    "num_sparse_encoder_layers", "num_sparse_decoder_layers", "encoder_sparse_step", "decoder_sparse_step"
)  # fmt: skip
SWITCHES = (
    "router_bias", "tie_word_embeddings", "add_router_probs", "router_ignore_padding_tokens", "use_cache",
    "is_encoder_decoder",
)  # fmt: skip
REALS = ("router_jitter_noise", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "router_z_loss_coef",
         "router_aux_loss_coef")  # fmt: skip
TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id", "bos_token_id")
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")
MAPS = ("moe_layers", "router_rows", "constants")  # of an `exact` export: layer -> number
BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.")
MAX_ROWS = 2**20  # of a router
HOW_TO_LOAD = "msmoe: load with AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)"  # as modeling/


def check_config(checkpoint: Checkpoint) -> None:
    """Check every value of the configuration that is used.

    Raises:
        UserError: naming file, field, value and what is allowed.
    """
    config, place = checkpoint.config, checkpoint.path / "config.json"

    def wrong(name: str, allowed: str) -> UserError:
        return UserError(f"{place}: {name} must be {allowed}, it is {shown(config[name])}")

    for name in POSITIVE.keys() & config.keys():
        may_be_null = name == "num_decoder_layers" and config[name] is None
        if not may_be_null and not (is_integer(config[name]) and 0 < config[name] < 2**31):
            raise wrong(name, "an integer above 0")
    for name in COUNTS:
        if name in config and not (is_integer(config[name]) and 0 <= config[name] < 2**31):
            raise wrong(name, "an integer of at least 0")
    for name in SWITCHES:
        if name in config and not isinstance(config[name], bool):
            raise wrong(name, "true or false")
    for name in REALS:
        if name in config and not (is_real(config[name]) and config[name] >= 0):
            raise wrong(name, "a number of at least 0")
    if not 0 <= config.get("dropout_rate", 0) < 1:
        raise wrong("dropout_rate", "at least 0 and below 1")
    if config.get("dense_act_fn", "relu") not in ("relu", HOW_TO_LOAD):
        raise UserError(f"{place}: the experts have dense_act_fn {shown(config['dense_act_fn'])}; relu is supported")
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in FLOAT_DTYPES):
            raise wrong(name, f"one of {', '.join(FLOAT_DTYPES)}")
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{place} has a quantization_config, but quantised Switch checkpoints cannot be read: start from the "
            "unquantised one, or remove the field if the weights are plain floats"
        )
    check_tokens(config, str(place))


def check_tokens(config: dict, place: str) -> None:
    """Check the ids of special tokens; padding must be known."""
    vocabulary = config.get("vocab_size", POSITIVE["vocab_size"])
    for name in TOKENS:
        value = config.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if name in config and any(i is not None and not (is_integer(i) and 0 <= i < vocabulary) for i in ids):
            raise UserError(f"{place}: {name} must be a token id from 0 to {vocabulary - 1}, it is {shown(value)}")
    if config.get("pad_token_id", 0) is None:
        raise UserError(f"{place}: pad_token_id is null: set it, for Switch Transformers to 0")


def check_shapes(checkpoint: Checkpoint) -> None:
    """Check the tensors that are there against the sizes that the configuration states.

    Raises:
        UserError: naming the first tensor that does not fit, or the number of blocks.
    """
    if not isinstance(checkpoint.config.get("router_rows") or {}, dict):
        raise UserError(f"{checkpoint.path / 'config.json'}: router_rows must map layers to integers above 0")
    size = {name: checkpoint.config.get(name) or default for name, default in POSITIVE.items()}
    if checkpoint.config.get("num_decoder_layers") is None:
        size["num_decoder_layers"] = size["num_layers"]
    d_model, d_ff, inner = size["d_model"], size["d_ff"], size["num_heads"] * size["d_kv"]
    expected = (
        (re.compile(r"shared\.weight|lm_head\.weight|.*embed_tokens\.weight"), (size["vocab_size"], d_model)),
        (re.compile(r".*Attention\.[qkv]\.weight"), (inner, d_model)),
        (re.compile(r".*Attention\.o\.weight"), (d_model, inner)),
        (re.compile(r".*relative_attention_bias\.weight"),
         (size["relative_attention_num_buckets"], size["num_heads"])),
        (re.compile(r".*layer_norm\.weight"), (d_model,)),
        (re.compile(r".*\.mlp\.(experts\.expert_\d+\.)?wi\.weight"), (d_ff, d_model)),
        (re.compile(r".*\.mlp\.(experts\.expert_\d+\.)?wo\.weight"), (d_model, d_ff)),
        (re.compile(r".*\.router\.classifier\.weight"), None),
    )  # fmt: skip
    blocks = {"encoder": 0, "decoder": 0}
    for name in checkpoint:
        shape = checkpoint.spec(name).shape
        if block := BLOCK.match(name):
            blocks[block[1]] = max(blocks[block[1]], int(block[2]) + 1)
        wanted = next((shape for pattern, shape in expected if pattern.fullmatch(name)), shape)
        if wanted is None:
            layer = name.removesuffix(".router.classifier.weight")
            wanted = ((checkpoint.config.get("router_rows") or {}).get(layer, size["num_experts"]), d_model)
        if shape != wanted:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {list(shape)}, the configuration asks for {list(wanted)}"
            )
    for stack, field in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        if blocks[stack] and blocks[stack] != size[field]:
            raise UserError(
                f"{checkpoint.path}: config.json says {field} {size[field]}, the weights have {blocks[stack]} blocks "
                f"in the {stack}"
            )


def check_maps(family: Family, checkpoint: Checkpoint) -> None:
    """Check an `exact` export: what its configuration says of its layers, and where its maps lead.

    Raises:
        UserError: naming layer and entry.
    """
    config, place = checkpoint.config, checkpoint.path / "config.json"
    for field in MAPS:
        entries = config.get(field) or {}
        if not isinstance(entries, dict) or not all(is_integer(n) and 0 < n < MAX_ROWS for n in entries.values()):
            raise UserError(f"{place}: {field} must map layers to integers above 0")
    check_factors(config.get("factors") or {}, str(place))
    for layer, num_stored in family.stored_layers(checkpoint):
        if (config.get("moe_layers") or {}).get(layer.name) != num_stored:
            raise UserError(f"{place}: moe_layers must say {num_stored} for {layer.name}, as many as are stored")
        targets = num_stored + (config.get("constants") or {}).get(layer.name, 0)
        key = family.expert_map_key(checkpoint, layer.name)
        if checkpoint.spec(key).shape != (layer.num_experts,):
            raise UserError(f"{key} has shape {list(checkpoint.spec(key).shape)}, the router {layer.num_experts} rows")
        for row, target in enumerate(checkpoint.read_integers(key)):
            if not 0 <= target < targets:
                raise UserError(f"{key} sends row {row} to expert {target}; experts are 0 to {targets - 1}")
        for matrix in layer.matrices:
            rows = family.factor_keys(checkpoint, layer.name, matrix).rows
            num_outputs = layer.shape(matrix)[0]
            if rows in checkpoint and any(not 0 <= row < num_outputs for row in checkpoint.read_integers(rows)):
                raise UserError(f"{rows} names a row that is not there; rows are 0 to {num_outputs - 1}")


def check_factors(factors: Any, place: str) -> None:
    """Check that `factors` maps layers and matrices to a rank and a number of rows."""

    def is_shape(shape: Any) -> bool:
        return isinstance(shape, list) and len(shape) == 2 and all(is_integer(n) and 0 <= n < 2**31 for n in shape)

    if not isinstance(factors, dict) or not all(
        isinstance(m, dict) and m.keys() <= {"wi", "wo"} and all(map(is_shape, m.values())) for m in factors.values()
    ):
        raise UserError(f"{place}: factors must map layers to wi and wo, and these to [rank, rows]")


def is_integer(value: Any) -> bool:
    return type(value) is int


def is_real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
