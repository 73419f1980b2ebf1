"""Sizes as people say them, a share of the experts or bytes of the output, into the numbers that a plan has."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from msmoe.errors import UserError
from msmoe.families import MoELayer
from msmoe.lowrank.options import SIZES
from msmoe.planning.methods import METHODS, resolve
from msmoe.planning.parameters import Parameters
from msmoe.units import parse_bytes, parse_share

Choices = dict[str, Any]  # of a plan, as `msmoe.plan` takes them


def settle(
    method: str,
    choices: Choices,
    layers: Sequence[MoELayer],
    source_bytes: int,
    predicted: Callable[[Choices], int],
    *,
    counts: Sequence[int] | None = None,
) -> tuple[Choices, int | None]:
    """The choices with a number of experts, or a rank, in the place of a share and a target size.

    Args:
        layers: the compressible ones.
        source_bytes: of all weights of the input, what a share of the size is of.
        predicted: bytes that the output of some choices has; they ascend with the number of experts and the rank.
        counts: numbers of experts that every layer can keep, ascending; None for any.

    Returns:
        choices without `target_size`, and the target in bytes, if there is one.

    Raises:
        UserError: for a size that says nothing, contradicts another choice, or is below the smallest possible one.
    """
    given = dict(choices)
    target = given.pop("target_size", None)
    if isinstance(given.get("experts"), str):
        given["experts"] = count_of(given["experts"], layers, resolve(method, given | {"experts": None}))
    if target is None:
        return given, None
    limit = bytes_of(target, source_bytes)
    name, options = range_of(method, given, layers, counts)
    smallest = predicted(given | {name: options[0]})
    if smallest > limit:
        fewer = ": keep fewer --experts" if name == "rank" else ""
        raise UserError(
            f"--target-size {target} is {limit:,} bytes, below the smallest output of method {method} with these "
            f"options: {smallest:,} bytes ({smallest / source_bytes:.1%} of the input){fewer}"
        )
    place = bisect_right(options, limit, key=lambda option: predicted(given | {name: option}))
    return given | {name: options[place - 1]}, limit


def count_of(text: str, layers: Sequence[MoELayer], parameters: Parameters) -> float:
    """Experts per layer, on average, of `4` or `25%`; a share under a uniform budget is a whole number, rounded down.

    Raises:
        UserError: if it is neither a number nor a percentage.
    """
    if not text.strip().endswith("%"):
        try:
            return float(text)
        except ValueError:
            raise UserError(f"--experts must be a number such as 4 or a share such as 25%, got {text!r}") from None
    mean = sum(layer.num_experts for layer in layers) / max(len(layers), 1)
    count = parse_share(text, "--experts") * mean
    return max(1.0, float(count // 1) if parameters.budget == "uniform" else count)


def bytes_of(target: str | int, source_bytes: int) -> int:
    """Bytes of a target: `500MB`, `50%` of the input, or a number of bytes.

    Raises:
        UserError: if it is none of these.
    """
    if isinstance(target, str):
        if target.strip().endswith("%"):
            return int(parse_share(target, "--target-size") * source_bytes)
        return parse_bytes(target, "--target-size")
    if isinstance(target, bool) or not isinstance(target, int) or target < 1:
        raise UserError(f"--target-size must look like 500MB or 50%, got {target!r}")
    return target


def range_of(
    method: str, given: Choices, layers: Sequence[MoELayer], counts: Sequence[int] | None
) -> tuple[str, Sequence]:
    """What a target size chooses, `experts` or `rank`, and the values it may have, ascending.

    Raises:
        UserError: if the size is given in another way as well, or follows from the method.
    """
    for name in SIZES:
        if given.get(name) is not None:
            raise UserError(f"give one of --target-size and --{name.replace('_', '-')}, not both")
    if not layers:
        raise UserError("every MoE layer is kept: nothing to compress")
    parameters = resolve(method, given)
    if parameters.factors is not None:
        return "rank", range(1, min(min(layer.d_model, layer.d_ff) for layer in layers) + 1)
    if METHODS[method].fixed:
        raise UserError(f"--target-size has no effect with method {method}, which keeps {METHODS[method].fixed} of a "
                        "layer's experts")  # fmt: skip
    if given.get("experts") is not None:
        raise UserError("give one of --target-size and --experts, not both")
    count, most = len(layers), min(layer.num_experts for layer in layers)
    if parameters.budget == "uniform":
        return "experts", counts or range(1, most + 1)
    return "experts", [total / count for total in range(count, count * most + 1)]
