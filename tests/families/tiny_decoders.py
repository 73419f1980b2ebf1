"""Tiny random models of every Mixture-of-Experts `model_type` of transformers: 8 experts, hidden size 32, 2-4 layers.

`build(model_type)` gives the model in evaluation mode, with weights that make routing non-trivial, and `tokens(model)`
a batch for it.
"""

import importlib
import inspect

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

NUM_EXPERTS = 8
COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

MODEL_TYPES = """
afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 diffusion_gemma_text dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe_text exaone_moe flex_olmo flint
gemma4_text glm4_moe glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa gpt_oss granitemoe granitemoe_swa
granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl_text inkling2_loop_text inkling2_text
inkling_text jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash
minimax minimax_m2 minimax_m3_vl_text mistral4 mistral_large4_text mixtral muse_spark_text nemotron_h olmoe
openai_privacy_filter phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_text
qwen3_omni_moe_talker_text qwen3_vl_moe_text qwen4_exp_text sarvam_mla sarvam_moe solar_open step3p5
unlimited_ocr_text zaya
"""
DECODERS = tuple(MODEL_TYPES.split())
NOT_RUN = {"dots3_note_vision_encoder": "a vision tower: takes pixels"}
REFUSED = ("doge", "nllb-moe", "vitpose_backbone")

SIZES = dict.fromkeys(("hidden_size", "d_model"), 32)
SIZES |= dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48)
SIZES |= dict.fromkeys(
    (
        "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
        "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
    ),
    24,
)  # fmt: skip
SIZES |= dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers"), 3)
SIZES |= dict.fromkeys(
    ("num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4
)
SIZES |= dict.fromkeys(("num_key_value_heads", "encoder_layers", "decoder_layers"), 2)
SIZES |= dict.fromkeys(("head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
SIZES |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window"), 16)
SIZES |= dict.fromkeys(("max_position_embeddings", "max_seq_len"), 128)
SIZES |= dict.fromkeys(
    (
        "first_k_dense_replace", "num_dense_layers", "n_group", "topk_group", "moe_num_shared_experts",
        "n_shared_experts", "num_shared_experts", "mamba_n_groups", "n_groups",
    ),
    1,
)  # fmt: skip
SIZES |= dict.fromkeys(("moe_topk", "moe_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts"), 2)
SIZES |= dict.fromkeys(
    (
        "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_num_heads", "mamba_head_dim", "ssm_state_size",
        "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input",
    ),
    8,
)  # fmt: skip
SIZES |= dict.fromkeys(("chunk_size", "mamba_chunk_size", "index_head_dim", "index_topk"), 16)
SIZES |= {
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0, "mamba_expand": 2,
    "mamba_dt_rank": 4, "linear_num_heads": 4, "linear_head_dim": 8, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "index_n_heads": 2, "use_cache": False,
    "num_nextn_predict_layers": 0, "initializer_range": 0.2, "num_kv_shared_layers": 0,
}  # fmt: skip

GROUPED = {"n_group": 2, "topk_group": 1}
ALL_HEADS = {"num_key_value_heads": 4}
SPARSE_AFTER_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
OTHERWISE: dict[str, dict] = {
    "axk1": GROUPED | ALL_HEADS,
    "axk2": ALL_HEADS,
    "beam": GROUPED | SPARSE_AFTER_FIRST,
    "deepseek_ocr2_text": ALL_HEADS | SPARSE_AFTER_FIRST,
    "deepseek_v2": GROUPED | ALL_HEADS | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": GROUPED | ALL_HEADS,
    "deepseek_v32": GROUPED | ALL_HEADS,
    "diffusion_gemma_text": {"enable_moe_block": True, "global_head_dim": 8, "num_global_key_value_heads": 2},
    "dots3_note_text": ALL_HEADS,
    "ernie4_5_vl_moe_text": SPARSE_AFTER_FIRST
    | {"moe_intermediate_size": [24, 16], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 8, "num_global_key_value_heads": 2},
    "glm4_moe_lite": ALL_HEADS,
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
    "glm5_next_text": ALL_HEADS | SPARSE_AFTER_FIRST | {"qk_rope_head_dim": 0},
    "glm_moe_dsa": ALL_HEADS,
    "hy_v4_vl_text": ALL_HEADS | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "inkling2_loop_text": {"unpadded_vocab_size": 96},
    "inkling2_text": {"unpadded_vocab_size": 96},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": ALL_HEADS | {"zero_expert_num": 2},
    "mistral4": ALL_HEADS | {"head_dim": 16},
    "mistral_large4_text": ALL_HEADS,
    "muse_spark_text": {"moe_hidden_size": 32},
    "sarvam_mla": ALL_HEADS,
    "step3p5": SPARSE_AFTER_FIRST,
    "unlimited_ocr_text": SPARSE_AFTER_FIRST,
    "zaya": {"num_experts_per_tok": 1},
    "doge": {"is_moe": True, "num_experts": 64},
    "vitpose_backbone": {
        "hidden_size": 32, "part_features": 8, "num_experts": 8, "image_size": [32, 32], "patch_size": [16, 16]
    },
}  # fmt: skip


def tiny_config(model_type: str, **more):
    """Configuration of a tiny model; `more` overrides fields."""
    kind = CONFIG_MAPPING[model_type]
    if model_type == "dbrx":  # its fields lie in nested configurations
        experts = {
            "ffn_hidden_size": 48,
            "moe_num_experts": NUM_EXPERTS,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        }
        attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
        sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 96}
        return kind(**sizes, attn_config=attention, ffn_config=experts, **more)
    aliases = getattr(kind, "attribute_map", {}) or {}
    known = set(kind().to_dict()) | set(inspect.signature(kind.__init__).parameters) | set(aliases)
    fields = {name: value for name, value in SIZES.items() if name in known}
    fields |= {name: NUM_EXPERTS for name in COUNT_FIELDS if name in known and name not in aliases}
    for alias, target in aliases.items():
        if target in fields:
            fields.pop(alias, None)
    config = kind(**(fields | OTHERWISE.get(model_type, {}) | more))
    if model_type == "qwen3_omni_moe_talker_text":  # its class has no such field, its model needs it
        config.shared_expert_intermediate_size = 24
    return config


def model_class(model_type: str):
    """The causal language model of a type, else its largest model class."""
    kind = CONFIG_MAPPING[model_type]
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model_type.startswith("sarvam"):  # other names of configurations, without models of their own
        return getattr(transformers, name)
    folder = model_type_to_module_name(model_type)
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    if name is not None and getattr(module, name).config_class in (None, kind):
        return getattr(module, name)
    fitting = []
    for name, found in vars(module).items():
        if not inspect.isclass(found) or not issubclass(found, transformers.PreTrainedModel):
            continue
        if name.endswith("PreTrainedModel") or found.__module__ != module.__name__:
            continue
        takes = found.__init__.__annotations__.get("config") if "__init__" in vars(found) else None
        takes = takes if isinstance(takes, str) else getattr(takes, "__name__", None)
        if (takes or getattr(found.config_class, "__name__", "")) == kind.__name__:
            fitting.append(name)
    fitting.sort(key=lambda n: ("CausalLM" not in n and "ConditionalGeneration" not in n, "Model" not in n, len(n)))
    return getattr(module, fitting[0])


def build(model_type: str, *, seed: int = 0, meta: bool = False, **more) -> nn.Module:
    """A tiny random model, every weight of it filled; on the meta device where `meta`."""
    torch.manual_seed(seed)
    config, kind = tiny_config(model_type, **more), model_class(model_type)
    with torch.device("meta" if meta else "cpu"):
        model = kind._from_config(config).eval()
    if not meta:
        fill_(model, seed)
    return model


@torch.no_grad()
def fill_(model: nn.Module, seed: int) -> None:
    """Random matrices and selection biases, so that routing differs between tokens and no row is like another."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.ndim > 1 or name.endswith(("_bias", "biases", ".bias"))):
            scale = 0.2 if tensor.ndim > 1 else 0.05
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
            if name.endswith(
                "balancing_biases"
            ):  # transformers 5.24 gives the skip class this value whatever is stored
                tensor[-1] = -1
        elif name.endswith("per_expert_scale"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("tid2eid"):
            rows = [torch.randperm(NUM_EXPERTS, generator=generator)[: tensor.shape[1]] for _ in range(len(tensor))]
            tensor.copy_(torch.stack(rows))


def tokens(model: nn.Module, *, batch: int = 2, length: int = 24, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a model."""
    generator = torch.Generator().manual_seed(seed)
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":
        return {"inputs_embeds": torch.randn(batch, length, model.config.hidden_size, generator=generator)}
    return {"input_ids": torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, S, V), or the last hidden states (B, S, D) of a model without a head."""
    found = model(**inputs, use_cache=False)
    return found.logits if getattr(found, "logits", None) is not None else found[0]
