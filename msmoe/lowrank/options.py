"""How experts are factorised: the choices of a user, checked."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from msmoe.errors import UserError

RowScore = Literal["activation", "magnitude"]
ROW_SCORES = get_args(RowScore)
DEFAULT_RANK, DEFAULT_KEEP_ROWS = 32, 0.10
SIZES = ("rank", "energy", "target_bytes", "target_ratio")


@dataclass(frozen=True)
class FactorOptions:
    """How experts are factorised. At most one of rank, energy, target_bytes and target_ratio is given.

    Attributes:
        rank: of every factorised matrix.
        keep_rows: share of the output rows whose remainder is stored, in [0, 1]; a budget chooses it instead.
        energy: share of the (whitened) singular-value energy that the rank of each layer must hold, in (0, 1].
        target_bytes: of all weights of the output, distributed over layers and matrices.
        target_ratio: the same as a share of the input's bytes, in (0, 1].
        svd: `activation` weights errors by what the experts saw, `plain` is the published decomposition;
            None takes `activation` where there are statistics.
        row_score: which rows are kept, see `msmoe.factorize.truncate`.
        refit: solve `wo` again after `wi` was truncated; None does where there are statistics.
    """

    rank: int | None = None
    keep_rows: float = DEFAULT_KEEP_ROWS
    energy: float | None = None
    target_bytes: int | None = None
    target_ratio: float | None = None
    svd: Literal["activation", "plain"] | None = None
    row_score: RowScore = "activation"
    refit: bool | None = None

    @property
    def is_budget(self) -> bool:
        return self.target_bytes is not None or self.target_ratio is not None

    def budget(self, source_bytes: int) -> int:
        """Bytes that all weights of the output may take."""
        return self.target_bytes or int((self.target_ratio or 0) * source_bytes)

    def resolve(self, *, has_stats: bool) -> "FactorOptions":
        """The options with nothing left open.

        Raises:
            UserError: for a value out of range, two sizes at once, or an option that needs statistics without any.
        """
        sizes = {name: getattr(self, name) for name in SIZES}
        given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"give one of {', '.join(given)}, not {len(given)}")
        if isinstance(self.rank, float):
            raise UserError(f"--rank must be a whole number, got {self.rank:g}")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank must be at least 1, got {self.rank}")
        if not 0 <= self.keep_rows <= 1:
            raise UserError(f"--keep-rows must be between 0 and 1, got {self.keep_rows:g}")
        for name in ("energy", "target_ratio"):
            if sizes[name] is not None and not 0 < sizes[name] <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {sizes[name]:g}")
        for name, allowed in (("svd", (None, "activation", "plain")), ("row_score", ROW_SCORES)):
            if getattr(self, name) not in allowed:
                choices = ", ".join(choice for choice in allowed if choice)
                raise UserError(f"unknown --{name.replace('_', '-')} {getattr(self, name)!r}; choose one of {choices}")
        needs_stats = {"--svd activation": self.svd == "activation", "--refit": self.refit}
        needs_stats |= {name: True for name in given if name.startswith("--target")}
        for name, needed in needs_stats.items():
            if needed and not has_stats:
                raise UserError(f"{name} needs --stats: it weighs errors by what the experts see")
        return replace(
            self,
            rank=self.rank if given else DEFAULT_RANK,
            svd=self.svd or ("activation" if has_stats else "plain"),
            refit=has_stats if self.refit is None else self.refit,
        )
