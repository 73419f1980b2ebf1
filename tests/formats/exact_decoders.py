"""Tiny decoders of transformers, and `exact` folders of them made by hand from tensors in memory.

`write_exact` replaces the experts of every MoE block; `Exact.reference` is the stock model that computes the same: its
experts are overwritten by the stored ones, the logits of removed router rows are minus infinity.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from msmoe.formats.modeling.modeling_msmoe_decoder import HOW_TO_LOAD, code

E = 8
ROWS = ((0, 1, 2, 4, 5, 7), (0, 2, 3, 5, 6, 7))  # that stay, half of them in each group of experts
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "intermediate_size": 48, "ffn_hidden_size": 48,
    "moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "num_hidden_layers": 3, "num_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "n_group": 1, "topk_group": 1, "moe_topk": 2, "moe_k": 2, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "top_k_experts": 2, "moe_num_shared_experts": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "sliding_window": 16,
}  # fmt: skip
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
FAMILIES = {  # model class, and what else its configuration needs
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),  # transposed, interleaved, biases, own gate
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "gemma4_text": ("Gemma4ForCausalLM", {"enable_moe_block": True, "global_head_dim": 8}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "nemotron_h": ("NemotronHForCausalLM", {}),  # no gate
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "bailing_hybrid": ("BailingHybridForCausalLM", {"num_expert_group": 1}),  # other names on disk than in memory
    "qwen3_next": ("Qwen3NextForCausalLM", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"n_group": 2, "num_key_value_heads": 4}),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1}),  # a router class that skips the experts
    "llama4_text": ("Llama4ForCausalLM", {"num_experts_per_tok": 1}),  # weights on the input
    "longcat_flash": ("LongcatFlashForCausalLM", {"num_key_value_heads": 4, "zero_expert_num": 2}),
    "inkling2_text": ("Inkling2ForCausalLM", {"unpadded_vocab_size": 96}),  # rows of shared experts at the router's end
    "jetmoe": ("JetMoeForCausalLM", {"kv_channels": 8}),  # linear layers hold the experts, in the attention too
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "initializer_range": 0.2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": E, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
        },
    ),
}  # fmt: skip


def build(family: str, *, num_experts: int = E, device: str = "cpu") -> nn.Module:
    """A model in evaluation mode whose experts' biases and selection biases are not zero."""
    name, more = FAMILIES[family]
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    if family == "dbrx":
        ffn = more["ffn_config"] | {"moe_num_experts": num_experts}
        config = config_class(vocab_size=96, **(more | {"ffn_config": ffn}))
    else:
        known, aliases = set(config_class().to_dict()) | set(config_class.attribute_map), config_class.attribute_map
        sizes = SIZES | dict.fromkeys(COUNTS, num_experts)
        config = config_class(**({k: v for k, v in sizes.items() if k in known and k not in aliases} | more))
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config).eval()
    if device == "cpu":
        with torch.no_grad():
            for path, tensor in model.state_dict().items():
                if family == "dbrx" and ".mlp." in path:
                    tensor.normal_(std=0.2)
                elif "bias" in path and "balancing" not in path:  # Zaya resets the last of these on loading (5.24)
                    tensor.copy_(torch.randn_like(tensor) * 0.2)
    return model


def expert_axes(family: str) -> dict[str, tuple[int, int, int]]:
    """Tensors with an entry per expert -> axis, entries per expert, entries after them: two skeletons compared."""
    full, half = (build(family, num_experts=n, device="meta").state_dict() for n in (E, E // 2))
    axes = {}
    for path, tensor in full.items():
        if tensor.shape != half[path].shape:
            (axis,) = [i for i, (m, n) in enumerate(zip(tensor.shape, half[path].shape, strict=True)) if m != n]
            per_expert = (tensor.shape[axis] - half[path].shape[axis]) // (E - E // 2)
            axes[path] = axis, per_expert, tensor.shape[axis] - E * per_expert
    return axes


def selected(tensor: Tensor, axis: tuple[int, int, int], experts: tuple[int, ...]) -> Tensor:
    """The entries of some experts, and those after all experts."""
    dim, per_expert, tail = axis
    last = tensor.shape[dim] - tail
    index = torch.arange(last).view(-1, per_expert)[torch.tensor(experts)].flatten()
    return tensor.index_select(dim, torch.cat([index, torch.arange(last, last + tail)]))


@dataclass
class Exact:
    """An `exact` folder, the model it was made from, and the stock model that stands for it."""

    path: Path
    original: nn.Module
    reference: nn.Module
    lost: dict[int, list[int]] = field(default_factory=dict)  # id of a router's weight -> rows that it lost

    def expected(self, ids: Tensor) -> Tensor:
        with torch.no_grad(), RowsLost(self.lost):
            return self.reference(input_ids=ids, use_cache=False).logits


class RowsLost(TorchFunctionMode):
    """Logits of removed router rows are minus infinity."""

    def __init__(self, lost: dict[int, list[int]]):
        super().__init__()
        self.lost = lost

    def __torch_function__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and (rows := self.lost.get(id(args[1]))):
            return outputs.index_fill(-1, torch.tensor(rows), float("-inf"))
        return outputs


def write_exact(
    family: str,
    path: Path,
    *,
    rows: bool = False,
    factors: tuple[int, int] | None = None,
    constants: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Exact:
    """Write an `exact` folder with 3, 5, 4, 3, ... stored experts in the blocks.

    Args:
        rows: whether routers keep 6 rows of 8.
        factors: rank and kept rows of every matrix named `*_proj`.
        constants: mean outputs in the place of rows 0, 3 and 6.
    """
    original = build(family).to(dtype)
    result = Exact(path, original, copy.deepcopy(original))
    axes, state = expert_axes(family), {k: v.clone() for k, v in original.state_dict().items()}
    overwritten, blocks = result.reference.state_dict(keep_vars=True), {}
    paths = [n for n, m in original.named_modules() if n.endswith(".experts") or hasattr(m, "input_linear")]
    blocks_of = {n: n.removesuffix(".experts") if family != "jetmoe" else n for n in paths}
    generator = torch.Generator().manual_seed(7)
    for position, (experts, block) in enumerate(blocks_of.items()):
        num_groups = (3, 5, 4)[position % 3]
        kept = ROWS[position % 2] if rows else tuple(range(E))
        stored = (1, 3, 5, 7, 0)[:num_groups]
        mapping = [(3 * r + 1 + position) % num_groups for r in range(len(kept))]
        spec = {"experts": experts.removeprefix(block).removeprefix("."), "groups": num_groups}
        inside = [k for k in axes if k.startswith(f"{experts}.") and ".router." not in k]
        for key in inside:
            matrices = selected(state[key], (*axes[key][:2], 0), stored).view(num_groups, -1, *state[key].shape[1:])
            if factors and key.endswith("_proj"):
                transposed = family in ("gpt_oss", "llama4_text")
                parts, dense = random_factors(matrices[:, 0].mT if transposed else matrices[:, 0], factors, generator)
                spec.setdefault("factors", {})[key.removeprefix(f"{experts}.")] = list(factors)
                state |= {f"{key}.{name}": part.to(torch.int32 if name == "rows" else dtype) for name, part in parts}
                del state[key]
                if family == "gpt_oss" and key.endswith("gate_up_proj"):  # gate above up; in turns in the module
                    dense = dense.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
                matrices = (dense.mT if transposed else dense)[:, None].to(dtype)
            else:
                state[key] = selected(state[key], axes[key], stored)
            with torch.no_grad():
                everyone = overwritten[key][: E * axes[key][1]].view(E, -1, *matrices.shape[2:])
                for row, group in zip(kept, mapping, strict=True):
                    everyone[row] = matrices[group]
        if rows:
            around = [k for k in axes if k.startswith(f"{block}.") and k not in inside]
            spec |= {"rows": len(kept), "router": {}}
            lost = [e for e in range(E) if e not in kept]
            for key in around:
                state[key] = selected(state[key], axes[key], kept)
                spec["router"][key.removeprefix(f"{block}.")] = [axes[key][0], state[key].shape[axes[key][0]]]
                if original.state_dict()[key].ndim == 2 and "bias" not in key:
                    result.lost[id(overwritten[key])] = lost
                elif key in dict(result.reference.named_buffers()) or "correction" in key:
                    with torch.no_grad():
                        overwritten[key].index_fill_(axes[key][0], torch.tensor(lost), float("-inf"))
        if constants:
            mapping[0], mapping[3], mapping[6] = num_groups, num_groups + constants - 1, num_groups
            outputs = torch.randn(constants, 32, generator=generator).to(dtype)
            spec["constants"], state[f"{experts}.constants"] = constants, outputs
            put_constants(result.reference.get_submodule(experts), torch.tensor(mapping), outputs, num_groups)
        state[f"{experts}.expert_map"] = torch.tensor(mapping)
        blocks[block] = spec
    for tied in original.all_tied_weights_keys:
        state.pop(tied, None)
    path.mkdir(parents=True, exist_ok=True)
    added = (".expert_map", ".constants", ".U", ".V", ".S", ".rows")  # under the names they have in memory
    ours = {key: state.pop(key) for key in list(state) if key.endswith(added)}
    on_disk = revert_weight_conversion(original, state) | ours
    save_file({k: v.contiguous() for k, v in on_disk.items()}, path / "model.safetensors", metadata={"format": "pt"})
    original.config.save_pretrained(path)
    (path / "modeling_msmoe_decoder.py").write_text(code(FAMILIES[family][0], type(original.config).__name__))
    place = path / "config.json"
    config = json.loads(place.read_text()) | {
        "msmoe": {"blocks": blocks},
        "compressed_model_type": f"msmoe_{family}",
        "architectures": ["MsmoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_msmoe_decoder.MsmoeConfig",
            "AutoModelForCausalLM": "modeling_msmoe_decoder.MsmoeForCausalLM",
        },
        "experts_implementation": HOW_TO_LOAD,
    }
    place.write_text(json.dumps(config))
    return result


def random_factors(like: Tensor, sizes: tuple[int, int], generator: torch.Generator) -> tuple[list, Tensor]:
    """U, V, S, rows of matrices of some shape (G, O, I), and the matrices that they make, row by row."""
    (num_groups, num_outputs, num_inputs), (rank, num_rows) = like.shape, sizes
    u = torch.randn(num_groups, num_outputs, rank, generator=generator) * 0.1
    v = torch.randn(num_groups, rank, num_inputs, generator=generator) * 0.5
    s = torch.randn(num_groups, num_rows, num_inputs, generator=generator) * 0.2
    rows = torch.stack([torch.randperm(num_outputs, generator=generator)[:num_rows] for _ in range(num_groups)])
    dense = u @ v
    for g in range(num_groups):
        for k, row in enumerate(rows[g].tolist()):
            dense[g, row] += s[g, k]
    return [("U", u), ("V", v), ("S", s), ("rows", rows)], dense


def put_constants(experts: nn.Module, mapping: Tensor, outputs: Tensor, num_groups: int) -> None:
    """Let the rows of a map that are constants give their output, times the weight, in the place of the expert's."""
    stock = experts.forward

    def forward(hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        group = mapping[index]
        total = stock(hidden_states, index, weights * (group < num_groups))
        given = outputs[(group - num_groups).clamp(min=0)] * (weights * (group >= num_groups))[..., None]
        return total + given.sum(1).view_as(total)

    experts.forward = forward
