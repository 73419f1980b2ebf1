"""The choices of a plan, each in one place: name, type, values it may have, default, and what the command line says.

A new choice is a field of `Parameters`. Options of commands, the table of `msmoe methods`, the checks and the plan file
follow from it. A new value of a choice is a name in its `Literal`, and under `needs` where it reads more of the
calibration than routing counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from msmoe.errors import UserError, choose
from msmoe.lowrank.options import DEFAULT_KEEP_ROWS, SIZES, FactorOptions, RowScore
from msmoe.strict_json import finite, items, shown, text, whole

Budget = Literal["adaptive", "uniform"]
Saliency = Literal["usage", "gate-mass", "ean-sum", "ean-mean", "weighted-ean", "reap", "mone", "random"]
Others = Literal["merge", "remove", "nearest", "mean-output"]
Selection = Literal["top", "subset", "progressive"]
Similarity = Literal[
    "router-logits", "router-weight", "weight", "feature", "feature.abs", "weight-feature", "router-weight-feature",
    "gradient", "weight-gradient", "mse", "feature-correlation.lsa", "feature-correlation.max", "expert-output",
    "expert-output-token", "ream", "input-weight", "random",
]  # fmt: skip
Metric = Literal["cosine", "distance", "euclidean"]
Grouping = Literal["dominant", "hierarchical", "kmeans", "spectral", "random", "centroids-first"]
Weighting = Literal["usage", "uniform", "saliency"]
Rule = Literal["average", "fisher", "zipit", "repair", "least-squares", "union-svd"]
Alignment = Literal["weight", "activation", "ream", "none"]
Reference = Literal["dominant", "first", "mean"]
Refitting = Literal["none", "independent", "sequential"]
Kept = Literal["original", "dominant"]
Svd = Literal["activation", "plain"]

OUTPUTS, TOKENS, OUTPUT_GRADIENTS, WEIGHT_GRADIENTS = (
    "expert outputs", "token sample", "output gradients", "weight gradients",
)  # fmt: skip
STATISTICS = {  # what a choice may need -> how it is collected
    OUTPUTS: "always collected by `msmoe profile`",
    TOKENS: "always collected by `msmoe profile`; --token-sample sets its size",
    OUTPUT_GRADIENTS: "`msmoe profile --fisher 64`",
    WEIGHT_GRADIENTS: "`msmoe profile --gradients`",
}


def choice(
    default: Any, about: str, *, needs: Mapping[tuple[str, ...], tuple[str, ...]] | None = None, metavar: str = ""
) -> Any:
    """A field of `Parameters`.

    Args:
        about: the help text of its option.
        needs: values -> statistics beyond routing counts that they need, keys of `STATISTICS`.
        metavar: in the help, in place of the type; the option then takes any text.
    """
    by_value = {value: names for values, names in (needs or {}).items() for value in values}
    return field(default=default, metadata={"help": about, "needs": by_value, "metavar": metavar})


@dataclass(frozen=True)
class Parameters:
    """Choices of a plan; they are stored in it and decide everything that `apply` does.

    Attributes:
        experts: experts kept per compressible layer, on average.
        target_size: bytes of all weights written that the number of experts, or the rank, was chosen for.
        budget: `adaptive` gives more to layers whose scores are spread, `uniform` the same to all.
        keep_layers: layers left as they are.
        saliency: what makes an expert worth keeping, a key of `msmoe.planning.scores.SCORES`.
        others: what becomes of the experts that are not kept: `merge` them into groups; `remove` them, so that the
            router chooses among the kept ones; send their tokens to the `nearest` kept expert at the original gate
            value; or put their `mean-output` in their place.
        selection: how a pruning method chooses: the `top` scores, the `subset` that reproduces the layer best, or a
            `progressive` schedule.
        similarity: a key of `msmoe.planning.similarity.BASES`; metric: `cosine`, `distance` or `euclidean`.
        grouping: a key of `msmoe.planning.grouping.GROUPINGS`; group_capacity: most members of a group.
        weighting: `usage`, `uniform`, or the `saliency`.
        rule: what the aligned members of a group become, a key of `msmoe.merge.RULES`.
        align: how neurons are matched; align_to: the group's `dominant` expert, the `first` of the layer, or the `mean`
            of the other members, in turn until nothing moves.
        canonical: scale ReLU neurons to a canonical form before matching and averaging.
        refit: re-solve the output matrices on calibration tokens for the routing that the compressed layer does, each
            layer by itself or in order; and again after factorising.
        routing: `original` rows with a map to the groups, or the rows of the `dominant` experts only.
        rank, keep_rows, energy, target_bytes, target_ratio, svd, row_score: factorise the merged experts, if a rank,
            an energy or a target is given; see `msmoe.lowrank.options.FactorOptions`. `target_ratio` is of the
            original's bytes.
        read: what the plan file said that these were read from, with the entries of other versions; None if they were
            not. It keeps the file as it is and decides nothing.
    """

    experts: float = choice(8, "Experts kept per layer, on average: 4, or 25% of them; default 8.", metavar="N|SHARE")
    target_size: int | None = choice(
        None,
        "In place of --experts: bytes of all weights written, such as 500MB, or 50% of the input's. Keeps the most "
        "experts that fit; methods that factorise get the largest rank that fits.",
        metavar="SIZE|SHARE",
    )
    budget: Budget = choice(
        "adaptive",
        "adaptive: layers whose usage is spread keep more (default); uniform: the same in every layer, which --export "
        "native needs.",
    )
    keep_layers: tuple[str, ...] | None = choice(
        None,
        "Leave this layer as it is (repeatable). Default: the first MoE layer of an encoder, no layer of a decoder; "
        "'none' keeps none.",
        metavar="NAME",
    )
    saliency: Saliency = choice(
        "usage",
        "What makes an expert worth keeping, default usage; see `msmoe methods`.",
        needs={("ean-sum", "ean-mean", "weighted-ean", "reap", "mone"): (OUTPUTS,)},
    )
    others: Others = choice(
        "merge",
        "What becomes of the experts not kept: merge them (default of merging methods); remove them, the router "
        "choosing among the kept ones (default of pruning methods); send their tokens to the nearest kept expert, at "
        "the original gate value; or put their mean-output in their place.",
        needs={("mean-output",): (OUTPUTS,)},
    )
    selection: Selection = choice(
        "top",
        "How pruning chooses: top scores, the subset that reproduces the layer best, or progressive, in steps.",
        needs={("subset", "progressive"): (TOKENS,)},
    )
    similarity: Similarity = choice(
        "router-logits",
        "What makes experts similar, default router-logits; see `msmoe methods`.",
        needs={
            ("mse", "expert-output", "expert-output-token", "ream"): (TOKENS,),
            ("feature-correlation.lsa", "feature-correlation.max"): (TOKENS,),
            ("gradient", "weight-gradient"): (WEIGHT_GRADIENTS,),
        },
    )
    metric: Metric = choice("cosine", "cosine (default), distance or euclidean.")
    grouping: Grouping = choice(
        "dominant", "dominant (default), centroids-first, hierarchical, kmeans, spectral or random."
    )
    group_capacity: int | None = choice(None, "Most members of a group, its dominant expert included.")
    weighting: Weighting = choice(
        "usage", "Weights of a group's members: usage, uniform or saliency; default: the method's."
    )
    rule: Rule = choice(
        "average",
        "What a group becomes: average (default), fisher, zipit, repair, least-squares or union-svd.",
        needs={("zipit", "repair", "least-squares"): (TOKENS,), ("fisher",): (TOKENS, OUTPUT_GRADIENTS)},
    )
    align: Alignment = choice(
        "weight",
        "How neurons are matched before merging: weight (default), activation, ream or none.",
        needs={("activation", "ream"): (TOKENS,)},
    )
    align_to: Reference = choice(
        "dominant",
        "dominant: each group to its dominant expert (default); first: every expert to expert 0, as published; mean: "
        "each member to the mean of the others, until none moves.",
    )
    canonical: bool = choice(False, "Scale ReLU neurons to equal norms before matching.")
    refit: Refitting = choice(
        "none",
        "Solve the output matrices again for the routing that the compressed layers do: none, independent, or "
        "sequential (layer by layer on the inputs that compressed layers give; needs the data at apply); alone: "
        "independent; default: the method's.",
        needs={("independent", "sequential"): (TOKENS,)},
    )
    routing: Kept = choice(
        "original", "original: all router rows and a map (default); dominant: the rows of the dominant experts only."
    )
    rank: int | None = choice(None, "Rank of every factorised matrix; default 32.")
    keep_rows: float = choice(
        DEFAULT_KEEP_ROWS, "Share of the output rows whose remainder is stored exactly; default 0.10."
    )
    energy: float | None = choice(None, "In place of --rank: share of the singular-value energy to hold.")
    target_bytes: int | None = choice(
        None,
        "In place of --rank: bytes of all weights of the output, spent on ranks and rows where they lower the output "
        "error most.",
    )
    target_ratio: float | None = choice(None, "The same, as a share of the bytes of the input checkpoint.")
    svd: Svd = choice(
        "activation",
        "activation: weigh errors by what the experts saw (default with statistics); plain: as published.",
    )
    row_score: RowScore = choice(
        "activation", "Rows kept: by output error (activation, default) or by size of the remainder (magnitude)."
    )
    read: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def loses_rows(self) -> bool:
        """Whether routers lose the rows of experts that are not kept, whatever the export."""
        return self.routing == "dominant" or self.others == "remove"

    @property
    def factors(self) -> FactorOptions | None:
        """How the merged experts are factorised; None if they are not.

        Raises:
            UserError: for a size that is impossible whatever the checkpoint.
        """
        if all(getattr(self, name) is None for name in SIZES):
            return None
        names = ("keep_rows", "svd", "row_score", *SIZES)
        chosen = FactorOptions(**{name: getattr(self, name) for name in names}, refit=self.refit != "none")
        return chosen.resolve(has_stats=True)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics beyond routing counts, keys of `STATISTICS`."""
        needed = {need for n in CHOICES for need in FIELDS[n].metadata["needs"].get(getattr(self, n), ())}
        if self.factors is not None:
            needed.add(TOKENS)
        return tuple(name for name in STATISTICS if name in needed)

    def check(self) -> None:
        """Raise `UserError` for a value that is none of its parameter's choices, or no number where one must be."""
        for name, allowed in CHOICES.items():
            choose(name.replace("_", "-"), getattr(self, name), allowed)
        if isinstance(self.experts, bool) or not isinstance(self.experts, int | float):
            raise UserError(f"--experts must be a number such as 4 or a share such as 25%, got {self.experts!r}")
        if not isinstance(self.canonical, bool):
            raise UserError(f"canonical must be true or false, got {self.canonical!r}")
        for name in (*SIZES, "keep_rows"):
            if not isinstance(getattr(self, name), int | float | None):
                raise UserError(f"{name} of a plan must be a number or null, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Entries of a plan file: those of the file that these were read from, in its order, or all choices of a
        method; and what else is not the default.
        """
        entries = dict.fromkeys(METHOD_CHOICES) if self.read is None else dict(self.read)
        entries |= dict.fromkeys(n for n in (*METHOD_CHOICES, *OF_A_PLAN) if getattr(self, n) != FIELDS[n].default)
        return entries | {name: getattr(self, name) for name in entries if name in FIELDS}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], where: str) -> "Parameters":
        """Choices of a plan file; entries that this version does not know are kept in `read`.

        Args:
            where: file and field, for errors.

        Raises:
            UserError: for a value of a wrong type; which names a choice may have is checked by `check`.
        """
        known = {name: _parse(name, value, f"{where}.{name}") for name, value in entries.items() if name in FIELDS}
        return cls(**known, read=dict(entries))


FIELDS = {f.name: f for f in fields(Parameters) if f.metadata}
OF_A_PLAN = ("keep_layers", "target_size")  # not a method's: they name layers or bytes of one checkpoint
METHOD_CHOICES = tuple(name for name in FIELDS if name not in OF_A_PLAN)
FACTOR_CHOICES = tuple(f.name for f in fields(FactorOptions) if f.name != "refit")
CHOICES = {name: get_args(f.type) for name, f in FIELDS.items() if get_origin(f.type) is Literal}


def value_type(name: str) -> type:
    """What a parameter's values are where they are not None: int, float, bool, str or tuple."""
    annotated: Any = FIELDS[name].type
    if isinstance(annotated, UnionType):
        annotated = get_args(annotated)[0]
    return str if name in CHOICES else get_origin(annotated) or annotated


def _parse(name: str, value: Any, where: str) -> Any:
    kind = value_type(name)
    if kind is tuple:
        return tuple(items(value, where, text))
    if value is None and FIELDS[name].default is None:
        return None
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{where} must be true or false, got {shown(value)}")
    if kind is int:
        whole(value, where, least=1)
    elif kind is float:
        finite(value, where, least=0)
    elif kind is str:
        text(value, where)
    return value
