"""Stats: what calibration saw. Sums over tokens, so two of them add up; `stats.json` and `stats.safetensors`.

Shapes: E experts, D d_model, S sampled tokens.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msmoe.calibration.records import OTHER
from msmoe.calibration.sample import TokenSample
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.files import Output
from msmoe.places import STATISTICS

FORMAT = "msmoe-stats/1"
SUMS = ("soft_mass", "router_logits_gram", "input_sum", "input_abs_sum", "input_square_sum")
OUTPUT_SUMS = ("output_norm_sum", "gated_norm_sum", "output_square_sum", "output_sum")
STORED = (*SUMS, "sequence_counts")
OPTIONAL = (*OUTPUT_SUMS, "gradient_gram", "weight_gradient_gram")
SAMPLE_FIELDS = tuple(f.name for f in fields(TokenSample))
DOMAINS = "domain_routed"  # (domains, E), in the order of their names in stats.json
GRADIENT = "output_gradient"  # of the sample; statistics without it are older or had no use for it


@dataclass(frozen=True)
class LayerStats:
    """Sums over the valid tokens of one layer.

    Attributes:
        routed, dispatched: (E,) int64 tokens by routed expert, before and after capacity.
        gate_mass: (E,) float64 sum of the gate values of each expert's routed tokens.
        soft_mass: (E,) float64 sum of the router probabilities.
        router_logits_gram: (E, E) float64 sum of h h^T over router logits h.
        input_sum, input_abs_sum, input_square_sum: (E, D) float64 sums of x, |x|, x^2 over routed tokens.
        sequence_counts: (N, E) int32 routed tokens of each of N sequences, rows sorted: what capacity acts on.
        sample: the token sample, or how to read it.
        sample_size: the bound under which the sample was drawn.
        output_norm_sum, gated_norm_sum, output_square_sum: (E,) float64 sums of |f|, g |f| and |f|^2 over dispatched
            tokens, f being the expert's output before the gate g; output_sum: (E, D) float64 sum of f. None in
            statistics that were made before these were recorded.
        gradient_gram, weight_gradient_gram: (E, E) float64 inner products of the experts' loss gradients, and of
            gradient times weight; only where asked for.
        domain_routed: domain -> (E,) int64 routed tokens of its records, names ascending; they sum to `routed`. Empty
            for data without domains.
    """

    routed: Tensor
    dispatched: Tensor
    gate_mass: Tensor
    soft_mass: Tensor
    router_logits_gram: Tensor
    input_sum: Tensor
    input_abs_sum: Tensor
    input_square_sum: Tensor
    sequence_counts: Tensor
    sample: TokenSample | Callable[[], TokenSample]
    sample_size: int
    output_norm_sum: Tensor | None = None
    gated_norm_sum: Tensor | None = None
    output_square_sum: Tensor | None = None
    output_sum: Tensor | None = None
    gradient_gram: Tensor | None = None
    weight_gradient_gram: Tensor | None = None
    domain_routed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return len(self.routed)

    @property
    def num_tokens(self) -> int:
        return int(self.routed.sum())

    @property
    def dropped(self) -> int:
        return int((self.routed - self.dispatched).sum())

    @property
    def usage_frequency(self) -> Tensor:
        """(E,) float64, sums to 1; uniform for a layer that saw no token."""
        return frequency(self.routed)

    @property
    def has_output_gradients(self) -> bool:
        """Whether gradients at the layer's outputs were recorded."""
        return self.tokens().output_gradient.shape[1] > 0

    def tokens(self) -> TokenSample:
        """The token sample, read from disk if need be."""
        return self.sample() if callable(self.sample) else self.sample

    def __add__(self, other: "LayerStats") -> "LayerStats":
        if self.gradient_gram is not None or other.gradient_gram is not None:
            warnings.warn("gradient similarities do not add up: the sum has none", stacklevel=3)
        if self.has_output_gradients != other.has_output_gradients:
            warnings.warn("only one side has output gradients: the sum has none", stacklevel=3)
        size = min(self.sample_size, other.sample_size)
        sample = TokenSample.concatenate([self.tokens(), other.tokens()]).drawn(size, self.num_experts)
        names = ["routed", "dispatched", "gate_mass", *SUMS]
        if self.output_sum is not None and other.output_sum is not None:
            names += OUTPUT_SUMS
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        sequences = sort_rows(torch.cat([self.sequence_counts, other.sequence_counts]))
        return LayerStats(
            **sums,
            sequence_counts=sequences,
            sample=sample,
            sample_size=size,
            domain_routed=self._added_domains(other),
        )

    def _added_domains(self, other: "LayerStats") -> dict[str, Tensor]:
        """Routed tokens per domain of both sides together; a side without domains counts as the domain `other`."""
        if not self.domain_routed and not other.domain_routed:
            return {}
        sides = [side.domain_routed or {OTHER: side.routed} for side in (self, other)]
        names = sorted({*sides[0], *sides[1]})
        return {name: torch.stack([side[name] for side in sides if name in side]).sum(0) for name in names}

    def drop_rate(self, expert_map: Tensor, capacity: int) -> float:
        """Share of routed tokens over capacity if each group of experts had `capacity` places per sequence.

        Args:
            expert_map: (E,) group of each expert.
        """
        groups = torch.zeros(len(self.sequence_counts), int(expert_map.max()) + 1, dtype=torch.int64)
        groups.index_add_(1, expert_map, self.sequence_counts.long())
        return float((groups - capacity).clamp(min=0).sum()) / max(self.num_tokens, 1)


@dataclass(frozen=True)
class Stats:
    """Statistics of a checkpoint on calibration data.

    Attributes:
        layers: MoE layer name -> its sums, in forward order.
        data: source, num_records, num_tokens and sha256 of the calibration data; of a sum, the digests of its `parts`;
            `domains`, where there are any:
            name -> num_records and num_tokens, names ascending.
        checkpoint: model_type and fingerprint of the checkpoint.
    """

    layers: Mapping[str, LayerStats]
    data: dict
    checkpoint: dict[str, str]

    def __add__(self, other: "Stats") -> "Stats":
        """Statistics of both data sets together; domains add up by name.

        If only one side has domains, the other side's tokens count as the domain `other`.

        Raises:
            UserError: if they come from different checkpoints.
        """
        if self.checkpoint != other.checkpoint:
            raise UserError("statistics of different checkpoints do not add up (fingerprints differ)")
        data = {
            "source": f"{self.data['source']} + {other.data['source']}",
            "num_records": self.data["num_records"] + other.data["num_records"],
            "num_tokens": self.data["num_tokens"] + other.data["num_tokens"],
            "sha256": sha256("".join(sorted([self.data["sha256"], other.data["sha256"]])).encode()).hexdigest(),
            "parts": sorted(self.covers | other.covers),
            **_added_domains(self.data, other.data),
        }
        return Stats({name: layer + other.layers[name] for name, layer in self.layers.items()}, data, self.checkpoint)

    @property
    def covers(self) -> frozenset[str]:
        """Digests of these statistics, or of those that they are the sum of."""
        return frozenset(self.data.get("parts", ())) or frozenset([self.digest])

    @property
    def reference(self) -> dict:
        """How plans and checkpoints name the statistics that they were made from."""
        parts = self.data.get("parts")
        return {"sha256": self.digest, **({"parts": parts} if parts else {})}

    def check_against(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` if the statistics are of another checkpoint."""
        if self.checkpoint.get("fingerprint") != checkpoint.fingerprint:
            raise UserError(f"the statistics are of another checkpoint than {checkpoint.path} (fingerprints differ)")

    def describe(self) -> dict:
        """Content of `stats.json`."""
        layers = {
            name: {
                "num_experts": layer.num_experts,
                "num_tokens": layer.num_tokens,
                "routed": layer.routed.tolist(),
                "dispatched": layer.dispatched.tolist(),
                "dropped": layer.dropped,
                "usage_frequency": layer.usage_frequency.tolist(),
                "gate_mass": layer.gate_mass.tolist(),
                "sample_size": layer.sample_size,
            }
            for name, layer in self.layers.items()
        }
        return {"format": FORMAT, "data": self.data, "checkpoint": self.checkpoint, "layers": layers}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the sums and the identity of the sampled tokens."""
        digest = sha256(json.dumps(self.describe() | {"data": self.data["sha256"]}).encode())
        if domains := self.data.get("domains"):
            digest.update(json.dumps(domains).encode())
        for layer in self.layers.values():
            digest.update(layer.router_logits_gram.numpy().tobytes())
            for counts in layer.domain_routed.values():
                digest.update(counts.numpy().tobytes())
            sample = layer.tokens()
            digest.update(sample.key.numpy().tobytes())
            if sample.output_gradient.shape[1]:
                digest.update(sample.has_gradient.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the statistics directory, complete or not at all.

        Args:
            force: replace an existing statistics directory.

        Raises:
            UserError: if it exists and `force` is not given, is something else, or cannot be written.
        """
        with Output(path, STATISTICS, force=force) as output:
            save_file(self._tensors(), output.content / "stats.safetensors")
            text = json.dumps(self.describe(), indent=1) + "\n"
            (output.content / "stats.json").write_text(text, encoding="utf-8")
            output.commit()

    def _tensors(self) -> dict[str, Tensor]:
        """What `stats.safetensors` holds."""
        tensors = {}
        for name, layer in self.layers.items():
            for key in (*STORED, *OPTIONAL):
                if (value := getattr(layer, key)) is not None:
                    tensors[f"{name}/{key}"] = value.contiguous()
            if layer.domain_routed:
                tensors[f"{name}/{DOMAINS}"] = torch.stack(list(layer.domain_routed.values()))
            sample = layer.tokens()
            for key in SAMPLE_FIELDS:
                tensors[f"{name}/sample/{key}"] = getattr(sample, key).contiguous()
            tensors[f"{name}/sample/weight"] = sample.weights(layer.dispatched)
            tensors[f"{name}/sample/held_out"] = sample.held_out
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read a statistics directory; token samples stay on disk until they are asked for.

        Raises:
            UserError: if it is missing, truncated or no statistics directory.
        """
        path = Path(path)
        try:
            content = json.loads((path / "stats.json").read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise UserError(f"{path} is not a statistics directory of format {FORMAT}")
            file = path / "stats.safetensors"
            domains = list(content["data"].get("domains", {}))
            layers = {name: _load_layer(file, name, entry, domains) for name, entry in content["layers"].items()}
            return cls(layers, content["data"], content["checkpoint"])
        except OSError as error:
            raise UserError(f"{path} is not a statistics directory: {error}") from error
        except (KeyError, AttributeError, ValueError, TypeError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} holds damaged statistics: {error}") from error

    def to_frame(self):
        """A pandas DataFrame, one row per (layer, expert), layers in forward order.

        Columns:
            layer: name of the MoE layer.
            expert: index, 0 to E - 1.
            routed: tokens whose largest router logit is this expert's.
            dispatched: tokens that the expert took within its capacity, 0 to `routed`.
            dropped: tokens over its capacity, `routed` - `dispatched`.
            usage_frequency: share of the layer's routed tokens, 0 to 1; sums to 1 over a layer, uniform if it saw none.
            gate_mass: sum of the gate values of the routed tokens, 0 to `routed`.
            soft_mass: sum of the router's probabilities over all tokens of the layer, 0 to their number.
        """
        import pandas as pd

        return pd.concat(
            pd.DataFrame(
                {
                    "layer": name,
                    "expert": range(layer.num_experts),
                    "routed": layer.routed.numpy(),
                    "dispatched": layer.dispatched.numpy(),
                    "dropped": (layer.routed - layer.dispatched).numpy(),
                    "usage_frequency": layer.usage_frequency.numpy(),
                    "gate_mass": layer.gate_mass.numpy(),
                    "soft_mass": layer.soft_mass.numpy(),
                }
            )
            for name, layer in self.layers.items()
        ).reset_index(drop=True)

    def domain_frame(self):
        """A pandas DataFrame, one row per (domain, layer, expert); no row for data without domains.

        Columns:
            domain: name, ascending.
            layer: name of the MoE layer, in forward order.
            expert: index, 0 to E - 1.
            routed: tokens of the domain whose largest router logit is this expert's; summed over domains, the `routed`
                of `to_frame`.
            usage_frequency: share of the domain's routed tokens in the layer, 0 to 1; sums to 1 over a domain and
                layer, uniform if it has no token there.
        """
        import pandas as pd

        columns = ["domain", "layer", "expert", "routed", "usage_frequency"]
        rows = [
            (domain, name, expert, *values)
            for domain in self.data.get("domains", {})
            for name, layer in self.layers.items()
            for expert, values in enumerate(_counts_and_shares(layer.domain_routed[domain]))
        ]
        frame = pd.DataFrame(rows, columns=pd.Index(columns))
        return frame.astype({"expert": "int64", "routed": "int64", "usage_frequency": "float64"})


def frequency(counts: Tensor) -> Tensor:
    """Share of each count (E,) in their sum, float64; uniform if all are zero."""
    total = int(counts.sum())
    if total == 0:
        return torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    return counts.double() / total


def _counts_and_shares(counts: Tensor) -> list[tuple[int, float]]:
    return list(zip(counts.tolist(), frequency(counts).tolist(), strict=True))


def _added_domains(a: dict, b: dict) -> dict[str, dict]:
    """The `domains` of two descriptions of data together; one without any counts as the domain `other`."""
    if not a.get("domains") and not b.get("domains"):
        return {}
    keys = ("num_records", "num_tokens")
    sides = [side.get("domains") or {OTHER: {key: side[key] for key in keys}} for side in (a, b)]
    names = sorted({*sides[0], *sides[1]})
    return {"domains": {name: {key: sum(s[name][key] for s in sides if name in s) for key in keys} for name in names}}


def _load_layer(file: Path, name: str, entry: dict, domains: Sequence[str]) -> LayerStats:
    def read_sample() -> TokenSample:
        with safe_open(file, "pt") as tensors:
            stored = {key: tensors.get_tensor(f"{name}/sample/{key}") for key in SAMPLE_FIELDS if key != GRADIENT}
            key = f"{name}/sample/{GRADIENT}"
            gradient = tensors.get_tensor(key) if key in tensors.keys() else torch.empty(len(stored["key"]), 0)  # noqa: SIM118
            return TokenSample(**stored, output_gradient=gradient)

    with safe_open(file, "pt") as tensors:
        stored = {key: tensors.get_tensor(f"{name}/{key}") for key in STORED}
        names = set(tensors.keys())
        optional = {key: tensors.get_tensor(f"{name}/{key}") for key in OPTIONAL if f"{name}/{key}" in names}
        domain_routed = tensors.get_tensor(f"{name}/{DOMAINS}") if domains else ()
    return LayerStats(
        routed=torch.tensor(entry["routed"]),
        dispatched=torch.tensor(entry["dispatched"]),
        gate_mass=torch.tensor(entry["gate_mass"], dtype=torch.float64),
        **stored,
        **optional,
        sample=read_sample,
        sample_size=int(entry["sample_size"]),
        domain_routed=dict(zip(domains, domain_routed, strict=True)),
    )


def with_gradients(layer: LayerStats, gradient_gram: Tensor, weight_gradient_gram: Tensor) -> LayerStats:
    """The same statistics with the Gram matrices (E, E) of the experts' loss gradients."""
    return replace(layer, gradient_gram=gradient_gram, weight_gradient_gram=weight_gradient_gram)


def with_output_gradient(layer: LayerStats, gradient: Tensor) -> LayerStats:
    """The same statistics with the gradient (S, D) at the layer's output of every sampled token, NaN where unknown."""
    return replace(layer, sample=replace(layer.tokens(), output_gradient=gradient))


def sort_rows(matrix: Tensor) -> Tensor:
    """Rows of an integer matrix in lexicographic order."""
    return matrix[torch.from_numpy(np.lexsort(matrix.numpy().T[::-1]))]
