"""Layer refit: solve the output matrices of all groups of a layer for the routing that the compressed layer does.

Minimises sum_t w_t |sum_g a_tg (W_g h_tg + b_g) - y_t|^2 + ridge over the output matrices W_g, where a_tg is the weight
at which token t meets group g once the layer is compressed (0 where it does not), h_tg the hidden activation there and
y_t what the original layer gave. Where every token meets one group the groups are problems of their own, those of
`refit_output`. Where tokens meet several it is solved by block coordinate descent: each step is the refit of one group
to what the others leave of the targets, in closed form, its ridge chosen on the held-out tokens with "no change" as a
candidate. Neither the squared error on the fitted tokens nor that on the held-out ones rises at any step: a step
minimises the former plus a ridge on the change, and is left out unless it lowers the latter.

As in `refit_output` the held-out error is that of solutions that never saw the held-out tokens: the descent carries two
sets of residuals, one of solutions on the fitted tokens, by which it chooses, and one of solutions on all tokens, with
the ridges chosen, which it returns.

Memory: one expert at a time, and over the descent for each group the hidden activations (T_g, F) of its tokens in
float32, one Gram matrix of min(T_g^2, 2 F^2) entries in float64, and its Cholesky factor for each ridge. Where every
token meets one group nothing is held from one group to the next.

Shapes: T tokens, T_g tokens of a group, K chosen experts of a token, G groups, C constants, D d_model, F d_ff.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.layer.routing import Routing
from msmoe.merge.refit import RIDGES, Refit, refit_output, ridge_space

MAX_SWEEPS = 4
TOLERANCE = 0.01  # a sweep that lowers the held-out error by a smaller share is the last


@dataclass(frozen=True)
class LayerTokens:
    """Sampled tokens of a layer: where the compressed layer sends them, and what the original one made of them.

    Attributes:
        inputs: (T, D) of the experts.
        routing: experts (T, K), stored groups, or the number of groups plus a position among constants; weights (T, K).
            Choices of a token that lead to the same group add up; a weight may be 0.
        targets: (T, D) outputs to reproduce.
        weights: (T,) tokens that each one stands for.
        held_out: (T,) bool, tokens that choose the ridges.
    """

    inputs: Tensor
    routing: Routing
    targets: Tensor
    weights: Tensor
    held_out: Tensor

    def of_group(self, group: int) -> tuple[Tensor, Tensor]:
        """Positions (T_g,) of the tokens that are sent to a group, and the weights (T_g,) at which they meet it."""
        chosen = self.routing.experts == group
        at = chosen.any(1).nonzero().flatten()
        return at, (self.routing.weights[at] * chosen[at]).sum(1)

    @property
    def is_separable(self) -> bool:
        """Whether every token meets one group or constant."""
        return bool((self.routing.experts == self.routing.experts[:, :1]).all())

    @property
    def held_out_square(self) -> float:
        """sum_t w_t |y_t|^2 over the held-out tokens."""
        return weighted_square(self.targets[self.held_out], self.weights[self.held_out])


@dataclass(frozen=True)
class Contribution:
    """What one stored expert gives to a layer, as rows that its output matrix is applied to.

    Attributes:
        at: (T_g,) positions of its tokens, fitted ones first; num_fitted: how many of them.
        rows: (T_g, F) hidden activations times weight of the routing times square root of the token's weight.
        scale: (T_g, 1) the product of those two factors.
    """

    at: Tensor
    num_fitted: int
    rows: Tensor
    scale: Tensor

    @classmethod
    def of(cls, expert: Expert, tokens: LayerTokens, group: int) -> "Contribution":
        at, gate = tokens.of_group(group)
        order = tokens.held_out[at].long().argsort(stable=True)
        at, gate = at[order], gate[order]
        scale = gate[:, None] * tokens.weights[at].double().sqrt().float()[:, None]
        rows = expert.hidden(tokens.inputs[at]).mul_(scale)
        return cls(at, int((~tokens.held_out[at]).sum()), rows, scale)

    def take_from_(self, residuals: Tensor, expert: Expert) -> None:
        """Subtract the expert's output from residuals (T, D)."""
        left = torch.addmm(residuals[self.at], self.rows, expert.output.T, alpha=-1)
        residuals[self.at] = left if expert.output_bias is None else left - self.scale * expert.output_bias


def refit_group(expert: Expert, tokens: LayerTokens, group: int, *, ridges: tuple[float, ...] = RIDGES) -> Refit:
    """Refit one group of a layer whose tokens meet one group each.

    Args:
        expert: the group's expert, float32.
    """
    at, gate = tokens.of_group(group)
    chosen = tokens.inputs[at], gate, tokens.targets[at], tokens.weights[at], tokens.held_out[at]
    return refit_output(expert, *chosen, ridges=ridges)


class LayerRefit:
    """The refit of a layer: `groups()` computes it, the errors are known once that has ended.

    Attributes:
        error_before, error_after: relative output error of the layer on the held-out tokens, sum_t w_t |y'_t - y_t|^2 /
            sum_t w_t |y_t|^2; `after` is that of the solutions that never saw them. NaN without such tokens.
        num_sweeps: over the groups.
        history: relative held-out error after every step, of a descent; never rising.
    """

    def __init__(
        self,
        load: Callable[[int], Expert],
        num_groups: int,
        tokens: LayerTokens,
        *,
        constants: Tensor | None = None,
        changing: Collection[int] | None = None,
        ridges: tuple[float, ...] = RIDGES,
        max_sweeps: int = MAX_SWEEPS,
    ):
        """Prepare the refit of a layer.

        Args:
            load: gives a group's expert, float32; called once for each group, and once more for those whose matrix
                changes where tokens meet several groups.
            num_groups: G.
            constants: (C, D) outputs that routing beyond the groups leads to.
            changing: groups that may be refitted; all by default.

        Raises:
            ValueError: if the routing leads beyond groups and constants.
        """
        num_constants = 0 if constants is None else len(constants)
        experts = tokens.routing.experts
        if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < num_groups + num_constants:
            raise ValueError(f"routing must lead to 0..{num_groups + num_constants - 1} (groups and constants), "
                             f"got {int(experts.min())}..{int(experts.max())}")  # fmt: skip
        self.load, self.num_groups, self.tokens, self.constants = load, num_groups, tokens, constants
        self.changing = sorted(range(num_groups) if changing is None else changing)
        self.ridges, self.max_sweeps = ridges, max_sweeps
        self.error_before = self.error_after = math.nan
        self.num_sweeps = 0
        self.history: list[float] = []

    def groups(self) -> Iterator[tuple[int, Refit]]:
        """Refit the groups that may change, in ascending order."""
        return self._one_by_one() if self.tokens.is_separable else self._descend()

    def describe(self) -> dict:
        """The layer's errors and sweeps; errors that are unknown are None."""
        known = lambda value: None if math.isnan(value) else value
        errors = {"error_before": known(self.error_before), "error_after": known(self.error_after)}
        return errors | {"num_sweeps": self.num_sweeps}

    def _one_by_one(self) -> Iterator[tuple[int, Refit]]:
        residuals = self._fixed_part()
        mine = torch.isin(self.tokens.routing.experts[:, 0], torch.tensor(self.changing, dtype=torch.int64))
        before = after = float(residuals[self.tokens.held_out & ~mine].double().square().sum())
        for g in self.changing:
            refit = refit_group(self.load(g), self.tokens, g, ridges=self.ridges)
            if refit.held_out_square:
                before += refit.error_before * refit.held_out_square
                after += refit.error_after * refit.held_out_square
            yield g, refit
        total = self.tokens.held_out_square
        self.num_sweeps = 1
        if total:
            self.error_before, self.error_after = before / total, after / total

    def _fixed_part(self) -> Tensor:
        """Scaled targets (T, D) less what constants and groups that stay as they are give."""
        scale = self.tokens.weights.double().sqrt().float()[:, None]
        residuals = self.tokens.targets * scale
        if self.constants is not None:
            for choice, weight in zip(self.tokens.routing.experts.T, self.tokens.routing.weights.T, strict=True):
                at = (choice >= self.num_groups).nonzero().flatten()
                residuals[at] -= self.constants[choice[at] - self.num_groups] * weight[at, None] * scale[at]
        for g in sorted(set(range(self.num_groups)) - set(self.changing)):
            expert = self.load(g)
            Contribution.of(expert, self.tokens, g).take_from_(residuals, expert)
        return residuals

    def _descend(self) -> Iterator[tuple[int, Refit]]:
        tokens, trial = self.tokens, self._fixed_part()
        blocks = {}
        for g in self.changing:
            expert = self.load(g)
            contribution = Contribution.of(expert, tokens, g)
            contribution.take_from_(trial, expert)
            blocks[g] = Block(contribution)
        final, total = trial.clone(), tokens.held_out_square
        before = {g: block.held_out_square_of(trial) for g, block in blocks.items()}
        error = float(trial[tokens.held_out].double().square().sum())
        if total:
            self.error_before = self.error_after = error / total
        while total and error and self.num_sweeps < self.max_sweeps:
            start = error
            for block in blocks.values():
                error = max(error - block.step_(trial, final, self.ridges), 0.0)
                self.history.append(error / total)
            self.num_sweeps += 1
            if not start - error > TOLERANCE * start:
                break
        self.error_after = error / total if total else math.nan
        for g, block in blocks.items():
            square = weighted_square(tokens.targets[block.held_out], tokens.weights[block.held_out])
            errors = [value / square if square else math.nan for value in (before[g], block.held_out_square_of(trial))]
            output = self.load(g).output
            if block.solution is not None:
                output = output + block.space.matrix(block.solution)
            yield g, Refit(output, block.ridge, block.num_fitted, len(block.held_out), *errors, square)


class Block:
    """One group in the descent.

    Attributes:
        ridge: of the last step that changed it, None where none did.
        solution: sum of the changes on all tokens, in the space of the regression.
    """

    def __init__(self, contribution: Contribution):
        self.at, self.num_fitted = contribution.at, contribution.num_fitted
        self.space = ridge_space(contribution.rows, contribution.num_fitted, keep=True)
        self.ridge: float | None = None
        self.solution: Tensor | None = None

    @property
    def held_out(self) -> Tensor:
        """Positions of its held-out tokens."""
        return self.at[self.num_fitted :]

    def held_out_square_of(self, residuals: Tensor) -> float:
        return float(residuals[self.held_out].double().square().sum())

    def step_(self, trial: Tensor, final: Tensor, ridges: tuple[float, ...]) -> float:
        """Change both residuals (T, D) by the best step, if one is better than none.

        Returns:
            what it takes off the squared error on the held-out tokens.
        """
        before = self.held_out_square_of(trial)
        if not 0 < self.num_fitted < len(self.at) or not before:
            return 0.0
        right = self.space.right(trial[self.at])
        errors = {ridge: self.space.held_out_error(right, ridge) for ridge in ridges}
        best = min(errors, key=lambda ridge: errors[ridge])
        if not errors[best] < before:
            return 0.0
        changed = trial[self.at] - self.space.predict(self.space.solve(right, best, fitted_only=True))
        after = float(changed[self.num_fitted :].double().square().sum())
        if not after < before:  # the gain was one of rounding
            return 0.0
        trial[self.at] = changed
        step = self.space.solve(self.space.right(final[self.at]), best)
        final[self.at] -= self.space.predict(step)
        self.solution = step if self.solution is None else self.solution + step
        self.ridge = best
        return before - after


def weighted_square(values: Tensor, weights: Tensor) -> float:
    """sum_t w_t |v_t|^2 of values (T, D) and weights (T,)."""
    scaled = values * weights.double().sqrt().float()[:, None]
    return float(scaled.double().square().sum())
