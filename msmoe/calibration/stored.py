"""The files of statistics, read with numpy alone and checked: shapes, types, ranges, and that the two files agree.

Shapes: E experts, D d_model, N sequences, S sampled tokens, K chosen experts of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from msmoe import strict_json
from msmoe.calibration.statistics import IN_JSON, IN_TENSORS
from msmoe.errors import UserError
from msmoe.strict_json import finite, items, members, shown, text, whole

FORMAT = "msmoe-stats/1"
DOMAINS = "domain_routed"  # (domains, E), in the order of their names in stats.json
GRADIENT = "output_gradient"  # of the sample; statistics without it are older or had no use for it
CHANCE = "chance"  # of a token with several experts to be sampled
ROUTER_INPUTS = "router_inputs"  # of the sample, where the router saw other inputs than the experts
SAMPLE_SHAPES = {"inputs": "SD", "expert": "SK", "gate": "SK", "record": "S", "position": "S", "key": "S"}
SAMPLE_INTEGERS = ("expert", "record", "position", "key")
ROUNDING = 1e-3  # of the gate values, float32 sums of softmax probabilities


@dataclass(frozen=True)
class Counts:
    """What stats.json says of a layer, checked.

    Attributes:
        arrays: name -> (E,) of the tokens of its experts.
        top_k: experts that a token chooses; is_bounded: whether no weight exceeds 1.
    """

    arrays: Mapping[str, np.ndarray]
    sample_size: int
    top_k: int
    is_bounded: bool


@dataclass(frozen=True)
class StoredLayer:
    """Arrays of one layer as they are on disk, checked; the token sample stays there until it is asked for.

    Attributes:
        arrays: name -> array; those that the statistics lack are not named.
        top_k: experts that a token chooses; is_bounded: whether no weight exceeds 1.
        domains: names of the rows of `domain_routed`.
    """

    file: Path
    name: str
    sample_size: int
    arrays: Mapping[str, np.ndarray]
    top_k: int
    is_bounded: bool
    domains: tuple[str, ...] = field(default=())

    def sample(self) -> dict[str, np.ndarray]:
        """The token sample as it is stored: inputs (S, D), expert and gate (S, K), or (S,) where K is 1, record,
        position and key (S,), output_gradient (S, D or 0), and router_inputs where the router saw others.

        Raises:
            UserError: naming what is wrong with it.
        """
        prefix = f"{self.name}/sample/"
        with refused(self.file), safe_open(self.file, "np") as tensors:
            present = {name.removeprefix(prefix) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
            optional = [key for key in (GRADIENT, ROUTER_INPUTS, CHANCE) if key in present]
            found = {key: tensors.get_tensor(prefix + key) for key in (*SAMPLE_SHAPES, *optional)}
        found.setdefault(GRADIENT, np.empty((len(found["key"]), 0), np.float32))
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
        dispatched, num_sampled = self.arrays["dispatched"], len(found["key"])
        num_experts = len(dispatched)
        sizes = {"S": num_sampled, "K": self.top_k, "D": self.arrays["input_sum"].shape[1]}
        shapes = {key: axes if self.top_k > 1 else axes.replace("K", "") for key, axes in SAMPLE_SHAPES.items()}
        if ROUTER_INPUTS in found:
            shapes[ROUTER_INPUTS] = "SR"
        if CHANCE in found:
            shapes[CHANCE] = "SC"
        for key, axes in shapes.items():
            check_array(found[key], axes, sizes, f"{where}/{key}", is_integer=key in SAMPLE_INTEGERS)
        width = found[GRADIENT].shape[1] if found[GRADIENT].ndim == 2 else -1
        if len(found[GRADIENT]) != num_sampled or width not in (0, sizes["D"]):
            raise UserError(f"{where}/{GRADIENT} has shape {found[GRADIENT].shape}, which fits no sample")
        if np.isinf(found[GRADIENT]).any():  # NaN stands for a token without gradient
            raise UserError(f"{where}/{GRADIENT} holds infinite values")
        if num_sampled and not 0 <= found["expert"].min() <= found["expert"].max() < num_experts:
            raise UserError(f"{where}/expert names experts that do not exist: they are 0 to {num_experts - 1}")
        if num_sampled and self.is_bounded and not 0 <= found["gate"].min() <= found["gate"].max() <= 1 + ROUNDING:
            raise UserError(f"{where}/gate holds values that are no probabilities")
        if num_sampled and min(found["key"].min(), found["position"].min()) < 0:
            raise UserError(f"{where} holds negative keys or positions")
        if self.top_k > 1 and (np.diff(np.sort(found["expert"], axis=1), axis=1) == 0).any():
            raise UserError(f"{where}/expert names an expert twice for one token")
        if (np.bincount(found["expert"].ravel(), minlength=num_experts) > dispatched).any():
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
    whole(data.get("num_targets", 1), f"{where}.num_targets", least=1)
    items(data.get("parts", []), f"{where}.parts", text)
    for name, entry in members(data.get("domains", {}), f"{where}.domains").items():
        for key in ("num_records", "num_tokens"):
            at = f"{where}.domains.{name}"
            whole(strict_json.field(members(entry, at), key, at), f"{at}.{key}")


def parse_counts(entry: Any, where: str) -> Counts:
    """What stats.json says of a layer.

    A layer without `top_k` has one expert per token, whose weight is a probability.
    """
    content = members(entry, where)
    values = {row.name: strict_json.field(content, row.name, where) for row in IN_JSON}
    found = {}
    for row in IN_JSON:
        read, bound = (whole, {}) if row.is_integer else (finite, {} if row.is_signed else {"least": 0})
        found[row.name] = np.array(items(values[row.name], f"{where}.{row.name}", read, **bound), dtype=row.dtype)
    sample_size = whole(strict_json.field(content, "sample_size", where), f"{where}.sample_size", least=1)
    num_experts = whole(content.get("num_experts", len(found["routed"])), f"{where}.num_experts", least=1)
    for name, array in found.items():
        if len(array) != num_experts:
            raise UserError(f"{where}.{name} must have {num_experts} numbers, one an expert, got {len(array)}")
    counts = Counts(found, sample_size, read_top_k(content, num_experts, where), "top_k" not in content)
    check_counts(counts, content, where)
    return counts


def read_top_k(content: dict[str, Any], num_experts: int, where: str) -> int:
    top_k = whole(content.get("top_k", 1), f"{where}.top_k", least=1)
    if top_k > num_experts:
        raise UserError(f"{where}.top_k must be at most {num_experts}, the number of experts, got {top_k}")
    return top_k


def check_counts(counts: Counts, content: dict[str, Any], where: str) -> None:
    """Raise `UserError` for numbers that do not go together."""
    routed, dispatched = counts.arrays["routed"], counts.arrays["dispatched"]
    if (dispatched > routed).any():
        raise UserError(f"{where}.dispatched is more than routed for expert {int((dispatched > routed).argmax())}")
    if counts.is_bounded and (counts.arrays["gate_mass"] > routed * (1 + ROUNDING)).any():
        raise UserError(f"{where}.gate_mass is more than routed: gate values are at most 1")
    total, rest = divmod(int(routed.sum()), counts.top_k)
    if rest:
        raise UserError(f"{where}.routed sums to {int(routed.sum())}, which is no multiple of top_k, {counts.top_k}")
    if whole(content.get("num_tokens", total), f"{where}.num_tokens") != total:
        over = f" over top_k, {counts.top_k}," if counts.top_k > 1 else ""
        raise UserError(f"{where}.num_tokens is {content['num_tokens']}, the sum of routed{over} is {total}")


def read_layer(
    tensors: Any, names: set[str], file: Path, name: str, counts: Counts, domains: tuple[str, ...]
) -> StoredLayer:
    """Read and check the arrays of one layer.

    Args:
        tensors: the open file; names: of its tensors.
        counts: what stats.json says.
    """
    arrays = dict(counts.arrays)
    sizes = {"E": len(arrays["routed"])}
    for row in IN_TENSORS:
        where = f"{file}: {name}/{row.name}"
        if f"{name}/{row.name}" not in names:
            if row.is_optional:
                continue
            raise UserError(f"{file} lacks the tensor {name}/{row.name}, though stats.json names the layer")
        array = arrays[row.name] = tensors.get_tensor(f"{name}/{row.name}")
        check_array(array, row.axes, sizes, where, is_integer=row.is_integer)
        if not row.is_signed and array.size and array.min() < 0:
            raise UserError(f"{where} holds negative values")
    if domains:
        arrays[DOMAINS] = tensors.get_tensor(f"{name}/{DOMAINS}")
        check_array(arrays[DOMAINS], "ME", sizes | {"M": len(domains)}, f"{file}: {name}/{DOMAINS}", is_integer=True)
    for key in ("sequence_counts", DOMAINS):  # each row is a part of the routed tokens
        if key in arrays and not np.array_equal(arrays[key].sum(0, dtype=np.int64), arrays["routed"]):
            raise UserError(f"{file}: {name}/{key} does not sum to routed in stats.json")
        if key in arrays and arrays[key].size and arrays[key].min() < 0:
            raise UserError(f"{file}: {name}/{key} holds negative values")
    return StoredLayer(file, name, counts.sample_size, arrays, counts.top_k, counts.is_bounded, domains)


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
