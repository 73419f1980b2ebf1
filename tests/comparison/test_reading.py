"""Results as people may have damaged them: every field is checked, and a wrong one is named in one line."""

import copy
import math
import random

import pytest
from comparison.synthetic import comparison

from msmoe.comparison.fields import Field
from msmoe.comparison.reading import load_comparison
from msmoe.comparison.scoring import summarise
from msmoe.errors import UserError

STAGE = {"tokens_per_second": 1.0, "p50_seconds": 1.0, "p95_seconds": 1.0}
FULL = {"flops_per_token": 1.0, "prefill": STAGE, "generation": STAGE, "peak_memory_bytes": 5}
VALUES = (None, True, -1, 2.5, math.nan, math.inf, 10**400, "", "text", [], {}, [1], {"a": 1}, [[1]])


def small() -> dict:
    results = comparison(["alpha", "beta"], experts=(4,), recover_steps=(0,), tasks=("sms",), num_examples=10)
    return copy.deepcopy(results | {"cost": {"alpha/4": FULL | {"full": FULL}}})


def put(results: dict, path: tuple, value: object) -> dict:
    """The results with another value at a path."""
    inner = results
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("cells", 0, "seed"), "0", r"cells\[0\].seed must be a whole number, at least 0, got '0'"),
        (("cells", 0, "seed"), True, r"cells\[0\].seed must be a whole number"),
        (
            ("cells", 1, "average_kept"),
            math.nan,
            r"cells\[1\].average_kept must be a finite number, at least 0, got nan",
        ),
        (("cells", 1), 7, r"cells\[1\] must be an object, got 7"),
        (("cells",), {"a": 1}, "cells must be a list"),
        (("cells", 0, "layer_loss"), {"a": "high"}, r"cells\[0\].layer_loss.a must be a finite number, got 'high'"),
        (("cells", 0, "kept"), {"a": 2.5}, r"cells\[0\].kept.a must be a whole number"),
        (("settings", "experts"), ["four"], r"settings.experts\[0\] must be a finite number, at least 1, got 'four'"),
        (("settings", "seeds"), 3, "settings.seeds must be a list, got 3"),
        (("budgets",), {"four": 1}, "'four' must be a number of experts"),
        (("tasks", "sms", "num_examples"), 0, "tasks.sms.num_examples must be a whole number, at least 1, got 0"),
        (("tasks", "sms", "majority_share"), 2, "tasks.sms.majority_share must be a finite number, .*at most 1, got 2"),
        (("checkpoint", "fingerprint"), 5, "checkpoint.fingerprint must be a text, got 5"),
        (("methods", "alpha"), None, "methods.alpha must be an object, got None"),
        (("cost", "alpha/4", "prefill", "p50_seconds"), 0, "p50_seconds must be a finite number, .*more than 0, got 0"),
        (("cost", "alpha/4", "full"), {}, "a field 'prefill' is missing in cost.alpha/4.full"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(path, value, message):
    with pytest.raises(UserError, match=rf"the comparison is damaged: .*{message}"):
        summarise(put(small(), path, value))


def test_a_value_of_any_length_is_shown_in_one_short_line():
    error = Field("x" * 1000, "here").fail("a list")
    assert len(str(error)) < 80


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ufeff\x00"])
def test_what_is_no_json_is_refused_with_the_name_of_the_file(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results.json is no JSON"):
        load_comparison(tmp_path / "results.json")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"format": "msmoe-comparison/1", "cells": [3]}')
    with pytest.raises(UserError, match=r"results.json: the comparison is damaged: "):
        load_comparison(tmp_path / "results.json")


def places(content: object, path: tuple = ()) -> list[tuple]:
    """Paths of all values but the whole, the first three of every list."""
    if isinstance(content, dict):
        pairs = list(content.items())
    else:
        pairs = list(enumerate(content[:3])) if isinstance(content, list) else []
    return [found for key, value in pairs for found in ((*path, key), *places(value, (*path, key)))]


@pytest.mark.parametrize("seed", range(40))
def test_any_value_in_any_place_is_read_or_refused_in_one_line(seed):
    rng, results = random.Random(seed), small()
    damaged = put(results, rng.choice(places(results)), copy.deepcopy(rng.choice(VALUES)))
    assert "\n" not in complaint(damaged)


def complaint(results: dict) -> str:
    """Why results are refused; empty where they are read."""
    try:
        summarise(results)
    except UserError as error:
        return str(error)
    return ""
