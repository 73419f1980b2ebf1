"""Stats: what calibration saw. Sums over tokens, so two of them add up; `stats.json` and `stats.safetensors`.

Shapes: E experts, D d_model, S sampled tokens.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msmoe.calibration.layer_stats import LayerStats, LoadedLayer, with_gradients, with_output_gradient
from msmoe.calibration.records import OTHER
from msmoe.calibration.statistics import IN_TENSORS
from msmoe.calibration.statistics import STATISTICS as STATISTICS_OF_A_LAYER
from msmoe.calibration.stored import DOMAINS, FORMAT, read_statistics
from msmoe.errors import UserError, warn
from msmoe.places import STATISTICS
from msmoe.tables import html_table

if TYPE_CHECKING:
    from torch import Tensor

    from msmoe.checkpoint import Checkpoint


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
            UserError: if they come from different checkpoints, or both are the same.

        Warns:
            MsmoeWarning: if some data are on both sides, whose tokens then count twice.
        """
        if self.checkpoint != other.checkpoint:
            raise UserError("statistics of different checkpoints do not add up (fingerprints differ)")
        self._check_disjoint(other)
        data = {
            "source": f"{self.data['source']} + {other.data['source']}",
            "num_records": self.data["num_records"] + other.data["num_records"],
            "num_tokens": self.data["num_tokens"] + other.data["num_tokens"],
            "sha256": sha256("".join(sorted([self.data["sha256"], other.data["sha256"]])).encode()).hexdigest(),
            "parts": sorted({*self._parts, *other._parts}),
            **_added_domains(self.data, other.data),
            **_added_targets(self.data, other.data),
        }
        return Stats({name: layer + other.layers[name] for name, layer in self.layers.items()}, data, self.checkpoint)

    def _check_disjoint(self, other: "Stats") -> None:
        """Refuse to add statistics to themselves; say which data are on both sides."""
        if set(self._parts) == set(other._parts):
            raise UserError("these are the same statistics: their sum would count every token twice")
        shared = sorted({*self._parts} & {*other._parts})
        if shared:
            names = ", ".join(digest[:12] for digest in shared)
            warn(f"both sums hold the statistics {names}: their tokens count twice")
        elif self.identity == other.identity:
            warn(f"both statistics are of the same records of {self.data['source']}: their tokens count twice")

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
        layers = {name: layer.describe() for name, layer in self.layers.items()}
        return {"format": FORMAT, "data": self.data, "checkpoint": self.checkpoint, "layers": layers}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every sum and every byte of the token samples, in memory as on disk."""
        digest = sha256(self._described())
        for name, layer in self.layers.items():
            arrays = {row.name: layer.array(row.name) for row in IN_TENSORS if layer.has(row.name)}
            arrays |= {f"domain/{domain}": counts for domain, counts in layer.domain_arrays().items()}
            arrays |= {f"sample/{key}": array for key, array in layer.sample_arrays().items()}
            for key, array in arrays.items():
                digest.update(f"{name}/{key}\0{array.dtype}\0{array.shape}\0".encode(errors="surrogatepass"))
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what was counted: which tokens of which records, by which checkpoint, and where they were routed.

        No rounded sum is part of it, so that statistics of two parts of some data, added up, have the identity of
        those of all of it, and the batch size does not show: unless the best logits of a token tie to rounding.
        """
        described = [self.checkpoint, self.data["num_records"], self.data["num_tokens"], self.data.get("domains")]
        digest = sha256(json.dumps(described, sort_keys=True).encode(errors="surrogatepass"))
        for name, layer in self.layers.items():
            sample = layer.sample_arrays()
            arrays = {row.name: layer.array(row.name) for row in STATISTICS_OF_A_LAYER if row.is_integer}
            arrays |= {f"domain/{domain}": counts for domain, counts in layer.domain_arrays().items()}
            arrays |= {key: sample[key] for key in ("record", "position", "expert")}
            for key, array in arrays.items():
                digest.update(f"{name}/{key}\0{array.shape}\0".encode(errors="surrogatepass"))
                digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
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
            for row in IN_TENSORS:
                if (value := getattr(layer, row.name)) is not None:
                    tensors[f"{name}/{row.name}"] = value.contiguous()
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
        from msmoe.calibration.frames import expert_frame

        return expert_frame(self.layers)

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
        from msmoe.calibration.frames import domain_frame

        return domain_frame(self.layers, self.data.get("domains", {}))


def _added_domains(a: dict, b: dict) -> dict[str, dict]:
    """The `domains` of two descriptions of data together; one without any counts as the domain `other`."""
    if not a.get("domains") and not b.get("domains"):
        return {}
    keys = ("num_records", "num_tokens")
    sides = [side.get("domains") or {OTHER: {key: side[key] for key in keys}} for side in (a, b)]
    names = sorted({*sides[0], *sides[1]})
    return {"domains": {name: {key: sum(s[name][key] for s in sides if name in s) for key in keys} for name in names}}


def _added_targets(a: dict, b: dict) -> dict[str, int]:
    """The `num_targets` of two descriptions together, where both have it."""
    known = "num_targets" in a and "num_targets" in b
    return {"num_targets": a["num_targets"] + b["num_targets"]} if known else {}


__all__ = ["LayerStats", "LoadedLayer", "Stats", "with_gradients", "with_output_gradient"]
