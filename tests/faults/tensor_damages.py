"""Damages to the tensors of a checkpoint: names, shapes, values, dtypes."""

import struct
from collections.abc import Callable

import numpy as np
import torch
from arrays import read_tensors, tensor_names, write_parts
from checkpoint_damages import READS, RUNS, WRITES
from damage import (
    Expect,
    Table,
    Trial,
)

LOSSES = frozenset({"evaluate", "apply", "factorize", "compress"})  # results whose loss can be compared

TENSORS = Table()


def rebuilt(trial: Trial, change: Callable[[dict, Trial], dict]) -> None:
    """Write the tensors again, changed; values are (dtype, shape, bytes)."""
    file = trial.path / "model.safetensors"
    header, body = read_tensors(file)
    tensors = {
        name: (header[name]["dtype"], header[name]["shape"], body[slice(*header[name]["data_offsets"])])
        for name in tensor_names(header)
    }
    write_parts(file, change(tensors, trial))


def tensor_damage(name: str, change: Callable[[dict, Trial], dict], expect=Expect.REFUSE, by=READS) -> None:
    TENSORS.row(name, lambda trial: rebuilt(trial, change), expect, by)


def chosen(tensors: dict, trial: Trial, part: str = "") -> str:
    return trial.rng.choice([name for name in tensors if part in name])


PARTS = {"attention": "Attention", "an expert": ".experts.", "a router": ".router.", "a norm": "layer_norm",
         "the embedding": "shared", "a dense layer": ".mlp.w"}  # fmt: skip


def without(part: str) -> Callable[[dict, Trial], dict]:
    def change(tensors: dict, trial: Trial) -> dict:
        gone = chosen(tensors, trial, part)
        return {name: value for name, value in tensors.items() if name != gone}

    return change


def with_value(part: str, value: float) -> Callable[[dict, Trial], dict]:
    def change(tensors: dict, trial: Trial) -> dict:
        name = chosen(tensors, trial, part)
        dtype, shape, content = tensors[name]
        place = 4 * trial.rng.randrange(len(content) // 4)
        return tensors | {name: (dtype, shape, content[:place] + struct.pack("<f", value) + content[place + 4 :])}

    return change


def reshaped(part: str, change_shape: Callable[[list], list]) -> Callable[[dict, Trial], dict]:
    def change(tensors: dict, trial: Trial) -> dict:
        name = chosen(tensors, trial, part)
        dtype, shape, content = tensors[name]
        other = change_shape(shape)
        size = 4 * int(np.prod(other))
        return tensors | {name: (dtype, other, (content * 3)[:size])}

    return change


for label, part in PARTS.items():
    tensor_damage(f"without {label}", without(part), by=RUNS)
    for text, value in (("NaN", float("nan")), ("infinity", float("inf")), ("minus infinity", -float("inf"))):
        tensor_damage(f"{text} in {label}", with_value(part, value), by=WRITES)
    tensor_damage(f"1e38 in {label}", with_value(part, 1e38), Expect.EITHER)
    for text, shape in (("[0]", lambda s: [0]), ("a row more", lambda s: [s[0] + 1, *s[1:]]),
                        ("a row less", lambda s: [s[0] - 1, *s[1:]]), ("a leading axis", lambda s: [1, *s]),
                        ("flat", lambda s: [int(np.prod(s))] if len(s) > 1 else [len(s), *s])):  # fmt: skip
        tensor_damage(f"{label} of shape {text}", reshaped(part, shape), by=RUNS)
for label, rename in {
    "prefixed module.": lambda n: f"module.{n}", "prefixed model.": lambda n: f"model.{n}",
    "prefixed base_model.model.": lambda n: f"base_model.model.{n}", "in capitals": str.upper,
    "with the encoder renamed": lambda n: n.replace("encoder", "enc"), "suffixed": lambda n: f"{n}_0",
    "with attention renamed": lambda n: n.replace("Attention", "Attn"), "with blocks shifted": lambda n: n.replace(
    "block.1.", "block.9."), "with experts renamed": lambda n: n.replace("expert_", "e"),
    "with norms renamed": lambda n: n.replace("layer_norm", "ln"),
}.items():  # fmt: skip
    tensor_damage(f"names {label}", lambda x, t, f=rename: {f(n): v for n, v in x.items()}, by=RUNS)


def cast(content: bytes, dtype: str) -> bytes:
    """Float32 bytes in another float type."""
    values = torch.frombuffer(bytearray(content), dtype=torch.float32)
    return values.to({"F16": torch.float16, "BF16": torch.bfloat16}[dtype]).view(torch.uint8).numpy().tobytes()


def uncast(content: bytes, dtype: str) -> bytes:
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return torch.frombuffer(bytearray(content), dtype=kind).float().view(torch.uint8).numpy().tobytes()


def mixed(pattern: Callable[[str], bool] | None, stored: bool) -> Callable[[Trial], None]:
    """Tensors in two dtypes, stored as such or with the same values in float32."""

    def change(tensors: dict, trial: Trial) -> dict:
        names = [n for n in tensors if pattern(n)] if pattern else trial.rng.sample(list(tensors), 9)
        dtypes = {n: trial.rng.choice(["F16", "BF16"]) for n in names}
        return {n: part(v, dtypes.get(n)) for n, v in tensors.items()}

    def part(value: tuple, dtype: str | None) -> tuple:
        _, shape, content = value
        if dtype is None:
            return value
        small = cast(content, dtype)
        return (dtype, shape, small) if stored else ("F32", shape, uncast(small, dtype))

    return lambda trial: rebuilt(trial, change)


for label, pattern in {
    "any nine tensors": None, "half of the experts": lambda n: "expert_0" in n or "expert_3" in n,
    "wo of the experts": lambda n: ".wo." in n and "expert" in n, "wi of the experts": lambda n: ".wi." in n,
    "the routers": lambda n: "router" in n, "expert 0": lambda n: "expert_0" in n, "attention": lambda n: "Att" in n,
    "the embedding": lambda n: "shared" in n, "all experts": lambda n: ".experts." in n, "everything": lambda n: True,
}.items():  # fmt: skip
    TENSORS.row(f"two dtypes: {label}", mixed(pattern, True), Expect.TWIN, LOSSES, mixed(pattern, False))


@TENSORS.add("an additional tensor", Expect.EITHER)
def additional(trial: Trial) -> None:
    rebuilt(trial, lambda x, t: x | {"extra.weight": ("F32", [2], bytes(8))})


@TENSORS.add("an additional expert", Expect.EITHER)
def additional_expert(trial: Trial) -> None:
    def change(tensors: dict, trial: Trial) -> dict:
        name = chosen(tensors, trial, "expert_3.")
        return tensors | {name.replace("expert_3", "expert_4"): tensors[name]}

    rebuilt(trial, change)
