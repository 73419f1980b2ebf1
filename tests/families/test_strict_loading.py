"""Every parameter of a loaded model comes from the file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYERS, load_tensors, logits_of, random_records

import msmoe
from msmoe.checkpoint import Checkpoint
from msmoe.errors import MsmoeWarning, UserError
from msmoe.families import family_of
from msmoe.families.loading import load


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.2.layer.0.SelfAttention.q.weight",
        "decoder.final_layer_norm.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "shared.weight",
    ],
)
def test_a_tensor_that_the_file_lacks_is_named(name, copied):
    edit(copied, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(UserError, match=f"lacks tensor {name}"):
        load(copied)


def test_a_prefix_of_a_wrapper_is_recognised(copied):
    edit(copied, lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"lacks tensors .*: its names begin with 'module\.'"):
        load(copied)


@pytest.mark.parametrize("values", [{"num_layers": 2}, {"num_layers": 6}, {"num_decoder_layers": 2}])
def test_a_configuration_with_another_number_of_blocks_is_refused(values, copied):
    edit_config(copied, **values)
    (name, number) = next(iter(values.items()))
    with pytest.raises(UserError, match=f"says {name} {number}, the weights have 4 blocks"):
        load(copied)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_any_name_of_the_tied_embeddings_will_do(kept, switch, copied):
    edit(copied, lambda tensors: tensors.update({kept: tensors.pop("shared.weight")}))
    records = random_records(3)
    assert torch.allclose(logits_of(load(copied), records), logits_of(load(switch), records), atol=1e-5)


def test_tied_embeddings_with_different_values_are_refused(copied):
    edit(copied, lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"] + 1}))
    with pytest.raises(UserError, match=r"ties .*shared.weight.* but their values differ|ties .*lm_head"):
        load(copied)


def test_what_the_model_does_not_use_is_named(copied, switch):
    edit(copied, lambda tensors: tensors.update({"adapter.weight": torch.ones(2)}))
    records = random_records(3)
    with pytest.warns(MsmoeWarning, match="holds tensor adapter.weight, which the model does not use"):
        model = load(copied)
    assert torch.allclose(logits_of(model, records), logits_of(load(switch), records), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"decoder_start_token_id": None}, "has no decoder_start_token_id"),
        ({"pad_token_id": None}, "pad_token_id is null"),
        ({"pad_token_id": 64}, "pad_token_id must be a token id from 0 to 63, it is 64"),
        ({"eos_token_id": [1, -1]}, "eos_token_id must be a token id"),
        ({"decoder_start_token_id": "0"}, "decoder_start_token_id must be a token id"),
        ({"dtype": "nope"}, "dtype must be one of .*, it is 'nope'"),
        ({"d_ff": 63}, r"has shape \[24, 16\], the configuration asks for \[63, 16\]"),
        ({"d_ff": "24"}, "d_ff must be an integer above 0, it is '24'"),
        ({"d_model": True}, "d_model must be an integer above 0, it is True"),
        ({"num_heads": 0}, "num_heads must be an integer above 0, it is 0"),
        ({"num_heads": 3}, "the configuration asks for"),
        ({"vocab_size": 65}, r"shared.weight has shape \[64, 16\], the configuration asks for \[65, 16\]"),
        ({"expert_capacity": 2.5}, "expert_capacity must be an integer above 0, it is 2.5"),
        ({"dropout_rate": 1}, "dropout_rate must be at least 0 and below 1, it is 1"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be a number of at least 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"router_dtype": "float8"}, "config.json describes no model: .*router_dtype"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config"),
        ({"dense_act_fn": "gelu"}, "have dense_act_fn 'gelu'; relu is supported"),
        ({"num_experts": 5}, r"has shape \[6, 16\], the configuration asks for \[5, 16\]"),
    ],
)
def test_a_value_of_the_configuration_that_cannot_be_is_one_line(values, complaint, copied):
    edit_config(copied, **values)
    with pytest.raises(UserError, match=complaint) as caught:
        load(copied)
    assert len(str(caught.value).splitlines()) == 1


# ---- dtypes


@pytest.mark.parametrize(("wi", "wo"), [("float16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float16")])
@pytest.mark.parametrize("export", ["exact", "native"])
def test_two_dtypes_in_a_layer_keep_their_values(export, wi, wo, copied, data, tmp_path):
    """Every expert kept: each stored matrix must be the original's, value for value."""

    def change(tensors):
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].to(getattr(torch, wi if ".wi." in name else wo))
            if name == f"{LAYERS[0]}.experts.expert_3.wi.weight":  # one expert differs from the others
                tensors[name] = tensors[name].to(getattr(torch, wo))

    edit(copied, change)
    stats = msmoe.profile(copied, data)
    plan = msmoe.plan(copied, stats, method="full", export=export)
    msmoe.apply(copied, plan, tmp_path / "out", stats=stats, export=export)
    before, after = load_file(copied / "model.safetensors"), load_tensors(tmp_path / "out")
    for layer in LAYERS:
        for e in range(6):
            for matrix in ("wi", "wo"):
                original = before[f"{layer}.experts.expert_{e}.{matrix}.weight"]
                key = f"{layer}.experts.expert_{e}.{matrix}.weight"
                stored = after[f"{layer}.experts.{matrix}"][e] if export == "exact" else after[key]
                assert torch.equal(stored.float(), original.float())
    records = random_records(3)
    assert torch.allclose(logits_of(load(tmp_path / "out"), records), logits_of(load(copied), records), atol=1e-5)


def test_a_layer_of_one_dtype_is_stored_in_it(copied, data, tmp_path):
    half = lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if ".wo." in n})
    edit(copied, half)
    checkpoint = Checkpoint(copied)
    layers = family_of(checkpoint).layers(checkpoint)
    assert [layer.dtypes for layer in layers] == [{"wi": "F32", "output": "BF16"}] * len(layers)
    stats = msmoe.profile(copied, data)
    msmoe.apply(copied, msmoe.plan(copied, stats, experts=3), tmp_path / "out", stats=stats)
    out = Checkpoint(tmp_path / "out")
    assert out.spec(f"{LAYERS[1]}.experts.wi").dtype == "F32"
    assert out.spec(f"{LAYERS[1]}.experts.wo").dtype == "BF16"


def test_an_adapter_beside_the_weights_is_refused(copied):
    (copied / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))
    with pytest.raises(UserError, match=r"holds an adapter beside the weights \(adapter_config\.json\): merge it"):
        load(copied)


def test_a_stored_wish_for_tuples_does_not_reach_what_runs(copied, switch, data):
    edit_config(copied, return_dict=False)
    assert msmoe.evaluate(copied, data).metrics == msmoe.evaluate(switch, data).metrics


def test_integers_are_not_taken_for_weights(copied):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    edit(copied, lambda tensors: tensors.update({name: (tensors[name] * 100).to(torch.int8)}))
    with pytest.raises(UserError, match=f"{name} is I8, expected one of F64, F32, F16, BF16: quantised weights"):
        load(copied)
