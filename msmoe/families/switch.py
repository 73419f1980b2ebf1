"""Switch Transformer (`switch_transformers`): encoder and decoder alike, any depth and sparse step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msmoe.checkpoint.reader import FLOATS, Checkpoint, wider
from msmoe.errors import UserError
from msmoe.families.protocol import MATRICES, ExpertKeys, FactorKeys, MoELayer, Routing
from msmoe.families.switch_checks import HOW_TO_LOAD, check_config, check_maps, check_shapes
from msmoe.lowrank.shapes import FactorShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from msmoe.layer.routing import ExpertOutputs, Routed, SoftmaxTop1

ROUTER_SUFFIX = "mlp.router.classifier.weight"
ROUTER_PATTERN = re.compile(rf"((encoder|decoder)\.block\.(\d+)\.layer\.\d+\.mlp){re.escape(ROUTER_SUFFIX[3:])}")


class SwitchFamily:
    """Adapter of transformers' Switch classes.

    Which blocks are sparse is read from the tensor names: the configuration's counts are rounded to a step
    (4 layers with 3 sparse ones are 4 sparse layers, transformers 5.23).
    """

    model_type = "switch_transformers"
    compressed_model_type = "msmoe_switch_transformers"

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

    def _expert_dtypes(self, checkpoint: Checkpoint, layer: str, num_experts: int) -> ExpertKeys:
        """Dtypes that hold the `wi` and the `wo` of all experts of a layer."""
        found: list[set[str]] = [set(), set()]
        for e in range(num_experts):
            keys = self.expert_keys(layer, e)
            if keys.wi.replace(".weight", ".bias") in checkpoint:
                raise UserError(f"experts of {layer} have biases, which the Switch adapter does not support")
            for dtypes, key in zip(found, keys, strict=True):
                dtypes.add(checkpoint.spec(key).dtype)
                if checkpoint.spec(key).dtype not in FLOATS:
                    raise UserError(f"{key} is {checkpoint.spec(key).dtype}, expected one of {', '.join(FLOATS)}")
        return ExpertKeys(*(wider(*dtypes) for dtypes in found))

    def stored_layers(self, checkpoint: Checkpoint) -> tuple[tuple[MoELayer, int], ...]:
        if checkpoint.model_type == self.model_type:
            return tuple((layer, layer.num_experts) for layer in self.layers(checkpoint))
        stored = []
        for match in self._routers(checkpoint):
            num_experts, d_model = checkpoint.spec(match[0]).shape
            wi, wo = (checkpoint.spec(self._first_part(checkpoint, match[1], matrix)) for matrix in MATRICES)
            layer = MoELayer(match[1], num_experts, d_model, wi.shape[1], ExpertKeys(wi.dtype, wo.dtype))
            stored.append((layer, wi.shape[0]))
        return tuple(stored)

    def _first_part(self, checkpoint: Checkpoint, layer: str, matrix: str) -> str:
        """Name of the stack of a matrix, or of the first of its factors."""
        factors = self.factor_keys(layer, matrix)
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

    def router(self, checkpoint: Checkpoint, layer: str) -> SoftmaxTop1:
        from msmoe.layer.routing import SoftmaxTop1

        bias = self.router_bias_key(layer)
        rows = checkpoint.read_finite(self.router_key(layer))
        return SoftmaxTop1(rows, checkpoint.read_finite(bias) if bias in checkpoint else None)

    def router_key(self, layer: str) -> str:
        return f"{layer}.router.classifier.weight"

    def router_bias_key(self, layer: str) -> str:
        return f"{layer}.router.classifier.bias"

    def stacked_keys(self, layer: str) -> ExpertKeys:
        return ExpertKeys(f"{layer}.experts.wi", f"{layer}.experts.wo")

    def factor_keys(self, layer: str, matrix: str) -> FactorKeys:
        return FactorKeys(*(f"{layer}.experts.{matrix}.{part}" for part in ("U", "V", "S", "rows")))

    def expert_map_key(self, layer: str) -> str:
        return f"{layer}.expert_map"

    def constants_key(self, layer: str) -> str:
        return f"{layer}.experts.constants"

    def dense_keys(self, layer: str) -> ExpertKeys:
        dense = layer.removesuffix("mlp") + "DenseReluDense"
        return ExpertKeys(f"{dense}.wi.weight", f"{dense}.wo.weight")

    def dense_name(self, name: str) -> str:
        return name.replace(".mlp.wi.", ".DenseReluDense.wi.").replace(".mlp.wo.", ".DenseReluDense.wo.")

    def exact_config(
        self,
        config: dict,
        num_groups: dict[str, int],
        factors: dict[str, dict[str, FactorShape]],
        *,
        num_rows: dict[str, int] | None = None,
        num_constants: dict[str, int] | None = None,
    ) -> dict:
        shapes = {
            layer: {matrix: list(shape) for matrix, shape in matrices.items()} for layer, matrices in factors.items()
        }
        return config | {
            "model_type": self.model_type,
            "compressed_model_type": self.compressed_model_type,
            "dense_act_fn": HOW_TO_LOAD,
            "architectures": ["MsmoeSwitchForConditionalGeneration"],
            "auto_map": {
                "AutoConfig": "configuration_msmoe.MsmoeSwitchConfig",
                "AutoModel": "modeling_msmoe.MsmoeSwitchModel",
                "AutoModelForSeq2SeqLM": "modeling_msmoe.MsmoeSwitchForConditionalGeneration",
            },
            "moe_layers": num_groups,
            **({"factors": shapes} if shapes else {}),
            **({"router_rows": num_rows} if num_rows else {}),
            **({"constants": num_constants} if num_constants else {}),
        }

    def native_config(self, config: dict, num_groups: int) -> dict:
        num_experts, capacity = config.get("num_experts", 8), config.get("expert_capacity", 64)
        return config | {
            "num_experts": num_groups,
            "expert_capacity": math.ceil(capacity * num_experts / num_groups),
        }

    def dense_config(self, config: dict) -> dict:
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

    def code_files(self) -> tuple[Path, ...]:
        folder = Path(__file__).parent.parent / "formats" / "modeling"
        return folder / "configuration_msmoe.py", folder / "modeling_msmoe.py"

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
