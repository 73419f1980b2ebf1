"""Names on disk <-> names in memory, by transformers' own conversion rules, from headers alone.

A parameter in memory that holds all experts of a block is stored as one tensor, as several, or as one for each expert.

Shapes: E experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from msmoe.errors import UserError
from msmoe.families.axes import Axis
from msmoe.families.special import Held
from msmoe.layer.stored import StoredPart

if TYPE_CHECKING:
    from torch import nn

    from msmoe.checkpoint.reader import Checkpoint

NUMBER = re.compile(r"(\D*)(\d+)")
BLOCKS = "_blocks"  # of MXFP4, in the place of a tensor
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")


class Source(NamedTuple):
    """A stored tensor of a parameter; `pattern` is that of the conversion rule which takes it, None for a plain one."""

    key: str
    pattern: str | None


class Origin(NamedTuple):
    """Where a parameter comes from: `target` of `num_targets` parameters that `rule` makes of the sources."""

    sources: tuple[Source, ...]
    rule: Any
    target: int
    num_targets: int


@dataclass(frozen=True)
class StoredStack:
    """How the matrices of all experts that hold the same roles are stored.

    Attributes:
        keys: of every expert (and of the others behind them), in order; one alone where a tensor holds them all.
        fused: whether one tensor holds them all.
        number: position of the expert's number among the dotted parts of its key.
        num_experts: E; entries: of the experts and the others behind them.
        offset: experts of another block in front of these in the same numbering, in multiples of E.
        companions: what tensors that give a part its values add to its stem, and whether they have an entry per expert.
        rows: see `StoredPart`.
    """

    keys: tuple[str, ...]
    fused: bool
    held: Held
    num_experts: int
    entries: int
    number: int = 0
    offset: int = 0
    companions: tuple[tuple[str, bool], ...] = ()
    encoding: str = "plain"
    rows: int = 0

    def part(self, expert: int) -> StoredPart:
        """Where an expert lies."""
        return self._part(self.keys[0] if self.fused else self.keys[expert], expert)

    def part_of(self, position: int, count: int) -> StoredPart:
        """Where the expert at a position of `count` lies in a checkpoint with as many."""
        if self.fused:
            return self._part(self.keys[0], position)
        pieces = self.keys[0].split(".")
        prefix = NUMBER.fullmatch(pieces[self.number])[1]
        pieces[self.number] = f"{prefix}{position + self.offset * count}"
        return self._part(".".join(pieces), position)

    def _part(self, key: str, expert: int) -> StoredPart:
        stem = stem_of(key, fused=self.fused)
        index = expert if self.fused else None
        companions = tuple((stem + suffix, index if each else None) for suffix, each in self.companions)
        behind = self.entries - self.num_experts if self.fused else 0
        return StoredPart(key, index, *self.held, companions, self.encoding, self.rows, behind)


def stem_of(key: str, *, fused: bool) -> str:
    """What the names of a stored tensor's companions begin with: its own, or that of the module it belongs to."""
    return key.removesuffix(BLOCKS) if fused else key.rpartition(".")[0] + "."


class DiskNames:
    """The tensors of a checkpoint by the parameters that they become.

    Attributes:
        origins: parameter or buffer -> where it comes from; those that the file lacks are absent.
        unknown: names in the file that belong to no parameter.
    """

    def __init__(self, model: nn.Module, keys: Iterable[str]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        state = model.state_dict()
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        sources: dict[str, list[Source]] = defaultdict(list)
        renamed: dict[str, str] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            if name not in state and name.endswith(BLOCKS):
                name = name.removesuffix(BLOCKS)
            if name in state:
                sources[name].append(Source(key, pattern))
            else:
                renamed[key] = name
        self.origins: dict[str, Origin] = {}
        for name, found in sources.items():
            rule = by_pattern[found[0].pattern] if found[0].pattern else None
            for target, other in enumerate(targets_of(name, rule)):
                count = len(rule.target_patterns) if rule else 1
                self.origins[other] = Origin(tuple(found), rule, target, count)
        self.unknown = tuple(renamed)
        self._renamed = renamed
        self._beside: dict[str, list[str]] = defaultdict(list)
        for key in self.unknown:
            self._beside[key.rpartition(".")[0]].append(key)

    def keys(self, names: Iterable[str]) -> list[str]:
        """The stored tensors that some parameters come from."""
        found = (s.key for name in names if name in self.origins for s in self.origins[name].sources)
        return list(dict.fromkeys(found))

    def stacks(
        self, name: str, axis: Axis, held: Held, checkpoint: Checkpoint, num_experts: int, shape: tuple[int, ...]
    ) -> tuple[StoredStack, ...]:
        """How a parameter that holds all experts of a block is stored.

        Args:
            shape: of the parameter in memory.

        Raises:
            UserError: for a tensor that is missing, or stored in a way that is not understood.
        """
        if name not in self.origins:
            beside = [key for key, near in self._renamed.items() if near.startswith(name.rpartition(".")[0])]
            has = f"; it holds {beside[0]}, of a quantisation that is not read" if beside else ""
            raise UserError(f"{checkpoint.path} lacks {name} of the model{has}")
        origin = self.origins[name]
        numbered = False
        patterns = list(origin.rule.source_patterns) if origin.rule else [None]
        by_pattern = {p: [s.key for s in origin.sources if s.pattern == p] for p in patterns}
        patterns = [p for p in patterns if by_pattern[p]]
        split, offset = 1, 0
        for operation in reversed(origin.rule.operations if origin.rule else ()):
            kind = type(operation).__name__
            if kind == "Interleave":
                held = held._replace(interleaved=not held.interleaved)
            elif kind == "Transpose":
                stored = checkpoint.spec(by_pattern[patterns[0]][0]).shape
                if not (operation.check_dims and stored == shape):
                    held = held._replace(transposed=not held.transposed)
            elif kind == "Concatenate":
                split = len(patterns)
            elif kind == "MergeModulelist":
                numbered = True
            elif kind == "ErnieFuseAndSplitTextVisionExperts":
                numbered, split, offset = True, len(patterns), origin.target
            elif not (kind == "Inkling2LoopDequantizeExperts" and len(patterns) == 1):
                raise UserError(f"{checkpoint.path}: {name} is stored by a rule that is not understood: {kind}")
        total = num_experts + axis.tail
        stacks = []
        for i, pattern in enumerate(patterns):
            keys = by_pattern[pattern]
            share = len(held.roles) // split
            part = held._replace(roles=held.roles[i * share : (i + 1) * share]) if split > 1 else held
            part = part if len(part.roles) > 1 else part._replace(interleaved=False)
            if not numbered:
                stacks.append(self._fused(keys[0], part, axis, checkpoint, total))
                continue
            first = offset * num_experts
            counts = num_experts, total, origin.num_targets
            number = number_of(keys, pattern or "")
            stacks.append(self._numbered(keys, part, checkpoint, number, first, *counts, offset))
        return tuple(stacks)

    def _fused(self, key: str, held: Held, axis: Axis, checkpoint: Checkpoint, total: int) -> StoredStack:
        encoding = "plain"
        if key.endswith(BLOCKS):  # rows of outputs, in blocks along the inputs
            held, encoding = held._replace(transposed=False), "mxfp4"
        elif checkpoint.spec(key).dtype in FP8_DTYPES:
            encoding = "fp8"
        stem, parent = stem_of(key, fused=True), key.rpartition(".")[0]
        companions = tuple(
            (other.removeprefix(stem), checkpoint.spec(other).shape[:1] == (total,))
            for other in self._beside.get(parent, ())
            if re.fullmatch(re.escape(stem) + r"_(?!bias)\w+", other)
        )
        rows = axis.block if axis.block > 1 else 0
        return StoredStack(
            (key,), True, held, total - axis.tail, total, companions=companions, encoding=encoding, rows=rows
        )

    def _numbered(
        self,
        keys: list[str],
        held: Held,
        checkpoint: Checkpoint,
        number: int,
        first: int,
        num_experts: int,
        total: int,
        num_targets: int,
        offset: int,
    ) -> StoredStack:
        by_number = {int(NUMBER.fullmatch(key.split(".")[number])[2]): key for key in keys}
        wanted = range(first, first + total)
        missing = [n for n in wanted if n not in by_number]
        if missing or len(by_number) != total * num_targets:
            raise UserError(
                f"{checkpoint.path} holds {len(by_number)} experts beside {keys[0]}, the configuration says "
                f"{total * num_targets}" + (f": number {missing[0]} is missing" if missing else "")
            )
        ours = tuple(by_number[n] for n in wanted)
        encoding = "fp8" if checkpoint.spec(ours[0]).dtype in FP8_DTYPES else "plain"
        stem = stem_of(ours[0], fused=False)
        companions = tuple((k.removeprefix(stem), False) for k in self._beside.get(stem[:-1], ()))
        return StoredStack(ours, False, held, num_experts, total, number, offset, companions, encoding)


def targets_of(name: str, rule: Any) -> list[str]:
    """The parameters that a conversion rule makes, of which `name` is the first."""
    if rule is None or len(rule.target_patterns) == 1:
        return [name]
    first, *others = (pattern.replace("\\", "").rstrip("$") for pattern in rule.target_patterns)
    return [name, *(name.replace(first, other) for other in others)]


def number_of(keys: list[str], pattern: str) -> int:
    """Position, among the dotted parts of some names, of the one number in which they differ.

    Args:
        pattern: that all of them match, with a star in the place of the number: it tells where a single one has it.
    """
    pieces = [key.split(".") for key in keys[:2]]
    if len(pieces) > 1:
        return next(i for i, pair in enumerate(zip(*pieces, strict=True)) if pair[0] != pair[1])
    behind = pattern.replace("\\", "").rstrip("$").rpartition("*")[2]
    return keys[0][: keys[0].rindex(behind)].count(".")
