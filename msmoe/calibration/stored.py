"""The files of statistics, read with numpy alone and checked: shapes, types, ranges, and that the two files agree.

Shapes: E experts, D d_model, N sequences, S sampled tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from msmoe import strict_json
from msmoe.errors import UserError
from msmoe.strict_json import finite, items, members, shown, text, whole

FORMAT = "msmoe-stats/1"
COUNTS = ("routed", "dispatched", "gate_mass")  # in stats.json
DOMAINS = "domain_routed"  # (domains, E), in the order of their names in stats.json
GRADIENT = "output_gradient"  # of the sample; statistics without it are older or had no use for it
SAMPLE_OPTIONAL = {"router_inputs": "SI", "chance": "SC"}  # where routers see something else; with several experts
SHAPES = {  # of the tensors in stats.safetensors
    "soft_mass": "E", "router_logits_gram": "EE", "input_sum": "ED", "input_abs_sum": "ED", "input_square_sum": "ED",
    "sequence_counts": "NE",
}  # fmt: skip
OPTIONAL_SHAPES = {
    "output_norm_sum": "E", "gated_norm_sum": "E", "output_square_sum": "E", "output_sum": "ED", "gradient_gram": "EE",
    "weight_gradient_gram": "EE",
}  # fmt: skip
SAMPLE_SHAPES = {"inputs": "SD", "expert": "S", "gate": "S", "record": "S", "position": "S", "key": "S"}
NOT_NEGATIVE = (
    "gate_mass", "soft_mass", "input_abs_sum", "input_square_sum", "sequence_counts", "output_norm_sum",
    "gated_norm_sum", "output_square_sum",
)  # fmt: skip
INTEGERS = ("sequence_counts", DOMAINS, "expert", "record", "position", "key")
ROUNDING = 1e-3  # of the gate values, float32 sums of softmax probabilities


@dataclass(frozen=True)
class StoredLayer:
    """Arrays of one layer as they are on disk, checked; the token sample stays there until it is asked for.

    Attributes:
        arrays: name -> array; those that the statistics lack are not named.
        domains: names of the rows of `domain_routed`.
    """

    file: Path
    name: str
    sample_size: int
    arrays: Mapping[str, np.ndarray]
    domains: tuple[str, ...] = field(default=())

    def sample(self) -> dict[str, np.ndarray]:
        """The token sample: inputs (S, D), expert and gate (S,), or (S, K) where a token has several experts, record,
        position and key (S,), output_gradient (S, D or 0), and router_inputs (S, D') and chance (S, 1) where stored.

        Raises:
            UserError: naming what is wrong with it.
        """
        with refused(self.file), safe_open(self.file, "np") as tensors:
            read = lambda key: tensors.get_tensor(f"{self.name}/sample/{key}")
            found = {key: read(key) for key in SAMPLE_SHAPES}
            none = np.empty((len(found["key"]), 0), np.float32)
            names = set(tensors.keys())
            found[GRADIENT] = read(GRADIENT) if f"{self.name}/sample/{GRADIENT}" in names else none
            found |= {key: read(key) for key in SAMPLE_OPTIONAL if f"{self.name}/sample/{key}" in names}
        self._check_sample(found)
        return found

    @property
    def has_gradient(self) -> bool:
        """Whether the sample has output gradients; its header tells."""
        key = f"{self.name}/sample/{GRADIENT}"
        with refused(self.file), safe_open(self.file, "np") as tensors:
            return key in tensors.keys() and tensors.get_slice(key).get_shape()[-1] > 0  # noqa: SIM118 - no mapping

    def _check_sample(self, found: dict[str, np.ndarray]) -> None:
        where = f"{self.file}: {self.name}/sample"
        routed, num_sampled = self.arrays["dispatched"], len(found["key"])
        sizes = {"S": num_sampled, "D": self.arrays["input_sum"].shape[1], "E": len(routed)}
        several = found["expert"].ndim == 2
        shapes = SAMPLE_SHAPES | ({"expert": "SK", "gate": "SK"} if several else {})
        shapes |= {key: axes for key, axes in SAMPLE_OPTIONAL.items() if key in found}
        for key, axes in shapes.items():
            check_array(found[key], axes, sizes, f"{where}/{key}", is_integer=key in INTEGERS)
        width = found[GRADIENT].shape[1] if found[GRADIENT].ndim == 2 else -1
        if len(found[GRADIENT]) != num_sampled or width not in (0, sizes["D"]):
            raise UserError(f"{where}/{GRADIENT} has shape {found[GRADIENT].shape}, which fits no sample")
        if np.isinf(found[GRADIENT]).any():  # NaN stands for a token without gradient
            raise UserError(f"{where}/{GRADIENT} holds infinite values")
        if num_sampled and not 0 <= found["expert"].min() <= found["expert"].max() < len(routed):
            raise UserError(f"{where}/expert names experts that do not exist: they are 0 to {len(routed) - 1}")
        if num_sampled and not several and not 0 <= found["gate"].min() <= found["gate"].max() <= 1 + ROUNDING:
            raise UserError(f"{where}/gate holds values that are no probabilities")
        if num_sampled and min(found["key"].min(), found["position"].min()) < 0:
            raise UserError(f"{where} holds negative keys or positions")
        if "chance" in found and not (found["chance"] > 0).all():
            raise UserError(f"{where}/chance holds values that are not positive")
        if several and (np.diff(np.sort(found["expert"], axis=1), axis=1) == 0).any():
            raise UserError(f"{where}/expert names an expert twice for one token")
        if (np.bincount(found["expert"].reshape(-1), minlength=len(routed)) > routed).any():
            raise UserError(f"{where} holds more tokens of an expert than were dispatched to it")


class refused:  # noqa: N801 - reads as what it does
    """What the library says of a damaged file becomes one line that names it."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, SafetensorError | OSError):
            raise UserError(f"{self.file} holds damaged statistics: {error}") from error


def read_statistics(path: Path) -> tuple[dict[str, StoredLayer], dict[str, Any], dict[str, str]]:
    """Layers, description of the data and identity of the checkpoint in a statistics directory.

    Raises:
        UserError: if it is missing or damaged, naming file and field.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a statistics directory")
    described, file = path / "stats.json", path / "stats.safetensors"
    content = strict_json.read_object(described, "a file of statistics")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not a statistics directory of format {FORMAT}, got {shown(content.get('format'))}")
    data, checkpoint, layers = (
        members(strict_json.field(content, name, str(described)), f"{described}: {name}")
        for name in ("data", "checkpoint", "layers")
    )
    check_data(data, f"{described}: data")
    for name, value in checkpoint.items():
        text(value, f"{described}: checkpoint.{name}")
    domains = tuple(data.get("domains", {}))
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a regular file")
    with refused(file), safe_open(file, "np") as tensors:
        names = set(tensors.keys())
        read = {
            name: read_layer(tensors, names, file, name, parse_counts(entry, f"{described}: layers.{name}"), domains)
            for name, entry in layers.items()
        }
    return read, data, checkpoint


def check_data(data: dict[str, Any], where: str) -> None:
    """Raise `UserError` for a description of the data that cannot be."""
    for name, read in (("source", text), ("sha256", text), ("num_records", whole), ("num_tokens", whole)):
        read(strict_json.field(data, name, where), f"{where}.{name}")
    items(data.get("parts", []), f"{where}.parts", text)
    for name, entry in members(data.get("domains", {}), f"{where}.domains").items():
        for key in ("num_records", "num_tokens"):
            at = f"{where}.domains.{name}"
            whole(strict_json.field(members(entry, at), key, at), f"{at}.{key}")


def parse_counts(entry: Any, where: str) -> dict[str, Any]:
    """What stats.json says of a layer: its size of the sample, and arrays (E,) of the tokens of its experts."""
    content = members(entry, where)
    routed, dispatched, gate_mass = (strict_json.field(content, name, where) for name in COUNTS)
    found = {
        "routed": np.array(items(routed, f"{where}.routed", whole), dtype=np.int64),
        "dispatched": np.array(items(dispatched, f"{where}.dispatched", whole), dtype=np.int64),
        "gate_mass": np.array(items(gate_mass, f"{where}.gate_mass", finite, least=0), dtype=np.float64),
        "sample_size": whole(strict_json.field(content, "sample_size", where), f"{where}.sample_size", least=1),
    }
    num_experts = whole(content.get("num_experts", len(routed)), f"{where}.num_experts", least=1)
    for name in COUNTS:
        if len(found[name]) != num_experts:
            raise UserError(f"{where}.{name} must have {num_experts} numbers, one an expert, got {len(found[name])}")
    if (found["dispatched"] > found["routed"]).any():
        raise UserError(f"{where}.dispatched is more than routed for expert "
                        f"{int((found['dispatched'] > found['routed']).argmax())}")  # fmt: skip
    if (found["gate_mass"] > found["routed"] * (1 + ROUNDING)).any():
        raise UserError(f"{where}.gate_mass is more than routed: gate values are at most 1")
    total = int(found["routed"].sum())
    if whole(content.get("num_tokens", total), f"{where}.num_tokens") != total:
        raise UserError(f"{where}.num_tokens is {content['num_tokens']}, the sum of routed is {total}")
    return found


def read_layer(
    tensors: Any, names: set[str], file: Path, name: str, counts: dict[str, Any], domains: tuple[str, ...]
) -> StoredLayer:
    """Read and check the arrays of one layer.

    Args:
        tensors: the open file; names: of its tensors.
        counts: what stats.json says.
    """
    arrays = {key: counts[key] for key in COUNTS}
    sizes = {"E": len(arrays["routed"])}
    present = {key: axes for key, axes in OPTIONAL_SHAPES.items() if f"{name}/{key}" in names}
    for key, axes in (SHAPES | present).items():
        where = f"{file}: {name}/{key}"
        if f"{name}/{key}" not in names:
            raise UserError(f"{file} lacks the tensor {name}/{key}, though stats.json names the layer")
        arrays[key] = tensors.get_tensor(f"{name}/{key}")
        check_array(arrays[key], axes, sizes, where, is_integer=key in INTEGERS)
        if key in NOT_NEGATIVE and arrays[key].size and arrays[key].min() < 0:
            raise UserError(f"{where} holds negative values")
    if domains:
        arrays[DOMAINS] = tensors.get_tensor(f"{name}/{DOMAINS}")
        check_array(arrays[DOMAINS], "ME", sizes | {"M": len(domains)}, f"{file}: {name}/{DOMAINS}", is_integer=True)
    for key in ("sequence_counts", DOMAINS):  # each row is a part of the routed tokens
        if key in arrays and not np.array_equal(arrays[key].sum(0, dtype=np.int64), arrays["routed"]):
            raise UserError(f"{file}: {name}/{key} does not sum to routed in stats.json")
        if key in arrays and arrays[key].size and arrays[key].min() < 0:
            raise UserError(f"{file}: {name}/{key} holds negative values")
    return StoredLayer(file, name, counts["sample_size"], arrays, domains)


def check_array(array: np.ndarray, axes: str, sizes: dict[str, int], where: str, *, is_integer: bool) -> None:
    """Check kind, shape and finiteness; an axis without a size gets that of the array.

    Args:
        axes: a letter of `sizes` per axis.
    """
    if (array.dtype.kind in "iu") != is_integer or array.dtype.kind not in "iuf":
        raise UserError(f"{where} has dtype {array.dtype}, expected {'integers' if is_integer else 'floats'}")
    expected = tuple(sizes.setdefault(axis, length) for axis, length in zip(axes, array.shape, strict=False))
    if len(axes) != array.ndim or expected != array.shape:
        described = " x ".join(str(sizes.get(axis, "any")) for axis in axes)
        raise UserError(f"{where} has shape {array.shape}, expected {described}")
    if not is_integer and not np.isfinite(array).all():
        raise UserError(f"{where} holds NaN or infinite values")
