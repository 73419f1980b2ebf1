"""The table of methods. A method is a row: which experts are kept, what becomes of the others, and what follows.

A new method is a row here, with a function of its own in `scores.py`, `similarity.py`, `grouping.py` or `merge/` where
no existing one does.
"""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from msmoe.errors import UserError, choose
from msmoe.lowrank.options import DEFAULT_RANK, SIZES
from msmoe.planning.parameters import METHOD_CHOICES, STATISTICS, Parameters

if TYPE_CHECKING:
    from msmoe.calibration.stats import LayerStats

Kind = Literal["reference", "pruning", "merging", "clustering"]
REROUTING = ("remove", "mean-output")  # of `others`: tokens of the experts not kept meet no stored expert of theirs


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


def resolve(method: str, choices: dict) -> Parameters:
    """The method's parameters with the caller's choices; None means the default."""
    row = METHODS[choose("method", method, METHODS)]
    given = {name: value for name, value in choices.items() if value is not None}
    for name in given:
        choose("parameter", name, METHOD_CHOICES)
    if any(name in given for name in SIZES) and "rank" not in given:
        given["rank"] = None  # another way to choose sizes takes the place of the method's rank
    parameters = replace(row.defaults, **given)
    parameters.check()
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
        choose("parameter", name, METHOD_CHOICES)
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


def check_statistics(parameters: Parameters, method: str, stats: "LayerStats") -> None:
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
