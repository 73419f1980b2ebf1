"""What two comparisons were asked to do differently, and what only one of them has."""

from collections.abc import Mapping

import pandas as pd
from msmoe.analysis.report.document import Column, Table, shorten

NAME = 80  # characters of names and values
MAX_LISTED = 12  # names in a sentence
SETTINGS = ("checkpoint", "calibration", "settings", "versions", "tasks", "budgets")  # fields that hold them
RESULTS = {"settings.methods", "settings.experts"}  # compared on their own
Labels = tuple[str, str]


def only_in_one(first: Mapping, second: Mapping, labels: Labels) -> list[str]:
    """A sentence for each run and kind of thing that the other lacks."""
    texts = []
    for own, other, label in ((first, second, labels[0]), (second, first, labels[1])):
        for what in ("methods", "tasks", "sizes"):
            missing = [name for name in found(own, what) if name not in found(other, what)]
            if missing:
                names = [shorten(name) for name in missing[:MAX_LISTED]]
                more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
                texts.append(f"Only {label} has the {what} {', '.join(names)}{more}.")
    return texts


def found(content: Mapping, what: str) -> list[str]:
    """Methods, tasks or sizes that were measured."""
    if what == "tasks":
        return list(content["tasks"])
    values = (cell["method"] if what == "methods" else f"{cell['experts']:g}" for cell in content["cells"])
    return list(dict.fromkeys(values))


def setting_frame(first: Mapping, second: Mapping) -> pd.DataFrame:
    """Settings, by their path in the files, that differ; those of a task only if both have it."""
    flat = [flatten({name: content.get(name) for name in SETTINGS}) for content in (first, second)]
    alone = set(first["tasks"]) ^ set(second["tasks"])
    records = []
    for path in dict.fromkeys((*flat[0], *flat[1])):
        own, other = (values.get(path) for values in flat)
        if own != other and ".".join(path) not in RESULTS and not (path[0] == "tasks" and path[1] in alone):
            shown = [None if value is None else shorten(str(value), NAME) for value in (own, other)]
            records.append({"setting": shorten(".".join(path), NAME), "first": shown[0], "second": shown[1]})
    return pd.DataFrame(records)


def flatten(value: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Values of nested dictionaries by their path."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flatten(inner, (*path, str(name))).items()}


def setting_table(frame: pd.DataFrame, labels: Labels, name: str, title: str) -> Table:
    return Table(
        name,
        f"{title}: what was set differently",
        "Settings, calibration data, tasks and versions in which the two files differ; a difference of scores may come "
        "from any of them.",
        frame,
        (Column("setting", "setting"), Column("first", labels[0]), Column("second", labels[1])),
    )
