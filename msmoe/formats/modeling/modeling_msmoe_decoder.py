"""A Mixture-of-Experts decoder of transformers with other numbers of stored experts than the router has rows.

Between router and experts stands a map. The matrices of the stored experts are dense, or low rank plus a few rows; in
the place of experts there may be constant outputs, and the router may have lost rows.

Self-contained: travels with the checkpoint, needs torch and transformers only. `BASE` and `BASE_CONFIG` name the
family's own classes. `config.msmoe` says of every block what is stored in it:

    {"blocks": {"model.layers.1.mlp": {"experts": "experts", "groups": 5, "rows": 7, "constants": 1,
        "router": {"gate.weight": [0, 7]}, "factors": {"gate_up_proj": [4, 2]}}}}

Shapes: T tokens, K chosen experts of a token, S = T K, E router rows, G stored experts, C constants, D d_model,
F d_ff, R rank, O outputs and I inputs of a matrix.
"""

import copy
import re
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import initialization as init
from transformers.integrations.moe import _default_apply_gate, _grouped_linear

BASE = "Qwen3MoeForCausalLM"
BASE_CONFIG = "Qwen3MoeConfig"
HOW_TO_LOAD = "msmoe: load with AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)"
COUNT_KEY = re.compile(r"num_experts|num_local_experts|n_routed_experts|moe_num_experts")
COUNT_ATTRIBUTE = re.compile(r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_router_classes")
FILE = Path(__file__)


def grouped_linear(x, weight, offsets, *, transposed=False):
    """Multiply tokens (S, I), sorted by group, by the matrices of their groups; the first `offsets[-1]` tokens only.

    `torch.nn.functional.grouped_mm` wants rows of a multiple of 16 bytes (2.13), forwards and backwards; other shapes
    go through the library's loop over groups.

    Args:
        weight: (G, O, I), or (G, I, O) where `transposed`.
        offsets: (G,) int32, the end of each group.
    """
    if all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:]):
        return _grouped_linear(x, weight, offsets, is_transposed=transposed)
    weight = weight if transposed else weight.mT
    return torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), weight, offsets)


class Factors(nn.Module):
    """G matrices (O, I) as low rank plus kept rows: U (G, O, R), V (G, R, I), S (G, K, I) with row indices (G, K).

    The rows of gates lie above those of up-projections, also where the family's own matrices interleave them.
    """

    def __init__(self, num_groups, num_outputs, num_inputs, rank, num_rows):
        super().__init__()
        self.U = nn.Parameter(torch.empty(num_groups, num_outputs, rank))
        self.V = nn.Parameter(torch.empty(num_groups, rank, num_inputs))
        self.S = nn.Parameter(torch.empty(num_groups, num_rows, num_inputs))
        self.register_buffer("rows", torch.arange(num_rows, dtype=torch.int32).repeat(num_groups, 1))

    def forward(self, x, group, offsets):
        """Multiply tokens (S, I), sorted by group (S,): two thin products, and the kept rows added."""
        outputs = grouped_linear(grouped_linear(x, self.V, offsets), self.U, offsets)
        if self.S.shape[1]:
            outputs = outputs.scatter_add(1, self.rows[group].long(), grouped_linear(x, self.S, offsets))
        return outputs

    def dense(self):
        """The matrices (G, O, I)."""
        rows = self.rows.long()[..., None].expand_as(self.S)
        return (self.U @ self.V).scatter_add(1, rows, self.S)


class Mapped:
    """The family's own experts behind a map from router rows to stored experts."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        group = self.stored(top_k_index)
        if self.constants is None:
            return super().forward(hidden_states, group, top_k_weights)
        stored = group.clamp(max=self.num_groups - 1)
        weights = top_k_weights.masked_fill(group >= self.num_groups, 0)
        outputs = super().forward(hidden_states, stored, weights)
        return outputs + self.constant_outputs(group, top_k_weights).view_as(outputs)

    def stored(self, index):
        """Stored expert of each router row (T, K); from G on, of each constant."""
        return self.expert_map[index]

    def constant_outputs(self, group, weights):
        """What the chosen constants (T, K) add (T, D)."""
        index = group.sub(self.num_groups).clamp(min=0)
        weights = weights.masked_fill(group < self.num_groups, 0)
        share = weights.new_zeros(len(weights), len(self.constants)).scatter_add(1, index, weights)
        return share.to(self.constants.dtype) @ self.constants


class MappedBeforeZeroExperts(Mapped):
    """Experts with others after them that hand on their input: the router's last rows, which stay the last."""

    def stored(self, index):
        rows = len(self.expert_map)
        return torch.where(index < rows, self.expert_map[index.clamp(max=rows - 1)], index - rows + self.num_groups)


class Sorted(Mapped):
    """Experts of which matrices are factorised, or that lost some to constants: the tokens sorted by stored expert."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        chosen = self.stored(top_k_index)
        group, order = torch.sort(chosen.flatten())
        offsets = torch.bincount(group, minlength=self.num_groups)[: self.num_groups].cumsum(0, dtype=torch.int32)
        if self.constants is not None:  # they come last, and take no product
            count = int(offsets[-1])
            group, order = group[:count], order[:count]
        x = self.expert_outputs(hidden_states[order // chosen.shape[-1]], group, offsets)
        x = x * top_k_weights.flatten()[order, None]
        outputs = x.new_zeros(chosen.numel(), x.shape[-1]).index_copy(0, order, x).view(*chosen.shape, -1).sum(1)
        if self.constants is not None:
            outputs = outputs + self.constant_outputs(chosen, top_k_weights)
        return outputs.to(hidden_states.dtype)

    def expert_outputs(self, x, group, offsets):
        """Outputs (S, D) of tokens (S, D) sorted by group (S,)."""
        if not len(x):
            return x
        if hasattr(self, "gate_up_proj"):
            gate = getattr(type(self), "_apply_gate", _default_apply_gate)
            x = gate(self, self.product("gate_up_proj", x, group, offsets))
        else:
            x = self.act_fn(self.product("up_proj", x, group, offsets))
        x = self.product("down_proj", x, group, offsets)
        return self.post_expert_norm(x) if getattr(self, "has_post_expert_norm", False) else x

    def product(self, name, x, group, offsets):
        """One matrix of the experts, and its bias: (S, I) to (S, O)."""
        weight = getattr(self, name)
        if isinstance(weight, Factors):
            outputs = weight(x, group, offsets)
            if name == "gate_up_proj" and not getattr(self, "is_concatenated", True):
                outputs = outputs.unflatten(-1, (2, -1)).mT.flatten(-2)
        else:
            outputs = grouped_linear(x, weight, offsets, transposed=self.is_transposed)
        bias = getattr(self, f"{name}_bias", None)
        return outputs if bias is None else outputs + bias[group]


class ScaledInputs(Sorted):
    """Llama 4's experts: called with every token once for each router row, scaled by its weight, 0 where not chosen."""

    def forward(self, hidden_states):
        rows = len(self.expert_map)
        x = hidden_states.view(rows, -1, hidden_states.shape[-1])
        row, token = x.any(-1).nonzero(as_tuple=True)
        group, order = torch.sort(self.expert_map[row])
        row, token = row[order], token[order]
        offsets = torch.bincount(group, minlength=self.num_groups).cumsum(0, dtype=torch.int32)
        outputs = self.expert_outputs(x[row, token], group, offsets)
        return torch.zeros_like(x).index_put((row, token), outputs.to(x.dtype)).flatten(0, 1)


class Regroup:
    """Hook of a JetMoe router, which sorts the tokens by row for linear layers that hold the experts: by group now."""

    def __init__(self, block):
        self.block = block

    def __call__(self, router, inputs, outputs):
        pair, token, weights, sizes, logits = outputs
        expert_map, num_groups = self.block.expert_map, self.block.num_groups
        group, order = torch.sort(expert_map.repeat_interleave(torch.tensor(sizes, device=expert_map.device)))
        sizes = torch.bincount(group, minlength=num_groups).tolist()
        return pair[order], token[order], weights[order], sizes, logits


def kind_of(experts, spec):
    """How the experts of a block are called.

    Raises:
        ValueError: for factors or constants of experts that cannot have them.
    """
    name, factors, constants = type(experts).__name__, spec.get("factors"), spec.get("constants")
    inputs_scaled, zero_experts = name == "Llama4TextExperts", getattr(experts, "zero_expert_num", 0)
    if constants and (inputs_scaled or zero_experts or hasattr(experts, "input_linear")):
        raise ValueError(f"constant outputs are not supported for {name}")
    if inputs_scaled:
        return ScaledInputs
    decorated = hasattr(experts, "is_concatenated")  # by transformers' `use_experts_implementation`
    if factors and not decorated:
        raise ValueError(f"factorised matrices are not supported for {name}")
    if decorated and (factors or constants):
        return Sorted
    return MappedBeforeZeroExperts if zero_experts else Mapped


def num_experts_of(experts):
    """E of an experts module as the family builds it."""
    names = ("num_experts", "num_routed_experts")
    counts = [getattr(experts, name) for name in names if isinstance(getattr(experts, name, None), int)]
    return counts[0] if counts else next(experts.parameters()).shape[0]


def replace(module, name, shape):
    """Put an empty tensor of another shape in the place of a parameter or buffer."""
    old = getattr(module, name)
    new = old.new_empty(shape)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else nn.Buffer(new))


def shrink_experts(experts, spec):
    """Give a block's experts the tensors that are stored."""
    num_experts, num_groups, factors = num_experts_of(experts), spec["groups"], spec.get("factors", {})
    kind, zero = kind_of(experts, spec), getattr(experts, "zero_expert_num", 0)
    experts.is_transposed = getattr(experts, "is_transposed", kind is ScaledInputs)
    if num_constants := spec.get("constants"):
        output = getattr(experts, "down_proj", None)
        width = experts.hidden_size if output is None else output.shape[2 if experts.is_transposed else 1]
        experts.constants = nn.Parameter(torch.zeros(num_constants, width))
    else:
        experts.constants = None
    for path, old in list(experts.named_parameters()):
        owner, _, name = path.rpartition(".")
        if path in factors:
            sizes = old.shape[:0:-1] if experts.is_transposed else old.shape[1:]
            delattr(experts, path)
            setattr(experts, path, Factors(num_groups, *sizes, *factors[path]))
        elif old.ndim > 1 and path != "constants":
            entries = zero if zero and old.shape[0] == num_experts + zero else 0
            block = (old.shape[0] - entries) // num_experts
            replace(experts.get_submodule(owner), name, (block * num_groups + entries, *old.shape[1:]))
    experts.register_buffer("expert_map", torch.arange(spec.get("rows", num_experts)) % num_groups)
    experts.num_groups = num_groups
    for name in ("num_experts", "num_routed_experts", "total_experts"):
        if isinstance(getattr(experts, name, None), int):
            setattr(experts, name, getattr(experts, name) + num_groups - num_experts)
    stock = type(experts)
    experts.__class__ = type(f"Msmoe{stock.__name__}", (kind, stock), {"__module__": __name__})
    return num_experts


def shrink_linears(block, linears, spec):
    """Give the linear layers that hold a block's experts the tensors that are stored."""
    if spec.get("factors") or spec.get("constants"):
        raise ValueError(f"factorised matrices and constant outputs are not supported for {type(block).__name__}")
    num_experts = block.router.num_experts
    for linear in linears:
        replace(linear, "weight", (spec["groups"], *linear.weight.shape[1:]))
        linear.num_experts = spec["groups"]
    block.register_buffer("expert_map", torch.arange(spec.get("rows", num_experts)) % spec["groups"])
    block.num_groups = spec["groups"]
    block.router.register_forward_hook(Regroup(block))
    return num_experts


def shrink_router(block, experts, router, num_lost):
    """Give a block's router the tensors that are stored, and the modules around it their number of rows."""
    shapes = {path: list(tensor.shape) for path, tensor in block.state_dict().items()}
    for path, (axis, size) in router.items():
        owner, _, name = path.rpartition(".")
        shapes[path][axis] = size
        replace(block.get_submodule(owner), name, shapes[path])
    inside = {module for each in experts for module in each.modules()}
    for module in (m for m in block.modules() if m not in inside):
        lower_counts(vars(module), COUNT_ATTRIBUTE, num_lost)
        if isinstance(getattr(module, "config", None), transformers.PreTrainedConfig):
            module.config = copy.copy(module.config)
            lower_counts(vars(module.config), COUNT_KEY, num_lost)


def lower_counts(values, names, num_lost):
    for name, value in values.items():
        if isinstance(value, int) and names.fullmatch(name):
            values[name] = value - num_lost


def shrink(model, blocks):
    """Give every MoE block of a freshly built model the tensors that its checkpoint stores."""
    for name, spec in blocks.items():
        block = model.get_submodule(name)
        if spec["experts"]:
            experts = [block.get_submodule(spec["experts"])]
            num_experts = shrink_experts(experts[0], spec)
        else:
            experts = [block.input_linear, block.output_linear]
            num_experts = shrink_linears(block, experts, spec)
        if "rows" in spec:
            shrink_router(block, experts, spec["router"], num_experts - spec["rows"])


def code(base, config):
    """The text of this file for a family, named by its model class and its configuration class."""
    text = re.sub(r'^BASE = ".*"$', f'BASE = "{base}"', FILE.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    return re.sub(r'^BASE_CONFIG = ".*"$', f'BASE_CONFIG = "{config}"', text, count=1, flags=re.MULTILINE)


def without_counts(config_dict):
    """A configuration without counts of experts in `per_layer_config`, which no family's model can build (5.24)."""
    counts = config_dict.get("per_layer_config") or {}
    others = {
        layer: rest
        for layer, values in counts.items()
        if (rest := {key: value for key, value in values.items() if not COUNT_KEY.fullmatch(key)})
    }
    if others == counts:
        return config_dict
    values = {key: value for key, value in config_dict.items() if key != "per_layer_config"}
    return values | ({"per_layer_config": others} if others else {})


def classes(base, base_config):
    """Configuration and model of a family's `exact` checkpoints, from its own model and configuration classes."""

    class MsmoeConfig(base_config):
        """The family's configuration, and what each MoE block stores (`msmoe`).

        On disk, `experts_implementation` says how to load the model: the family's own class, which would fill the
        experts with random numbers, stops there with that line.
        """

        @classmethod
        def from_dict(cls, config_dict, **options):
            values = dict(config_dict)
            if values.get("experts_implementation") == HOW_TO_LOAD:
                del values["experts_implementation"]
            return super().from_dict(without_counts(values), **options)

        def to_dict(self):
            return super().to_dict() | {"experts_implementation": HOW_TO_LOAD}

    class MsmoeForCausalLM(base):
        config_class = MsmoeConfig

        def __init__(self, config):
            super().__init__(config)
            shrink(self, config.msmoe["blocks"])

        @torch.no_grad()
        def _init_weights(self, module):
            if isinstance(module, Factors):
                for part in module.parameters():
                    init.normal_(part, std=0.02)
            else:
                super()._init_weights(module)

        @classmethod
        def is_custom_code(cls):
            """No: names on disk are the family's, and the library skips its rules for them in custom code (5.24)."""
            return False

        @classmethod
        def _can_set_attn_implementation(cls):  # the library looks for it in the source of the class
            return base._can_set_attn_implementation()

        @classmethod
        def _can_set_experts_implementation(cls):
            return base._can_set_experts_implementation()

        def save_pretrained(self, save_directory, *arguments, **options):
            """As ever, with the code beside the weights."""
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            text = code(base.__name__, base_config.__name__)
            (Path(save_directory) / FILE.name).write_text(text, encoding="utf-8")
            super().save_pretrained(save_directory, *arguments, **options)

    for made in (MsmoeConfig, MsmoeForCausalLM):
        made.__qualname__ = made.__name__
    return MsmoeConfig, MsmoeForCausalLM


MsmoeConfig, MsmoeForCausalLM = classes(getattr(transformers, BASE), getattr(transformers, BASE_CONFIG))
