"""Gradual pruning of kept rows: from all of them to a share, the least important first (arXiv 2306.11222, 2310.01334).

Shapes: G experts, K rows at the start, I inputs, R rank.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import Family
from msmoe.formats.modeling.modeling_msmoe import FactorizedWeight, GroupedSparseMLP
from msmoe.lowrank.decompose import decompose
from msmoe.lowrank.factors import truncate
from msmoe.lowrank.shapes import FactorShape
from msmoe.planning.plan import Plan
from msmoe.recovery.options import RecoverOptions


def rows_kept(step: int, *, steps: int, start: float, final: float, warmup: int, cooldown: int) -> float:
    """Rows, or share of them, kept after a step: `start`, then a cubic fall, then `final`.

    final + (start - final) (1 - (t - T_i) / (T - T_i - T_f))^3 between T_i = `warmup` and T - T_f, with T_f =
    `cooldown`; the numerator printed in the publication, t - T_i - T_f, would rise above 1.
    """
    if step >= steps - cooldown:
        return final
    if step <= warmup:
        return start
    left = 1 - (step - warmup) / (steps - warmup - cooldown)
    return final + (start - final) * left**3


class RowPruner:
    """Scores the rows of one factorised stack and zeroes the least important ones.

    The score of a row is the mean of |s ds| over its entries, divided by the mean of its matrix and smoothed over
    steps; or its norm. What is pruned stays so.

    Args:
        weight: the stack; S (G, K, I).
        final: rows to keep in the end.
        score: `sensitivity` or `magnitude`.
        beta: share of the old score in the new one.
    """

    def __init__(self, weight: FactorizedWeight, *, final: int, score: str, beta: float):
        self.weight, self.final, self.score, self.beta = weight, final, score, beta
        self.start = weight.S.shape[1]
        self.scores = torch.zeros(weight.S.shape[:2])
        self.kept = torch.ones(weight.S.shape[:2], dtype=torch.bool)

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """Read the gradient of a step, counted from 1, before the optimiser moves the weights."""
        if self.score == "magnitude":
            self.scores = self.weight.S.norm(dim=-1).float().cpu()
        elif self.weight.S.grad is not None:
            sensitivity = (self.weight.S * self.weight.S.grad).abs().mean(-1).float().cpu()
            sensitivity /= sensitivity.mean(-1, keepdim=True).clamp(min=1e-30)
            self.scores = sensitivity if step == 1 else torch.lerp(sensitivity, self.scores, self.beta)

    @torch.no_grad()
    def prune(self, count: int) -> None:
        """Keep the `count` best rows of each matrix, ties to the lower index, and zero the others."""
        best = self.scores.masked_fill(~self.kept, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :count]
        self.kept = torch.zeros_like(self.kept).scatter_(1, best, True)
        self.weight.S.mul_(self.kept[..., None].to(self.weight.S))

    @torch.no_grad()
    def compact(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The kept rows of S (G, K, I), and their indices in the matrix, int32, ascending."""
        order = self.kept.long().argsort(dim=-1, descending=True, stable=True)[:, : self.final].sort(-1).values
        rows = self.weight.rows.cpu().gather(1, order)
        return s.gather(1, order[..., None].expand(*order.shape, s.shape[-1])), rows


def factorized_weights(model: nn.Module) -> Iterator[tuple[str, FactorizedWeight]]:
    """Name and module of every factorised stack."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FactorizedWeight))


@torch.no_grad()
def factorize_in_place(model: Any, rank: int, keep_rows: float, *, skip: Sequence[str], itemsize: int) -> dict:
    """Give every dense expert stack of a compressed model its factors with all rows kept: the same function.

    Args:
        rank: of the factors; plain singular value decomposition.
        keep_rows: share of the rows that will be left in the end; a stack that would not shrink by it stays dense.
        skip: layers to leave alone.
        itemsize: bytes of a stored number.

    Returns:
        layer -> `wi`, `wo` -> [rank, rows in the end], as the configuration states it.
    """
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, GroupedSparseMLP) or name in skip:
            continue
        for matrix in ("wi", "wo"):
            dense = getattr(module.experts, matrix)
            num_groups, num_outputs, num_inputs = dense.shape
            final = FactorShape(rank, round(keep_rows * num_outputs))
            if not final.saves(num_outputs, num_inputs, itemsize):
                continue
            weights = dense.detach().float()
            parts = truncate(weights, decompose(weights), FactorShape(rank, num_outputs))
            stack = FactorizedWeight(num_groups, num_outputs, num_inputs, rank, num_outputs, 0.0)
            for part, values in zip((stack.U, stack.V, stack.S, stack.rows), parts, strict=True):
                part.copy_(values)
            delattr(module.experts, matrix)
            setattr(module.experts, matrix, stack)
            shapes.setdefault(name, {})[matrix] = list(final)
    return shapes


def check_prunable(source: Checkpoint, family: Family | None, options: RecoverOptions) -> None:
    """Raise `UserError` where rows are to be pruned from the experts of a decoder."""
    if family is not None and family.is_causal and (options.rank is not None or options.keep_rows is not None):
        raise UserError(
            f"--rank and --keep-rows prune encoder-decoders only, and {source.path} is a decoder: factorise it with "
            "`msmoe factorize --rank --keep-rows`, then recover the result"
        )


def factorize_student(source: Checkpoint, family: Family | None, model: Any, options: RecoverOptions) -> dict:
    """Factors of dense experts for gradual pruning, where asked for; see `factorize_in_place`.

    Raises:
        UserError: for a student that is no `exact` checkpoint, or a rank that does not fit or saves nothing.
    """
    if options.rank is None:
        return {}
    if family is None or not family.is_exact(source):
        raise UserError(f"--rank needs an exact checkpoint of msmoe as student; {source.path} is none")
    if source.config.get("factors"):
        raise UserError(f"{source.path} is factorised already: --keep-rows alone prunes its rows")
    layers = tuple(layer for layer, _ in family.stored_layers(source))
    kept: Sequence[str] = family.default_kept_layers(layers)
    if (source.path / "plan.json").exists():
        named = Plan.load(source.path / "plan.json").parameters.keep_layers
        kept = kept if named is None else named
    smallest = min(min(layer.d_model, layer.d_ff) for layer in layers)
    if options.rank > smallest:
        raise UserError(f"--rank must be between 1 and {smallest}, got {options.rank}")
    itemsize = layers[0].itemsize("wi")
    shapes = factorize_in_place(model, options.rank, options.keep_rows or 1.0, skip=kept, itemsize=itemsize)
    if not shapes:
        raise UserError(f"rank {options.rank} with these rows would store more than the dense experts")
    return shapes


def row_pruners(model: Any, options: RecoverOptions) -> dict[str, RowPruner]:
    """A pruner for every factorised stack, where pruning is asked for.

    Raises:
        UserError: if there is none, or one has fewer rows than are to be kept.
    """
    if options.keep_rows is None:
        return {}
    pruners = {}
    for name, weight in factorized_weights(model):
        final = round(options.keep_rows * weight.U.shape[1])
        if final > weight.S.shape[1]:
            raise UserError(
                f"--keep-rows {options.keep_rows:g} asks for {final} rows of {name}, which has {weight.S.shape[1]}"
            )
        pruners[name] = RowPruner(weight, final=final, score=options.row_score, beta=options.beta)
    if not pruners:
        raise UserError("--keep-rows prunes factorised experts, and the student has none: give --rank as well")
    return pruners
