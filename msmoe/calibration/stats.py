"""Stats: what calibration saw. Sums over tokens, so two of them add up; `stats.json` and `stats.safetensors`.

Shapes: E experts, D d_model, S sampled tokens.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msmoe.calibration.records import OTHER
from msmoe.calibration.stored import DOMAINS, FORMAT, StoredLayer, read_statistics
from msmoe.errors import UserError, warn
from msmoe.layer.tokens import TokenSample
from msmoe.places import STATISTICS
from msmoe.tables import html_table

if TYPE_CHECKING:
    from torch import Tensor

    from msmoe.checkpoint import Checkpoint

SUMS = ("soft_mass", "router_logits_gram", "input_sum", "input_abs_sum", "input_square_sum")
OUTPUT_SUMS = ("output_norm_sum", "gated_norm_sum", "output_square_sum", "output_sum")
STORED = (*SUMS, "sequence_counts")
OPTIONAL = (*OUTPUT_SUMS, "gradient_gram", "weight_gradient_gram")


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

    routed: "Tensor"
    dispatched: "Tensor"
    gate_mass: "Tensor"
    soft_mass: "Tensor"
    router_logits_gram: "Tensor"
    input_sum: "Tensor"
    input_abs_sum: "Tensor"
    input_square_sum: "Tensor"
    sequence_counts: "Tensor"
    sample: TokenSample | Callable[[], TokenSample]
    sample_size: int
    output_norm_sum: "Tensor | None" = None
    gated_norm_sum: "Tensor | None" = None
    output_square_sum: "Tensor | None" = None
    output_sum: "Tensor | None" = None
    gradient_gram: "Tensor | None" = None
    weight_gradient_gram: "Tensor | None" = None
    domain_routed: "Mapping[str, Tensor]" = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return len(self.array("routed"))

    @property
    def num_tokens(self) -> int:
        return int(self.array("routed").sum())

    @property
    def dropped(self) -> int:
        return int((self.array("routed") - self.array("dispatched")).sum())

    @property
    def usage(self) -> np.ndarray:
        """(E,) float64, sums to 1; uniform for a layer that saw no token."""
        return frequency(self.array("routed"))

    @property
    def usage_frequency(self) -> "Tensor":
        """`usage` as a tensor."""
        import torch

        return torch.from_numpy(self.usage)

    @property
    def has_output_gradients(self) -> bool:
        """Whether gradients at the layer's outputs were recorded."""
        return self.tokens().output_gradient.shape[1] > 0

    def array(self, name: str) -> np.ndarray:
        """One of the sums, by the name of its attribute: reading it so needs no torch."""
        return getattr(self, name).numpy()

    def domain_arrays(self) -> dict[str, np.ndarray]:
        """domain -> (E,) routed tokens, as `domain_routed`."""
        return {name: counts.numpy() for name, counts in self.domain_routed.items()}

    def sample_arrays(self) -> dict[str, np.ndarray]:
        """The token sample as it is stored, by the names of its attributes, read from disk if need be."""
        return {name: tensor.numpy() for name, tensor in self.tokens().stored().items()}

    def has(self, name: str) -> bool:
        """Whether the statistics hold an optional sum."""
        return getattr(self, name) is not None

    def tokens(self) -> TokenSample:
        """The token sample, read from disk if need be."""
        return self.sample() if callable(self.sample) else self.sample

    def __add__(self, other: "LayerStats") -> "LayerStats":
        import torch

        if self.gradient_gram is not None or other.gradient_gram is not None:
            warn("gradient similarities do not add up: the sum has none")
        if self.has_output_gradients != other.has_output_gradients:
            warn("only one side has output gradients: the sum has none")
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

    def _added_domains(self, other: "LayerStats") -> "dict[str, Tensor]":
        """Routed tokens per domain of both sides together; a side without domains counts as the domain `other`."""
        import torch

        if not self.domain_routed and not other.domain_routed:
            return {}
        sides = [side.domain_routed or {OTHER: side.routed} for side in (self, other)]
        names = sorted({*sides[0], *sides[1]})
        return {name: torch.stack([side[name] for side in sides if name in side]).sum(0) for name in names}

    def drop_rate(self, expert_map: "Tensor", capacity: int) -> float:
        """Share of routed tokens over capacity if each group of experts had `capacity` places per sequence.

        Args:
            expert_map: (E,) group of each expert.
        """
        import torch

        groups = torch.zeros(len(self.sequence_counts), int(expert_map.max()) + 1, dtype=torch.int64)
        groups.index_add_(1, expert_map, self.sequence_counts.long())
        return float((groups - capacity).clamp(min=0).sum()) / max(self.num_tokens, 1)


class Lazy:
    """An attribute of `LoadedLayer`: the tensor of a stored array, made when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> "Tensor | None":
        if layer is None:
            return None
        import torch

        array = layer.stored.arrays.get(self.name)
        layer.__dict__[self.name] = None if array is None else torch.from_numpy(array)
        return layer.__dict__[self.name]


class LoadedLayer(LayerStats):
    """`LayerStats` of a file: arrays, which become tensors when an algorithm asks for them."""

    stored: StoredLayer

    routed, dispatched, gate_mass, soft_mass, router_logits_gram = Lazy(), Lazy(), Lazy(), Lazy(), Lazy()
    input_sum, input_abs_sum, input_square_sum, sequence_counts = Lazy(), Lazy(), Lazy(), Lazy()
    output_norm_sum, gated_norm_sum, output_square_sum, output_sum = Lazy(), Lazy(), Lazy(), Lazy()
    gradient_gram, weight_gradient_gram = Lazy(), Lazy()

    @classmethod
    def of(cls, stored: StoredLayer) -> "LoadedLayer":
        layer = object.__new__(cls)  # `dataclasses.replace` makes others, from tensors
        layer.__dict__.update(stored=stored, sample_size=stored.sample_size, sample=layer._read_sample)
        return layer

    @cached_property
    def domain_routed(self) -> "dict[str, Tensor]":
        import torch

        return {name: torch.from_numpy(counts) for name, counts in self.domain_arrays().items()}

    def array(self, name: str) -> np.ndarray:
        return self.stored.arrays[name] if "stored" in self.__dict__ else super().array(name)

    def domain_arrays(self) -> dict[str, np.ndarray]:
        if "stored" not in self.__dict__:
            return super().domain_arrays()
        rows = self.stored.arrays.get(DOMAINS, ())
        return dict(zip(self.stored.domains, rows, strict=True))

    def sample_arrays(self) -> dict[str, np.ndarray]:
        return self.stored.sample() if "stored" in self.__dict__ else super().sample_arrays()

    @property
    def has_output_gradients(self) -> bool:
        return self.stored.has_gradient if "stored" in self.__dict__ else super().has_output_gradients

    def has(self, name: str) -> bool:
        return name in self.stored.arrays if "stored" in self.__dict__ else super().has(name)

    def _read_sample(self) -> TokenSample:
        import torch

        return TokenSample.from_stored({name: torch.from_numpy(a) for name, a in self.stored.sample().items()})


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

    def __repr__(self) -> str:
        head = "{:<30} {:>8} {:>10} {:>9} {:>9}".format
        rows = [head(*map(str, row)) for row in self._rows()]
        return "\n".join([f"Stats of {self._title}", head("layer", "experts", "tokens", "dropped", "largest"), *rows])

    def _repr_html_(self) -> str:
        """A short table for notebooks."""
        columns = ("layer", "experts", "tokens", "dropped", "largest share")
        return html_table(f"Stats of {self._title}", columns, self._rows())

    @property
    def _title(self) -> str:
        data = self.data
        source = str(data.get("source", "unnamed data"))
        counts = f"{data.get('num_records', 0):,} records, {data.get('num_tokens', 0):,} tokens"
        return f"{source}: {counts}, {len(self.layers)} MoE layers"

    def _rows(self) -> list[tuple[str, ...]]:
        """Of each layer: name, experts, routed tokens, share of dropped ones, largest share of an expert."""
        return [
            (
                name,
                str(layer.num_experts),
                f"{layer.num_tokens:,}",
                f"{layer.dropped / max(layer.num_tokens, 1):.1%}",
                f"{layer.usage.max():.1%}",
            )
            for name, layer in self.layers.items()
        ]

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
            "parts": sorted({*self._parts, *other._parts}),
            **_added_domains(self.data, other.data),
        }
        return Stats({name: layer + other.layers[name] for name, layer in self.layers.items()}, data, self.checkpoint)

    @property
    def covers(self) -> frozenset[str]:
        """Digests of these statistics, or of those that they are the sum of, as any version has named them."""
        return frozenset(self.data.get("parts", ())) or frozenset([self.digest, self.former_digest])

    @property
    def _parts(self) -> list[str]:
        return self.data.get("parts") or [self.digest]

    @property
    def reference(self) -> dict:
        """How plans and checkpoints name the statistics that they were made from."""
        parts = self.data.get("parts")
        return {"sha256": self.digest, **({"parts": parts} if parts else {})}

    def is_named_by(self, reference: Mapping[str, Any]) -> bool:
        """Whether a plan's `stats` are these, or none; plans of former versions name them by `former_digest`."""
        return reference.get("sha256") in (None, self.digest) or reference["sha256"] == self.former_digest

    def check_against(self, checkpoint: "Checkpoint") -> None:
        """Raise `UserError` if the statistics are of another checkpoint."""
        if self.checkpoint.get("fingerprint") != checkpoint.fingerprint:
            raise UserError(f"the statistics are of another checkpoint than {checkpoint.path} (fingerprints differ)")

    def describe(self) -> dict:
        """Content of `stats.json`."""
        layers = {
            name: {
                "num_experts": layer.num_experts,
                "num_tokens": layer.num_tokens,
                "routed": layer.array("routed").tolist(),
                "dispatched": layer.array("dispatched").tolist(),
                "dropped": layer.dropped,
                "usage_frequency": layer.usage.tolist(),
                "gate_mass": layer.array("gate_mass").tolist(),
                "sample_size": layer.sample_size,
            }
            for name, layer in self.layers.items()
        }
        return {"format": FORMAT, "data": self.data, "checkpoint": self.checkpoint, "layers": layers}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every sum and every byte of the token samples, in memory as on disk."""
        digest = sha256(self._described())
        for name, layer in self.layers.items():
            present = [key for key in (*STORED, *OPTIONAL) if layer.has(key)]
            arrays = {key: layer.array(key) for key in present}
            arrays |= {f"domain/{domain}": counts for domain, counts in layer.domain_arrays().items()}
            arrays |= {f"sample/{key}": array for key, array in layer.sample_arrays().items()}
            for key, array in arrays.items():
                digest.update(f"{name}/{key}\0{array.dtype}\0{array.shape}\0".encode(errors="surrogatepass"))
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def former_digest(self) -> str:
        """As versions before computed it, from some of the sums and the keys of the sampled tokens."""
        digest = sha256(self._described())
        for layer in self.layers.values():
            digest.update(layer.array("router_logits_gram").tobytes())
            for counts in layer.domain_arrays().values():
                digest.update(counts.tobytes())
            sample = layer.sample_arrays()
            digest.update(sample["key"].tobytes())
            if sample["output_gradient"].shape[1]:
                digest.update(np.isfinite(sample["output_gradient"][:, 0]).tobytes())
        return digest.hexdigest()

    def _described(self) -> bytes:
        """What stats.json says of the layers, and which data they come from."""
        domains = self.data.get("domains")
        head = json.dumps(self.describe() | {"data": self.data["sha256"]})
        return (head + (json.dumps(domains) if domains else "")).encode()

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the statistics directory, complete or not at all.

        Args:
            force: replace an existing statistics directory.

        Raises:
            UserError: if it exists and `force` is not given, is something else, or cannot be written.
        """
        from safetensors.torch import save_file

        from msmoe.files import Output

        with Output(path, STATISTICS, force=force) as output:
            save_file(self._tensors(), output.content / "stats.safetensors")
            text = json.dumps(self.describe(), indent=1) + "\n"
            (output.content / "stats.json").write_text(text, encoding="utf-8")
            shutil.copymode(
                output.content / "stats.json", output.content / "stats.safetensors"
            )  # the library's is 0600
            output.commit()

    def _tensors(self) -> "dict[str, Tensor]":
        """What `stats.safetensors` holds."""
        import torch

        tensors = {}
        for name, layer in self.layers.items():
            for key in (*STORED, *OPTIONAL):
                if (value := getattr(layer, key)) is not None:
                    tensors[f"{name}/{key}"] = value.contiguous()
            if layer.domain_routed:
                tensors[f"{name}/{DOMAINS}"] = torch.stack(list(layer.domain_routed.values()))
            sample = layer.tokens()
            for key, value in sample.stored().items():
                tensors[f"{name}/sample/{key}"] = value.contiguous()
            tensors[f"{name}/sample/weight"] = sample.weights(layer.dispatched)
            tensors[f"{name}/sample/held_out"] = sample.held_out
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read a statistics directory; token samples stay on disk until they are asked for.

        Raises:
            UserError: if it is missing or damaged, naming file and field.
        """
        layers, data, checkpoint = read_statistics(Path(path))
        return cls({name: LoadedLayer.of(stored) for name, stored in layers.items()}, data, checkpoint)

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
                    "routed": layer.array("routed"),
                    "dispatched": layer.array("dispatched"),
                    "dropped": layer.array("routed") - layer.array("dispatched"),
                    "usage_frequency": layer.usage,
                    "gate_mass": layer.array("gate_mass"),
                    "soft_mass": layer.array("soft_mass"),
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
            for expert, values in enumerate(_counts_and_shares(layer.domain_arrays()[domain]))
        ]
        frame = pd.DataFrame(rows, columns=pd.Index(columns))
        return frame.astype({"expert": "int64", "routed": "int64", "usage_frequency": "float64"})


def frequency(counts: np.ndarray) -> np.ndarray:
    """Share of each count (E,) in their sum, float64; uniform if all are zero."""
    total = int(counts.sum())
    return counts / total if total else np.full(len(counts), 1 / len(counts))


def _counts_and_shares(counts: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(counts.tolist(), frequency(counts).tolist(), strict=True))


def _added_domains(a: dict, b: dict) -> dict[str, dict]:
    """The `domains` of two descriptions of data together; one without any counts as the domain `other`."""
    if not a.get("domains") and not b.get("domains"):
        return {}
    keys = ("num_records", "num_tokens")
    sides = [side.get("domains") or {OTHER: {key: side[key] for key in keys}} for side in (a, b)]
    names = sorted({*sides[0], *sides[1]})
    return {"domains": {name: {key: sum(s[name][key] for s in sides if name in s) for key in keys} for name in names}}


def with_gradients(layer: LayerStats, gradient_gram: "Tensor", weight_gradient_gram: "Tensor") -> LayerStats:
    """The same statistics with the Gram matrices (E, E) of the experts' loss gradients."""
    return replace(layer, gradient_gram=gradient_gram, weight_gradient_gram=weight_gradient_gram)


def with_output_gradient(layer: LayerStats, gradient: "Tensor") -> LayerStats:
    """The same statistics with the gradient (S, D) at the layer's output of every sampled token, NaN where unknown."""
    return replace(layer, sample=replace(layer.tokens(), output_gradient=gradient))


def sort_rows(matrix: "Tensor") -> "Tensor":
    """Rows of an integer matrix in lexicographic order."""
    import torch

    return matrix[torch.from_numpy(np.lexsort(matrix.numpy().T[::-1]))]
