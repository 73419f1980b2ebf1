"""What a reader of a comparison should know before trusting it: gaps, unequal bytes, small tasks, a single seed."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from msmoe.comparison.reading import Comparison, Key, describe
from msmoe.comparison.significance import Resampled, detectable_difference
from msmoe.comparison.summary import FULL, REFERENCE, Size, Task, count, megabytes

MAX_HALF_WIDTH = 0.03
MIN_EXAMPLES = 200
ENOUGH_SEEDS = 3
MAX_BYTES_APART = 0.01
MAX_LISTED = 4  # things that a warning names one by one


def cautions(
    comparison: Comparison, sizes: Sequence[Size], columns: Mapping[str | None, Mapping[Key, Resampled]]
) -> tuple[str, ...]:
    """Warnings, one sentence each.

    Args:
        sizes: the tables.
        columns: task, or None for the mean -> what was measured.
    """
    return (
        *missing_cells(comparison),
        *missing_tasks(comparison),
        *missing_references(comparison),
        *unequal_bytes(sizes),
        *few_seeds(comparison),
        *same_samples(comparison),
        *small_tasks(comparison, columns),
    )


def missing_cells(comparison: Comparison) -> list[str]:
    """Cells that the settings ask for and that are not there."""
    asked = comparison.settings
    seeds = asked.get("seeds", [])
    wanted = [
        (method, float(experts), int(steps))
        for method in asked.get("methods", [])
        if comparison.kinds.get(method) != REFERENCE
        for experts in asked.get("experts", [])
        for steps in asked.get("recover_steps", [0])
    ]
    gaps = {key: sorted(set(seeds) - {run.seed for run in comparison.groups.get(key, [])}) for key in wanted}
    texts = [
        describe(key) + ("" if len(absent) == len(seeds) else f" (seed {', '.join(map(str, absent))})")
        for key, absent in gaps.items()
        if absent
    ]
    if not texts:
        return []
    return [f"missing {sum(map(len, gaps.values()))} of {count(len(wanted) * len(seeds), 'cell')}: {listed(texts)}"]


def missing_tasks(comparison: Comparison) -> list[str]:
    """Tasks that a cell lacks, or whose loss is no number."""
    lacking = [
        f"{run} on {task.name}" + (" (its loss is no number)" if task.name in run.not_finite else "")
        for runs in comparison.groups.values()
        for run in runs
        for task in comparison.tasks
        if task.name not in run.examples
    ]
    return [f"not measured: {listed(lacking)}; means and ranks leave these runs out"] if lacking else []


def missing_references(comparison: Comparison) -> list[str]:
    """Comparisons with the full model that cannot be made, or are with one that had less training."""
    steps_of = defaultdict(set)
    for method, _, steps in comparison.groups:
        steps_of[method == FULL].add(steps)
    if not any(comparison.full_model(steps) for steps in comparison.recover_steps):
        return ["the full model was not measured: nothing is compared with it"]
    untrained = sorted(steps_of[False] - steps_of[True] - {0})
    if not untrained:
        return []
    return [
        f"the full model was not trained for {', '.join(map(str, untrained))} steps: methods after recovery are "
        "compared with it untrained"
    ]


def unequal_bytes(sizes: Sequence[Size]) -> list[str]:
    """Methods of one size that differ in bytes, or exceed its budget."""
    warnings = []
    for size in sizes:
        stored = {row.method: row.num_bytes for row in size.methods}
        if not stored:
            continue
        least, most = min(stored, key=stored.__getitem__), max(stored, key=stored.__getitem__)
        apart = stored[most] / max(stored[least], 1) - 1
        if apart > MAX_BYTES_APART:
            warnings.append(
                f"{size.title}: stored bytes differ by {apart:.1%}, from {least} with {megabytes(stored[least])} MB to "
                f"{most} with {megabytes(stored[most])} MB"
            )
        over = [method for method, num_bytes in stored.items() if size.budget and num_bytes > size.budget]
        if over:
            warnings.append(f"{size.title}: over the budget of {megabytes(size.budget or 0)} MB: {listed(over)}")
    return warnings


def few_seeds(comparison: Comparison) -> list[str]:
    """Intervals and marks that know nothing of another seed, or little."""
    runs = [len(runs) for key, runs in comparison.groups.items() if not comparison.is_reference(key[0])]
    if not runs or max(runs) >= ENOUGH_SEEDS:
        return []
    if max(runs) == 1:
        return [
            "one seed only: intervals and marks are over examples and speak of these checkpoints, not of the methods; "
            "another calibration sample may give another answer"
        ]
    return [
        f"{max(runs)} seeds: where they differ by more than the examples explain, intervals are wide and marks say "
        f"little; {ENOUGH_SEEDS} or more seeds narrow them"
    ]


def same_samples(comparison: Comparison) -> list[str]:
    """Seeds that differ in everything but the calibration records."""
    seeds = {run.seed for runs in comparison.groups.values() for run in runs}
    if len(seeds) < 2 or comparison.num_samples >= len(seeds):
        return []
    return [
        f"{len(seeds)} seeds, but {count(comparison.num_samples, 'choice')} of calibration records: the data have no "
        "more records than --samples asks for, so the intervals hold little variation between calibration samples"
    ]


def small_tasks(comparison: Comparison, columns: Mapping[str | None, Mapping[Key, Resampled]]) -> list[str]:
    """Tasks that can hardly tell methods apart, and those at which the full model itself is no good."""
    warnings = []
    full = comparison.full_model(0) or comparison.full_model(max(comparison.recover_steps))
    for task in comparison.tasks:
        measured = columns[task.name].get(full) if full else None
        low, high = measured.interval if measured else (0.0, 0.0)
        half_width = (high - low) / 2
        exact = task.metric == "exact_match"
        if task.num_examples < MIN_EXAMPLES or (exact and half_width > MAX_HALF_WIDTH):
            width = f", the full model's interval is ±{half_width:.3f}" if measured else ""
            warnings.append(f"{task.name} is small: {count(task.num_examples, 'example')}{width}"
                            + (smallest_difference(task, comparison) if exact else ""))  # fmt: skip
        if exact and measured and task.majority_share is not None and low <= task.majority_share:
            warnings.append(
                f"{task.name} measures little: the full model, {measured.value:.3f} [{low:.3f}, {high:.3f}], is not "
                f"above the share of the most frequent answer, {task.majority_share:.3f}"
            )
    return warnings


def smallest_difference(task: Task, comparison: Comparison) -> str:
    """The smallest difference that a pair of runs could show, from how often methods disagree with the full model."""
    disagreements = [
        float((run.examples[task.name] != other.examples[task.name]).mean())
        for key, runs in comparison.groups.items()
        if not comparison.is_reference(key[0]) and (full := comparison.full_model(key[2]))
        for other in comparison.groups[full][:1]
        for run in runs
        if task.name in run.examples and task.name in other.examples
    ]
    if not disagreements:
        return ""
    discordance = float(np.median(disagreements))
    return (
        f"; two runs would have to differ by about {detectable_difference(discordance, task.num_examples):.3f} to be "
        f"told apart with 80 % power (the median method answers {discordance:.1%} of them unlike the full model)"
    )


def listed(texts: Iterable[str]) -> str:
    """The first few, and how many more."""
    every = list(texts)
    more = f" and {len(every) - MAX_LISTED} more" if len(every) > MAX_LISTED else ""
    return ", ".join(every[:MAX_LISTED]) + more
