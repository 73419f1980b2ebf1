"""Every kind of checkpoint loads as a transformers model, and runs no code of its folder."""

import json
import shutil

import pytest
import torch
from tiny import compress, logits_of, random_records, save_switch, with_merged_experts
from transformers import SwitchTransformersForConditionalGeneration, T5ForConditionalGeneration

from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.formats.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration

BATCH = random_records(5, seed=31)


@pytest.fixture(scope="module")
def dense(switch, stats, tmp_path_factory):
    """`dense` export of `switch`."""
    out = tmp_path_factory.mktemp("dense") / "out"
    compress(switch, stats, out, experts=1, export="dense")
    return out


@pytest.mark.parametrize(
    ("which", "kind"),
    [
        ("switch", SwitchTransformersForConditionalGeneration),
        ("native", SwitchTransformersForConditionalGeneration),
        ("dense", T5ForConditionalGeneration),
    ],
)
def test_a_stock_checkpoint_loads_as_its_stock_class(which, kind, request):
    path = request.getfixturevalue(which)
    model = load(path)
    assert type(model) is kind
    stock = kind.from_pretrained(path, attn_implementation="eager").eval()
    assert torch.equal(logits_of(model, BATCH), logits_of(stock, BATCH))


def test_an_exact_checkpoint_loads_as_the_packages_own_class(switch, exact):
    model = load(exact)
    assert type(model) is MsmoeSwitchForConditionalGeneration
    expected = logits_of(with_merged_experts(switch, exact), BATCH)
    torch.testing.assert_close(logits_of(model, BATCH), expected, rtol=2e-5, atol=2e-5)


def test_code_in_the_folder_is_not_run(exact, tmp_path):
    copy = shutil.copytree(exact, tmp_path / "copy")
    for file in copy.glob("*.py"):
        file.write_text("raise SystemExit('code of the folder ran')\n")
    assert torch.equal(logits_of(load(copy), BATCH), logits_of(load(exact), BATCH))


def test_a_model_is_loaded_in_evaluation_mode(exact):
    assert not any(module.training for module in load(exact).modules())


def test_weights_are_float32_unless_asked_for_otherwise(tmp_path):
    half = save_switch(tmp_path / "half", dtype=torch.bfloat16)
    dtypes = {kind: {p.dtype for p in load(half, dtype=kind).parameters()} for kind in (torch.float32, "auto")}
    assert dtypes == {torch.float32: {torch.float32}, "auto": {torch.bfloat16}}


def test_an_unknown_architecture_is_refused_by_name(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(UserError, match="architecture 'mixtral'; loadable: switch_transformers, msmoe_switch"):
        load(copied)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint folder at .*nowhere"):
        load(tmp_path / "nowhere")


def test_damaged_weights_are_refused_before_anything_is_loaded(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        load(copied)
