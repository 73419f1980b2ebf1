"""The table of methods. A method is a row: which experts are kept, what becomes of the others, and what follows.

A new method is a row here, with a function of its own in `prune/`, `similarity.py`, `grouping.py` or `merge/` where no
existing one does.
"""

import difflib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from msmoe.calibration.stats import LayerStats
from msmoe.errors import UserError
from msmoe.lowrank.factors import ROW_SCORES
from msmoe.lowrank.options import DEFAULT_KEEP_ROWS, DEFAULT_RANK, SIZES, FactorOptions
from msmoe.merge import RULES
from msmoe.merge.align import Alignment
from msmoe.planning.grouping import GROUPINGS, Budget
from msmoe.planning.scores import SCORES
from msmoe.planning.similarity import BASES, Metric

Refitting = Literal["none", "independent", "sequential"]
Others = Literal["merge", "remove", "nearest", "mean-output"]
Kind = Literal["reference", "pruning", "merging", "clustering"]


@dataclass(frozen=True)
class Parameters:
    """Choices of a plan; they are stored in it and decide everything that `apply` does.

    Attributes:
        experts: experts kept per compressible layer, on average.
        budget: `adaptive` gives more to layers whose scores are spread, `uniform` the same to all.
        saliency: what makes an expert worth keeping, a key of `msmoe.prune.SCORES`.
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
        refit: re-solve `wo` on calibration tokens for the routing that the compressed layer does, each layer by itself
            or in order; and again after factorising.
        routing: `original` rows with a map to the groups, or the rows of the `dominant` experts only.
        rank, keep_rows, energy, target_bytes, target_ratio, svd, row_score: factorise the merged experts, if a rank,
            an energy or a target is given; see `msmoe.lowrank.options.FactorOptions`. `target_ratio` is of the
            original's bytes.
    """

    experts: float = 8
    budget: Budget = "adaptive"
    saliency: str = "usage"
    others: Others = "merge"
    selection: Literal["top", "subset", "progressive"] = "top"
    similarity: str = "router-logits"
    metric: Metric = "cosine"
    grouping: str = "dominant"
    group_capacity: int | None = None
    weighting: Literal["usage", "uniform", "saliency"] = "usage"
    rule: str = "average"
    align: Alignment = "weight"
    align_to: Literal["dominant", "first", "mean"] = "dominant"
    canonical: bool = False
    refit: Refitting = "none"
    routing: Literal["original", "dominant"] = "original"
    rank: int | None = None
    keep_rows: float = DEFAULT_KEEP_ROWS
    energy: float | None = None
    target_bytes: int | None = None
    target_ratio: float | None = None
    svd: Literal["activation", "plain"] = "activation"
    row_score: Literal["activation", "magnitude"] = "activation"

    @property
    def loses_rows(self) -> bool:
        """Whether routers lose the rows of experts that are not kept, whatever the export."""
        return self.routing == "dominant" or self.others == "remove"

    @property
    def factors(self) -> FactorOptions | None:
        """How the merged experts are factorised; None if they are not."""
        if all(getattr(self, name) is None for name in SIZES):
            return None
        names = ("keep_rows", "svd", "row_score", *SIZES)
        chosen = FactorOptions(**{name: getattr(self, name) for name in names}, refit=self.refit != "none")
        return chosen.resolve(has_stats=True)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics beyond routing counts, keys of `STATISTICS`."""
        needed = {
            "expert outputs": self.saliency in OUTPUT_SCORES or self.others == "mean-output",
            "token sample": self.similarity in SAMPLE_BASES
            or self.selection != "top"
            or self.refit != "none"
            or RULES[self.rule].needs_tokens
            or self.align in ("activation", "ream")
            or self.factors is not None,
            "output gradients": RULES[self.rule].needs_gradients,
            "weight gradients": self.similarity in ("gradient", "weight-gradient"),
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)


OUTPUT_SCORES = ("ean-sum", "ean-mean", "weighted-ean", "reap", "mone")
SAMPLE_BASES = (
    "mse", "expert-output", "expert-output-token", "ream", "feature-correlation.lsa", "feature-correlation.max",
)  # fmt: skip
STATISTICS = {  # what a method may need -> how it is collected
    "expert outputs": "always collected by `msmoe profile`",
    "token sample": "always collected by `msmoe profile`; --token-sample sets its size",
    "output gradients": "`msmoe profile --fisher 64`",
    "weight gradients": "`msmoe profile --gradients`",
}


@dataclass(frozen=True)
class Method:
    """One row of the table; `fixed` methods keep all experts, or one, whatever is asked for."""

    name: str
    kind: Kind
    summary: str
    source: str
    defaults: Parameters
    fixed: Literal["all", "one"] | None = None


UNIFORM = Parameters(budget="uniform")
PRUNE = replace(UNIFORM, others="remove")
METHODS = {
    method.name: method
    for method in (
        Method("full", "reference", "every expert kept: the full model", "reference", Parameters(), "all"),
        Method(
            "dense", "reference", "one expert per layer: the usage-weighted average of all", "reference", UNIFORM, "one"
        ),
        Method(
            "frequency",
            "pruning",
            "keep the experts that most tokens are routed to, over all layers",
            "baseline of arXiv 2310.01334",
            Parameters(others="remove"),
        ),
        Method(
            "gate-mass",
            "pruning",
            "keep the experts with the largest sum of gate values",
            "weighted frequency in arXiv 2510.13999",
            replace(PRUNE, saliency="gate-mass"),
        ),
        Method(
            "ean-sum",
            "pruning",
            "keep the experts with the largest sum of output norms",
            "expert activation norm in arXiv 2510.13999",
            replace(PRUNE, saliency="ean-sum"),
        ),
        Method(
            "ean-mean",
            "pruning",
            "keep the experts with the largest mean output norm",
            "arXiv 2606.15716",
            replace(PRUNE, saliency="ean-mean"),
        ),
        Method(
            "reap",
            "pruning",
            "keep the experts with the largest mean gate-weighted output norm",
            "REAP, arXiv 2510.13999",
            replace(PRUNE, saliency="reap"),
        ),
        Method(
            "task-specific",
            "pruning",
            "drop the least used experts in steps, tokens rerouted in between; without its fine-tuning",
            "baseline of arXiv 2310.01334",
            replace(PRUNE, selection="progressive"),
        ),
        Method(
            "naee",
            "pruning",
            "keep the subset that reproduces the layer's output best; exhaustive, or a beam search",
            "arXiv 2402.14800",
            replace(PRUNE, selection="subset"),
        ),
        Method(
            "frequency-refit",
            "pruning",
            "frequency, the tokens of the others sent to the nearest kept expert, its wo re-solved for them",
            "this project",
            Parameters(others="nearest", refit="independent"),
        ),
        Method(
            "reap-refit",
            "pruning",
            "reap, the tokens of the others sent to the nearest kept expert, its wo re-solved for them",
            "this project; after arXiv 2510.13999",
            replace(UNIFORM, saliency="reap", others="nearest", refit="independent"),
        ),
        Method("random-pruning", "pruning", "keep random experts", "baseline", replace(PRUNE, saliency="random")),
        Method(
            "mone",
            "pruning",
            "keep the experts of large usage x output variance, the mean output in place of the others",
            "MoNE, arXiv 2507.00390",
            replace(UNIFORM, saliency="mone", others="mean-output"),
        ),
        Method(
            "random-groups",
            "merging",
            "plain average of random groups, not aligned",
            "ablation of arXiv 2310.01334",
            replace(UNIFORM, grouping="random", weighting="uniform", align="none"),
        ),
        Method(
            "average",
            "merging",
            "plain average of the groups of m-smoe, aligned",
            "baseline of arXiv 2310.01334",
            Parameters(weighting="uniform"),
        ),
        Method(
            "fisher",
            "merging",
            "average of the groups of m-smoe, aligned, each weight by its Fisher information",
            "arXiv 2111.09832",
            Parameters(rule="fisher"),
        ),
        Method(
            "zipit",
            "merging",
            "hidden units of each m-smoe group joined by correlation, within and across experts",
            "ZipIt, arXiv 2305.03053",
            Parameters(rule="zipit", weighting="uniform", align="none"),
        ),
        Method(
            "repair",
            "merging",
            "plain average of the groups of m-smoe aligned by activations, hidden variance restored",
            "REPAIR, arXiv 2211.08403",
            Parameters(rule="repair", weighting="uniform", align="activation"),
        ),
        Method(
            "git-re-basin",
            "merging",
            "plain average of the groups of m-smoe, each member aligned to the mean of the others until none moves",
            "Git Re-Basin, arXiv 2209.04836",
            Parameters(weighting="uniform", align_to="mean"),
        ),
        Method(
            "m-smoe",
            "merging",
            "usage-weighted average of aligned experts, grouped around the dominant ones by router logits",
            "arXiv 2310.01334",
            Parameters(),
        ),
        Method(
            "m-smoe-refit",
            "merging",
            "m-smoe, then wo of each merged expert re-solved on calibration tokens in closed form",
            "this project; after arXiv 2510.14436",
            Parameters(refit="independent"),
        ),
        Method(
            "mc-smoe",
            "merging",
            "m-smoe, then the merged experts stored as low rank plus a few rows",
            "arXiv 2310.01334",
            Parameters(rank=DEFAULT_RANK),
        ),
        Method(
            "mc-smoe-refit",
            "merging",
            "m-smoe-refit, then low rank plus a few rows, wo re-solved once more for the truncated wi",
            "this project; after arXiv 2310.01334",
            Parameters(refit="independent", rank=DEFAULT_RANK),
        ),
        Method(
            "mergemoe",
            "merging",
            "usage-weighted average grouped by input weights, the output matrix solved for the mean of the members",
            "MergeMoE, arXiv 2510.14436",
            replace(UNIFORM, similarity="input-weight", rule="least-squares", align="none"),
        ),
        Method(
            "hc-smoe",
            "clustering",
            "hierarchical clustering of mean expert outputs, usage-weighted average, not aligned",
            "HC-SMoE, arXiv 2410.08589",
            replace(UNIFORM, similarity="expert-output", metric="euclidean", grouping="hierarchical", align="none"),
        ),
        Method(
            "hc-smoe-refit",
            "clustering",
            "hc-smoe, then wo of each merged expert re-solved on calibration tokens in closed form",
            "this project; after arXiv 2410.08589",
            replace(
                UNIFORM, similarity="expert-output", metric="euclidean", grouping="hierarchical", align="none",
                refit="independent",
            ),
        ),
        Method(
            "sub-moe",
            "clustering",
            "k-means on the cosine of outputs, members merged in the truncated singular basis of their union",
            "Sub-MoE, arXiv 2506.23266",
            replace(UNIFORM, similarity="expert-output-token", grouping="kmeans", rule="union-svd", align="none"),
        ),
        Method(
            "ream",
            "clustering",
            "experts of highest REAP score take their nearest in turn; score-weighted average; their router rows stay",
            "REAM, arXiv 2604.04356, without its sequential statistics",
            replace(
                UNIFORM, saliency="reap", similarity="ream", grouping="centroids-first", weighting="saliency",
                align="ream", routing="dominant",
            ),
        ),
    )
}  # fmt: skip
CHOICES = {
    "budget": ("adaptive", "uniform"),
    "saliency": tuple(SCORES),
    "others": ("merge", "remove", "nearest", "mean-output"),
    "selection": ("top", "subset", "progressive"),
    "similarity": tuple(BASES),
    "metric": ("cosine", "distance", "euclidean"),
    "grouping": tuple(GROUPINGS),
    "weighting": ("usage", "uniform", "saliency"),
    "rule": tuple(RULES),
    "align": ("weight", "activation", "ream", "none"),
    "align_to": ("dominant", "first", "mean"),
    "refit": ("none", "independent", "sequential"),
    "routing": ("original", "dominant"),
    "svd": ("activation", "plain"),
    "row_score": ROW_SCORES,
}


def choose(kind: str, name: str, choices: "tuple[str, ...] | dict") -> str:
    """Return `name` if it is a choice; otherwise raise `UserError` with the list and the closest one."""
    if name in choices:
        return name
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    hint = f" - did you mean {close[0]!r}?" if close else "."
    raise UserError(f"unknown {kind} {name!r}{hint} Choose one of: {', '.join(choices)}")


def resolve(method: str, choices: dict) -> Parameters:
    """The method's parameters with the caller's choices; None means the default."""
    row = METHODS[choose("method", method, METHODS)]
    given = {name: value for name, value in choices.items() if value is not None}
    for name in given:
        choose("parameter", name, tuple(asdict(row.defaults)))
    check_parameters(given)
    if any(name in given for name in SIZES) and "rank" not in given:
        given["rank"] = None  # another way to choose sizes takes the place of the method's rank
    parameters = replace(row.defaults, **given)
    if row.fixed and given.get("experts", 1 if row.fixed == "one" else None) not in (None, 1):
        raise UserError(f"method {method} keeps {row.fixed} of a layer's experts, not {given['experts']:g}")
    if row.fixed == "one":
        parameters = replace(parameters, experts=1)
    check_combination(method, parameters, given)
    return parameters if parameters.others == "merge" else replace(parameters, align="none", rule="average")


def variant(label: str) -> tuple[str, dict[str, Any]]:
    """Method and choices of a label such as `m-smoe` or `reap:others=nearest:budget=adaptive`.

    Raises:
        UserError: for a choice that is no attribute of `Parameters`, or not of the form name=value.
    """
    method, *parts = label.split(":")
    choices = {}
    for part in parts:
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UserError(f"{label!r}: {part!r} is not of the form name=value, e.g. reap:others=nearest")
        choose("parameter", name, tuple(f.name for f in fields(Parameters)))
        if name == "experts":
            raise UserError(f"{label!r}: the number of experts follows from the budget")
        choices[name] = parse_value(value.strip())
    return method, choices


def parse_value(text: str) -> Any:
    """A number, true, false or null, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_combination(method: str, parameters: Parameters, given: dict) -> None:
    """Raise `UserError` for choices that have no effect together, or that contradict each other."""
    if parameters.factors is None:
        for name in ("keep_rows", "svd", "row_score"):
            if name in given:
                raise UserError(f"--{name.replace('_', '-')} has no effect with method {method}: give --rank, --energy "
                                "or a target as well, or choose mc-smoe")  # fmt: skip
    if parameters.group_capacity is not None and parameters.grouping not in ("dominant", "centroids-first"):
        raise UserError(f"--group-capacity has no effect with --grouping {parameters.grouping}")
    if parameters.others == "merge" and parameters.selection != "top":
        raise UserError(f"--selection {parameters.selection} has no effect with --others merge: choose remove, nearest "
                        "or mean-output")  # fmt: skip
    if parameters.others != "merge":
        for name in ("rule", "grouping", "weighting", "align", "align_to"):
            if name in given:
                raise UserError(f"--{name.replace('_', '-')} has no effect with --others {parameters.others}")
        if parameters.routing == "dominant" and "routing" in given:
            raise UserError(f"--routing dominant has no effect with --others {parameters.others}")
    if parameters.refit == "sequential" and parameters.others == "mean-output":
        raise UserError("--refit sequential does not work with --others mean-output: choose independent, or nearest")
    if parameters.align_to == "mean" and parameters.align not in ("weight", "none"):
        raise UserError(f"--align-to mean needs --align weight, not {parameters.align}")


REROUTING = ("remove", "mean-output")  # of `others`: tokens of the experts not kept meet no stored expert of theirs


def check_parameters(parameters: dict) -> None:
    """Raise `UserError` for a value that is none of its parameter's choices."""
    for name, allowed in CHOICES.items():
        if name in parameters:
            choose(name.replace("_", "-"), parameters[name], allowed)
    experts = parameters.get("experts", 1)
    if isinstance(experts, bool) or not isinstance(experts, int | float):
        raise UserError(f"--experts must be a number such as 4 or a share such as 25%, got {experts!r}")
    if not isinstance(parameters.get("canonical", False), bool):
        raise UserError(f"canonical must be true or false, got {parameters['canonical']!r}")


def check_statistics(parameters: Parameters, method: str, stats: LayerStats) -> None:
    """Raise `UserError`, naming the flag that collects them, if a layer's statistics lack what a method reads."""
    present = {
        "expert outputs": stats.output_sum is not None,
        "token sample": True,
        "output gradients": stats.has_output_gradients,
        "weight gradients": stats.gradient_gram is not None,
    }
    for name in parameters.needs:
        if not present[name]:
            raise UserError(f"method {method} needs {name}, which the statistics do not hold: collect them with "
                            f"{STATISTICS[name].replace('always collected by ', 'this version of ')}")  # fmt: skip


def factor_options(parameters: dict) -> FactorOptions | None:
    """How a plan's merged experts are factorised; None if they are not."""
    known = {f.name for f in fields(Parameters)}
    for name in (*SIZES, "keep_rows"):
        if not isinstance(parameters.get(name, 0), int | float | None):
            raise UserError(f"{name} of a plan must be a number or null, got {parameters[name]!r}")
    return Parameters(**{name: value for name, value in parameters.items() if name in known}).factors
