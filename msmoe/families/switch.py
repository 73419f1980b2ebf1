"""Switch Transformer (`switch_transformers`): encoder and decoder alike, any depth and sparse step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msmoe.checkpoint.reader import FLOATS, Checkpoint, wider
from msmoe.errors import UserError
from msmoe.families.axes import Axis, SlicedTensor
from msmoe.families.protocol import ExactShape, FactorKeys, MoELayer, Routing, read_expert
from msmoe.families.switch_checks import HOW_TO_LOAD, check_config, check_maps, check_shapes
from msmoe.layer.stored import StoredPart

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from msmoe.layer.expert import Expert
    from msmoe.layer.routing import ExpertOutputs, Routed, SoftmaxTop1

ROUTER_SUFFIX = "mlp.router.classifier.weight"
ROUTER_PATTERN = re.compile(rf"((encoder|decoder)\.block\.(\d+)\.layer\.\d+\.mlp){re.escape(ROUTER_SUFFIX[3:])}")


ROLES = ("wi", "output")


class ExpertKeys(NamedTuple):
    """Names of an expert's two tensors."""

    wi: str
    wo: str


def single_parts(keys: ExpertKeys) -> tuple[StoredPart, ...]:
    """An expert in two tensors of its own."""
    return StoredPart(keys.wi, None, ("wi",)), StoredPart(keys.wo, None, ("output",))


def bias_key(layer: str) -> str:
    """Tensor name of the router biases (E,), stored by few checkpoints."""
    return f"{layer}.router.classifier.bias"


class SwitchFamily:
    """Adapter of transformers' Switch classes.

    Which blocks are sparse is read from the tensor names: the configuration's counts are rounded to a step
    (4 layers with 3 sparse ones are 4 sparse layers, transformers 5.23).
    """

    model_type = "switch_transformers"
    compressed_model_type = "msmoe_switch_transformers"

    exports = ("exact", "native", "dense")
    is_causal = False

    def owns(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.model_type in (self.model_type, self.compressed_model_type)

    def is_exact(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.model_type == self.compressed_model_type

    def keeps_routing(self, checkpoint: Checkpoint) -> bool:
        return not (checkpoint.config.get("router_rows") or checkpoint.config.get("constants"))

    def check(self, checkpoint: Checkpoint) -> None:
        check_config(checkpoint)
        check_shapes(checkpoint)
        if checkpoint.model_type == self.compressed_model_type:
            check_maps(self, checkpoint)

    def layers(self, checkpoint: Checkpoint) -> tuple[MoELayer, ...]:
        layers = []
        for match in self._routers(checkpoint):
            name = match[1]
            num_experts, d_model = checkpoint.spec(match[0]).shape
            d_ff = checkpoint.spec(self.expert_keys(name, 0).wi).shape[0]
            layers.append(
                MoELayer(name, num_experts, d_model, d_ff, self._expert_dtypes(checkpoint, name, num_experts))
            )
        return tuple(layers)

    def _routers(self, checkpoint: Checkpoint) -> list[re.Match]:
        """Router tensors in forward order; group 1 is the layer's name."""
        found = [match for name in checkpoint if (match := ROUTER_PATTERN.fullmatch(name))]
        return sorted(found, key=lambda m: (m[2] != "encoder", int(m[3])))

    def _expert_dtypes(self, checkpoint: Checkpoint, layer: str, num_experts: int) -> dict[str, str]:
        """Dtypes that hold the `wi` and the `wo` of all experts of a layer, by role."""
        found: list[set[str]] = [set(), set()]
        for e in range(num_experts):
            keys = self.expert_keys(layer, e)
            if keys.wi.replace(".weight", ".bias") in checkpoint:
                raise UserError(f"experts of {layer} have biases, which the Switch adapter does not support")
            for dtypes, key in zip(found, keys, strict=True):
                dtypes.add(checkpoint.spec(key).dtype)
                if checkpoint.spec(key).dtype not in FLOATS:
                    raise UserError(f"{key} is {checkpoint.spec(key).dtype}, expected one of {', '.join(FLOATS)}")
        return dict(zip(ROLES, (wider(*dtypes) for dtypes in found), strict=True))

    def stored_layers(self, checkpoint: Checkpoint) -> tuple[tuple[MoELayer, int], ...]:
        if checkpoint.model_type == self.model_type:
            return tuple((layer, layer.num_experts) for layer in self.layers(checkpoint))
        stored = []
        for match in self._routers(checkpoint):
            num_experts, d_model = checkpoint.spec(match[0]).shape
            wi, wo = (checkpoint.spec(self._first_part(checkpoint, match[1], matrix)) for matrix in ExpertKeys._fields)
            dtypes = dict(zip(ROLES, (wi.dtype, wo.dtype), strict=True))
            layer = MoELayer(match[1], num_experts, d_model, wi.shape[1], dtypes)
            stored.append((layer, wi.shape[0]))
        return tuple(stored)

    def _first_part(self, checkpoint: Checkpoint, layer: str, matrix: str) -> str:
        """Name of the stack of a matrix, or of the first of its factors."""
        factors = self.factor_keys(checkpoint, layer, matrix)
        return factors.u if factors.u in checkpoint else getattr(self.stacked_keys(layer), matrix)

    def part(self, name: str) -> str:
        if name.endswith(".rows"):
            return "row indices"
        if ".experts." in name:
            return "experts"
        if name.endswith(".expert_map"):
            return "expert maps"
        if ".router." in name:
            return "routers"
        if "Attention" in name:
            return "attention"
        if name.startswith(("shared.", "lm_head.")) or "embed_tokens" in name:
            return "embeddings"
        return "dense feed-forward" if ".mlp." in name else "norms"

    def default_kept_layers(self, layers: tuple[MoELayer, ...]) -> tuple[str, ...]:
        return tuple([layer.name for layer in layers if layer.name.startswith("encoder.")][:1])

    def expert_keys(self, layer: str, expert: int) -> ExpertKeys:
        prefix = f"{layer}.experts.expert_{expert}"
        return ExpertKeys(f"{prefix}.wi.weight", f"{prefix}.wo.weight")

    def parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        return single_parts(self.expert_keys(layer, expert))

    def parts_of(self, checkpoint: Checkpoint, layer: str, index: int, count: int) -> tuple[StoredPart, ...]:
        return self.parts(checkpoint, layer, index)

    def exact_parts(self, checkpoint: Checkpoint, layer: str, index: int, count: int) -> tuple[StoredPart, ...]:
        stacked = self.stacked_keys(layer)
        return StoredPart(stacked.wi, index, ("wi",)), StoredPart(stacked.wo, index, ("output",))

    def memory_parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        return self.parts(checkpoint, layer, expert)

    def behind(self, checkpoint: Checkpoint, layer: str, count: int) -> list[tuple[StoredPart, StoredPart]]:
        return []

    def load_expert(self, checkpoint: Checkpoint, layer: str, index: int) -> Expert:
        from msmoe.layer.expert import RELU

        if not self.is_exact(checkpoint):
            return read_expert(checkpoint, self.parts(checkpoint, layer, index), RELU)
        factors = {matrix: self.factor_keys(checkpoint, layer, matrix) for matrix in ExpertKeys._fields}
        roles = dict(zip(factors, ((role,) for role in ROLES), strict=True))
        parts = self.exact_parts(checkpoint, layer, index, 1)
        return read_expert(checkpoint, parts, RELU, factors=factors, roles=roles, index=index)

    def sliced(self, checkpoint: Checkpoint) -> tuple[SlicedTensor, ...]:
        layers = [match[1] for match in self._routers(checkpoint)]
        keys = [(key, layer) for layer in layers for key in (self.router_key(checkpoint, layer), bias_key(layer))]
        return tuple(SlicedTensor(key, ((layer, Axis(0, 1)),)) for key, layer in keys if key in checkpoint)

    def numbers(self, checkpoint: Checkpoint) -> dict[str, str]:
        return {}

    def renumbered(self, checkpoint: Checkpoint, layer: str, table: Tensor, kept: Sequence[int]) -> Tensor:
        raise ValueError("no tensor of a Switch Transformer names experts by number")

    def router_key(self, checkpoint: Checkpoint, layer: str) -> str:
        return f"{layer}.router.classifier.weight"

    def router(self, checkpoint: Checkpoint, layer: str) -> SoftmaxTop1:
        from msmoe.layer.routing import SoftmaxTop1

        bias = checkpoint.read_finite(bias_key(layer)) if bias_key(layer) in checkpoint else None
        return SoftmaxTop1(checkpoint.read_finite(self.router_key(checkpoint, layer)), bias)

    def stacked_keys(self, layer: str) -> ExpertKeys:
        return ExpertKeys(f"{layer}.experts.wi", f"{layer}.experts.wo")

    def factor_keys(self, checkpoint: Checkpoint, layer: str, matrix: str) -> FactorKeys:
        return FactorKeys(*(f"{layer}.experts.{matrix}.{part}" for part in ("U", "V", "S", "rows")))

    def expert_map_key(self, checkpoint: Checkpoint, layer: str) -> str:
        return f"{layer}.expert_map"

    def constants_key(self, checkpoint: Checkpoint, layer: str) -> str:
        return f"{layer}.experts.constants"

    def dense_parts(self, layer: str) -> tuple[StoredPart, ...]:
        dense = layer.removesuffix("mlp") + "DenseReluDense"
        return single_parts(ExpertKeys(f"{dense}.wi.weight", f"{dense}.wo.weight"))

    def dense_name(self, name: str) -> str:
        return name.replace(".mlp.wi.", ".DenseReluDense.wi.").replace(".mlp.wo.", ".DenseReluDense.wo.")

    def check_export(self, checkpoint: Checkpoint, kind: str, kept: Mapping[str, Sequence[int]]) -> None:
        counts = {name: len(experts) for name, experts in kept.items()}
        if kind == "exact":
            return
        if kind == "dense" and set(counts.values()) != {1}:
            raise UserError(
                "--export dense needs one expert in every MoE layer: plan with --experts 1 --keep-layer none"
            )
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(
                "--export native needs the same number of experts in every MoE layer: plan with "
                f"--budget uniform --keep-layer none (the plan has {shown})"
            )
        if kind == "native" and any(bias_key(name) in checkpoint for name in counts):
            raise UserError("--export native does not support router biases: use --export exact")

    def dropped(self, checkpoint: Checkpoint) -> dict[str, str]:
        return {}

    def exact_config(self, checkpoint: Checkpoint, shape: ExactShape) -> dict:
        factors = {
            layer: {matrix: list(sizes) for matrix, sizes in matrices.items()}
            for layer, matrices in shape.factors.items()
        }
        return checkpoint.config | {
            "model_type": self.model_type,
            "compressed_model_type": self.compressed_model_type,
            "dense_act_fn": HOW_TO_LOAD,
            "architectures": ["MsmoeSwitchForConditionalGeneration"],
            "auto_map": {
                "AutoConfig": "configuration_msmoe.MsmoeSwitchConfig",
                "AutoModel": "modeling_msmoe.MsmoeSwitchModel",
                "AutoModelForSeq2SeqLM": "modeling_msmoe.MsmoeSwitchForConditionalGeneration",
            },
            "moe_layers": dict(shape.num_groups),
            **({"factors": factors} if factors else {}),
            **({"router_rows": dict(shape.num_rows)} if shape.num_rows else {}),
            **({"constants": dict(shape.num_constants)} if shape.num_constants else {}),
        }

    def native_config(self, checkpoint: Checkpoint, num_groups: int) -> dict:
        config = checkpoint.config
        num_experts, capacity = config.get("num_experts", 8), config.get("expert_capacity", 64)
        return config | {
            "num_experts": num_groups,
            "expert_capacity": math.ceil(capacity * num_experts / num_groups),
        }

    def dense_config(self, checkpoint: Checkpoint) -> dict:
        config = checkpoint.config
        shared = {
            "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12,
            "num_heads": 12, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
            "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0, "tie_word_embeddings": True,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "use_cache": True, "dtype": None,
        }  # fmt: skip
        kept = {key: config.get(key, default) for key, default in shared.items()}
        return kept | {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "is_encoder_decoder": True,
            "feed_forward_proj": "relu",
            "scale_decoder_outputs": kept["tie_word_embeddings"],
        }

    def code_files(self, checkpoint: Checkpoint) -> dict[str, str]:
        folder = Path(__file__).parent.parent / "formats" / "modeling"
        names = "configuration_msmoe.py", "modeling_msmoe.py"
        return {name: (folder / name).read_text(encoding="utf-8") for name in names}

    def load_model(self, path: Path, *, dtype: torch.dtype) -> Any:
        from msmoe.families.loading import load

        return load(path, dtype=dtype)

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        source_mask, target_mask = batch["attention_mask"], batch["labels"] != -100
        yield source_mask.bool()
        encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=source_mask)
        yield target_mask
        model.decoder(
            input_ids=model._shift_right(batch["labels"]),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=source_mask,
            use_cache=False,
        )

    def routers(self, model: nn.Module) -> dict[str, nn.Module]:
        return {
            name.removesuffix(".router"): module
            for name, module in model.named_modules()
            if name.endswith(".mlp.router")
        }

    def narrow_router(
        self, model: nn.Module, layer: str, experts: Sequence[int], router: SoftmaxTop1, *, config: dict
    ) -> None:
        import torch

        module = self.routers(model)[layer]
        classifier, chosen = module.classifier, list(experts)
        bias = torch.full((classifier.out_features,), -torch.inf)
        bias[chosen] = 0.0 if router.bias is None else router.bias
        with torch.no_grad():
            classifier.weight[chosen] = router.rows.to(classifier.weight.dtype)
        classifier.bias = torch.nn.Parameter(bias.to(classifier.weight.dtype), requires_grad=False)
        module.expert_capacity = config.get("expert_capacity", module.expert_capacity)

    def routing(self, inputs: tuple, outputs: tuple) -> Routing:
        dispatch, gate, logits = outputs
        if (logits.amin() >= 0) & (logits.amax() <= 1) & ((logits.sum(-1) - 1).abs().amax() < 1e-3):
            raise UserError(
                "this version of transformers reports router probabilities in place of logits; use 5.23 or later"
            )
        return Routing(inputs[0], logits, gate.squeeze(-1), dispatch.any(-1))

    def listen(self, model: nn.Module, hear: Callable[[str, Routed], None]) -> ExitStack:
        from msmoe.layer.routing import Routed

        def hook(name: str):
            def tell(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
                routing = self.routing(inputs, outputs)
                given, logits = routing.inputs.flatten(0, 1), routing.logits.flatten(0, 1)
                experts, gate = logits.argmax(-1, keepdim=True), routing.gate.reshape(-1, 1)
                hear(name, Routed(given, experts, gate, logits, given, routing.dispatched.reshape(-1, 1)))

            return tell

        stack = ExitStack()
        for name, router in self.routers(model).items():
            stack.callback(router.register_forward_hook(hook(name)).remove)
        return stack

    def expert_outputs(self, model: nn.Module) -> ExpertOutputs:
        from msmoe.layer.routing import ExpertOutputs

        return ExpertOutputs(layers={name: model.get_submodule(name) for name in self.routers(model)})

    def layer_output(self, outputs: Any) -> Tensor:
        return outputs

    def with_layer_output(self, outputs: Any, given: Tensor) -> Any:
        return given
