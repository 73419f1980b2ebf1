"""Scores of a comparison: resampled examples -> intervals, paired tests, means and ranks -> its `Summary`.

Shapes: C runs, N examples, R resamples, M methods, T tasks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from msmoe.comparison.cautions import cautions
from msmoe.comparison.reading import Comparison, Key, Run, read
from msmoe.comparison.significance import Resampled, holm, mean_of, mean_ranks, p_value, resample_means, resample_ratios
from msmoe.comparison.summary import FULL, Measurement, Row, Score, Size, Summary, Task

Columns = dict[str | None, dict[Key, Resampled]]  # task, or None for the mean -> what was measured


def summarise(results: dict) -> Summary:
    """Summarise a comparison. Pure and deterministic; takes seconds for hundreds of cells.

    Args:
        results: content of results.json, format `msmoe-comparison/1`.

    Raises:
        UserError: if it is no comparison, or a field is missing or contradicts another.
    """
    comparison = read(results)
    columns = resample(comparison)
    sizes = tuple(summarise_size(experts, comparison, columns) for experts in comparison.sizes)
    return Summary(
        checkpoint=comparison.checkpoint,
        num_parameters=comparison.num_parameters,
        num_bytes=comparison.num_bytes,
        calibration=comparison.calibration,
        tasks=comparison.tasks,
        mean_metric=comparison.mean_metric,
        recover_steps=comparison.recover_steps,
        sizes=sizes,
        warnings=cautions(comparison, sizes, columns),
        export=comparison.export,
    )


def resample(comparison: Comparison) -> Columns:
    """Resample all runs task by task, and their mean over the tasks of one metric."""
    columns: Columns = {task.name: resample_task(task, comparison.groups) for task in comparison.tasks}
    averaged = [columns[task.name] for task in comparison.tasks if task.metric == comparison.mean_metric]
    means = {
        key: mean_of([column[key] for column in averaged])
        for key in comparison.groups
        if averaged and all(key in column for column in averaged)
    }
    return columns | {None: {key: mean for key, mean in means.items() if mean is not None}}


def resample_task(task: Task, groups: dict[Key, list[Run]]) -> dict[Key, Resampled]:
    """Resample all runs of a task in one matrix product."""
    having = {key: [run for run in group if task.name in run.examples] for key, group in groups.items()}
    runs = [run for group in having.values() for run in group]
    if not runs:
        return {}
    examples = np.stack([run.examples[task.name] for run in runs])
    if task.lower_is_better:
        losses_CN, tokens_CN = examples[..., 0], examples[..., 1]
        values_C = losses_CN.sum(axis=1) / tokens_CN.sum(axis=1)
        resampled_RC = resample_ratios(losses_CN, tokens_CN, key=task.name)
    else:
        values_C = examples.mean(axis=1)
        resampled_RC = resample_means(examples.astype(float), key=task.name)
    column, start = {}, 0
    for key, group in having.items():
        own = slice(start, start := start + len(group))
        if group:
            outcomes = examples[own][0] if len(group) == 1 and not task.lower_is_better else None
            seeds = tuple(run.seed for run in group)
            is_fixed = key[0] == FULL and key[2] == 0
            column[key] = Resampled(seeds, values_C[own], resampled_RC[:, own], task.num_examples, outcomes, is_fixed)
    return column


def summarise_size(experts: float, comparison: Comparison, columns: Columns) -> Size:
    """All rows at one size."""
    places = {method: at for method in comparison.kinds if (at := comparison.place(method, experts)) is not None}
    measured: dict[str, dict[int, Measurement]] = defaultdict(dict)
    for steps in comparison.recover_steps:
        keys = [key for method, at in places.items() if (key := (method, at, steps)) in comparison.groups]
        for key, measurement in measure(keys, comparison, columns).items():
            measured[key[0]][steps] = measurement
    rows = [make_row(method, places[method], comparison, found) for method, found in measured.items()]
    return Size(experts, comparison.budgets.get(experts), tuple(sorted(rows, key=row_order(comparison))))


def measure(keys: Sequence[Key], comparison: Comparison, columns: Columns) -> dict[Key, Measurement]:
    """Score and rank the rows of a table after the same recovery steps."""
    scores = {name: score_column(column, keys, comparison, name) for name, column in columns.items()}
    names = [task.name for task in comparison.tasks]
    complete = [k for k in keys if not comparison.is_reference(k[0]) and all(k in scores[name] for name in names)]
    ranks = {}
    if complete and names:
        table_MT = np.array([[scores[name][key].value for name in names] for key in complete])
        lower = [task.lower_is_better for task in comparison.tasks]
        ranks = dict(zip(complete, mean_ranks(table_MT, lower_is_better=lower).tolist(), strict=True))
    measured = {}
    for key in keys:
        runs = comparison.groups[key]
        measured[key] = Measurement(
            recover_steps=key[2],
            seeds=tuple(run.seed for run in runs),
            num_bytes=round(float(np.mean([run.num_bytes for run in runs]))),
            scores={name: scores[name][key] for name in names if key in scores[name]},
            mean=scores[None].get(key),
            rank=ranks.get(key),
        )
    return measured


def score_column(
    column: dict[Key, Resampled], keys: Sequence[Key], comparison: Comparison, name: str | None
) -> dict[Key, Score]:
    """Score the rows of a table in one column; corrections are over these rows."""
    metrics: dict[str | None, str] = {task.name: task.metric for task in comparison.tasks}
    exact = metrics.get(name, comparison.mean_metric) == "exact_match"
    measured = [key for key in keys if key in column]
    candidates = [key for key in measured if not comparison.is_reference(key[0])]
    best = min(candidates, key=lambda key: (column[key].value * (-1 if exact else 1), key), default=None)
    full = comparison.full_model(keys[0][2]) if keys else None
    against_full, against_best = (compare_rows(column, measured, other) for other in (full, best))
    scores = {}
    for key in measured:
        found = column[key]
        low, high = np.clip(found.interval, 0.0, 1.0) if exact else found.interval
        scores[key] = Score(
            found.value, float(low), float(high), found.num_examples, len(found.values),
            against_full.get(key), against_best.get(key), key == best,
        )  # fmt: skip
    return scores


def compare_rows(column: dict[Key, Resampled], keys: Sequence[Key], other: Key | None) -> dict[Key, float]:
    """Corrected p-values of the rows against `other`, but for itself and the full model."""
    if other is None or other not in column:
        return {}
    tested = [key for key in keys if key != other and key[0] != FULL]
    return dict(zip(tested, holm([p_value(column[key], column[other]) for key in tested]), strict=True))


def make_row(method: str, place: float, comparison: Comparison, measured: dict[int, Measurement]) -> Row:
    runs = [run for steps in measured for run in comparison.groups[method, place, steps]]
    losses = defaultdict(list)
    for run in runs:
        for layer, loss in run.layer_loss.items():
            losses[layer].append(loss)
    return Row(
        method=method,
        kind=comparison.kinds[method],
        average_kept=float(np.mean([run.average_kept for run in runs])),
        measurements=measured,
        layer_loss={layer: float(np.mean(values)) for layer, values in losses.items()},
        export=runs[0].export,
    )


def row_order(comparison: Comparison) -> Callable[[Row], tuple]:
    """Full model, other references, then methods by their means; those without a mean last."""
    sign = 1 if comparison.mean_metric == "loss" else -1

    def order(row: Row) -> tuple:
        found = [row.measurements.get(steps) for steps in comparison.recover_steps]
        means = [sign * m.mean.value if m is not None and m.mean is not None else float("inf") for m in found]
        return not row.is_reference, row.method != FULL, *means, row.method

    return order
