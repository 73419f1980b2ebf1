"""The choices of a plan: one place for their values, and plan files that stay as they were written."""

import json
from dataclasses import replace

import pytest

from msmoe.errors import UserError
from msmoe.merge import RULES
from msmoe.planning.grouping import GROUPINGS
from msmoe.planning.methods import METHODS, resolve
from msmoe.planning.parameters import CHOICES, FIELDS, STATISTICS, Parameters, value_type
from msmoe.planning.plan import Plan
from msmoe.planning.scores import SCORES
from msmoe.planning.similarity import BASES

LAYER = "encoder.block.3.layer.1.mlp"
FACTORISED = {  # what `msmoe factorize` writes
    "rank": 16, "keep_rows": 0.1, "energy": None, "target_bytes": None, "target_ratio": None, "svd": "plain",
    "row_score": "activation", "refit": "none",
}  # fmt: skip
WHOLE = {  # what `msmoe plan --target-size` writes
    "experts": 5.333333333333333, "budget": "adaptive", "saliency": "usage", "others": "merge", "selection": "top",
    "similarity": "router-logits", "metric": "cosine", "grouping": "dominant", "group_capacity": None,
    "weighting": "usage", "rule": "average", "align": "weight", "align_to": "dominant", "canonical": False,
    "refit": "independent", "routing": "original", "rank": None, "keep_rows": 0.1, "energy": None,
    "target_bytes": None, "target_ratio": None, "svd": "activation", "row_score": "activation",
    "keep_layers": ["encoder.block.1.layer.1.mlp"], "target_size": 12345678,
}  # fmt: skip


def plan_text(parameters: dict) -> str:
    layer = {"num_experts": 1, "groups": [{"dominant": 0, "members": [0], "weights": [1.0]}], "removed": []}
    content = {
        "format": "msmoe-plan/1", "method": "m-smoe", "parameters": parameters, "seed": 0,
        "checkpoint": {"model_type": "switch_transformers", "fingerprint": "f"}, "stats": {"sha256": "s"},
        "layers": {LAYER: layer}, "predicted": {"num_parameters": 1, "bytes": 2},
    }  # fmt: skip
    return json.dumps(content, indent=2) + "\n"


@pytest.mark.parametrize(
    "parameters",
    [
        WHOLE,
        FACTORISED,
        {},
        {"rule": "fisher", "experts": 3, "a later choice": {"of": [1, None]}, "align": "none"},
        {"keep_layers": [], "experts": 8},
        {"rule": "a later rule", "group_capacity": 3, "rank": None},
    ],
)
def test_a_plan_file_is_written_as_it_was_read(parameters, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(plan_text(parameters))
    Plan.load(file).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == plan_text(parameters)


def test_choices_that_a_file_does_not_name_have_their_defaults():
    read = Parameters.from_dict({"rule": "fisher", "later": 1}, "plan.json: parameters")
    assert read == Parameters(rule="fisher")


def test_a_changed_choice_is_written_in_its_place_and_a_new_one_at_the_end():
    read = Parameters.from_dict({"rule": "fisher", "later": 1, "experts": 4}, "plan.json: parameters")
    changed = replace(read, rule="zipit", rank=3)
    assert list(changed.to_dict().items()) == [("rule", "zipit"), ("later", 1), ("experts", 4), ("rank", 3)]


def test_new_parameters_are_written_in_full_those_of_the_plan_last():
    assert list(Parameters().to_dict()) == list(WHOLE)[:-2]
    assert list(Parameters(target_size=7, keep_layers=("a",)).to_dict()) == list(WHOLE)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rule", "averages"), ("refit", None), ("experts", "many"), ("experts", True), ("canonical", 1), ("rank", "four")],
)
def test_a_value_that_is_no_choice_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name}.*{value}"):
        replace(Parameters(), **{name: value}).check()


@pytest.mark.parametrize("name", ["keep_layers", "target_size", "read"])
def test_what_is_not_of_a_method_is_no_choice_of_one(name):
    with pytest.raises(UserError, match=f"unknown parameter '{name}'"):
        resolve("m-smoe", {name: 1})


@pytest.mark.parametrize(
    ("name", "table"), [("saliency", SCORES), ("similarity", BASES), ("grouping", GROUPINGS), ("rule", RULES)]
)
def test_every_choice_of_a_table_has_its_row_in_it(name, table):
    assert list(CHOICES[name]) == list(table)


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_needs_what_its_rule_reads(rule):
    reads = {"token sample": RULES[rule].needs_tokens, "output gradients": RULES[rule].needs_gradients}
    needs = Parameters(rule=rule, align="none").needs
    assert needs == tuple(name for name in STATISTICS if reads.get(name))


def test_the_values_and_statistics_that_fields_name_exist():
    for name, parameter in FIELDS.items():
        assert parameter.metadata["needs"].keys() <= set(CHOICES.get(name, ())), name
        assert {s for needs in parameter.metadata["needs"].values() for s in needs} <= set(STATISTICS), name
        assert parameter.default is None or name not in CHOICES or parameter.default in CHOICES[name]


def test_every_default_has_the_type_of_its_parameter():
    for name, parameter in FIELDS.items():
        types = {float: (int, float)}.get(value_type(name), value_type(name))
        assert parameter.default is None or isinstance(parameter.default, types), name


def test_every_method_makes_choices_that_exist():
    for method in METHODS.values():
        method.defaults.check()
