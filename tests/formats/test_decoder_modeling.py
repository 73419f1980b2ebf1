"""Exact decoders against the stock model whose experts are the stored ones, loaded with the code beside the weights."""

import json

import pytest
import torch
from exact_decoders import FAMILIES, build, write_exact
from transformers import AutoModelForCausalLM

import msmoe  # noqa: F401  the Auto classes know the folders
from msmoe.formats.modeling.modeling_msmoe_decoder import HOW_TO_LOAD, Factors, grouped_linear

IDS = torch.arange(3, 51).view(2, 24) * 7 % 93 + 3
WITHOUT_FACTORS = {"longcat_flash", "dbrx", "jetmoe"}
WITHOUT_CONSTANTS = {"longcat_flash", "llama4_text", "jetmoe"}
KINDS = {
    "map": ({}, set()),
    "rows": ({"rows": True}, set()),
    "factors": ({"factors": (3, 2)}, WITHOUT_FACTORS),
    "constants": ({"constants": 2}, WITHOUT_CONSTANTS),
}


def load_exact(path, **options):
    """The model, every parameter of it from the file."""
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_stock_model_with_the_stored_experts(family, kind, tmp_path):
    options, refused = KINDS[kind]
    if family in refused:
        pytest.skip(f"no {kind} for {family}")
    exact = write_exact(family, tmp_path / "exact", **options)
    model, expected = load_exact(exact.path), exact.expected(IDS)
    assert float((logits_of(exact.original) - expected).abs().max()) > 0.01 * float(expected.abs().max())
    close(logits_of(model), expected)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "gemma4_text", "llama4_text", "bailing_hybrid", "inkling2_text"]
)
def test_saved_and_loaded_again_it_is_the_same_model(family, tmp_path):
    model = load_exact(write_exact(family, tmp_path / "exact", factors=(4, 0)).path)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load_exact(tmp_path / "saved")), logits_of(model))
    code = "modeling_msmoe_decoder.py"
    assert (tmp_path / "saved" / code).read_text() == (tmp_path / "exact" / code).read_text()
    assert HOW_TO_LOAD in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["map", "factors", "constants"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_implementations_of_experts_agree(family, kind, tmp_path):
    exact = write_exact(family, tmp_path / "exact", **KINDS[kind][0])
    expected = exact.expected(IDS)
    for name in ("eager", "grouped_mm", "batched_mm"):
        close(logits_of(load_exact(exact.path, experts_implementation=name)), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_every_stored_expert_that_is_used_gets_a_gradient(family, tmp_path):
    options = {"factors": (3, 2)} | ({} if family == "llama4_text" else {"constants": 2})
    model = load_exact(write_exact(family, tmp_path / "exact", **options).path)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    stored = {name: p.grad for name, p in model.named_parameters() if ".experts." in name}
    assert stored
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in stored.values()), stored.keys()


def test_gradients_of_the_factors_are_those_of_the_dense_matrices_by_the_chain_rule(tmp_path):
    exact = write_exact("qwen3_moe", tmp_path / "exact", factors=(3, 2))
    model = load_exact(exact.path)
    for each in (model, exact.reference):
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    experts = model.model.layers[1].mlp.experts
    dense = exact.reference.model.layers[1].mlp.experts.down_proj.grad  # (E, O, I)
    shared = torch.zeros(experts.num_groups, *dense.shape[1:]).index_add(0, experts.expert_map, dense)
    close(experts.down_proj.U.grad, shared @ experts.down_proj.V.mT)  # y = U V x
    rows = experts.down_proj.rows.long()[..., None].expand_as(experts.down_proj.S)
    close(experts.down_proj.S.grad, shared.gather(1, rows))


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 12), (7, 12), (8, 5), (3, 1)])
def test_a_grouped_product_of_any_shape_is_the_product_of_each_group(outputs, inputs):
    torch.manual_seed(0)
    weight, x = torch.randn(4, outputs, inputs), torch.randn(9, inputs)
    offsets = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    expected = torch.cat([x[:3] @ weight[0].T, x[3:8] @ weight[2].T, x[8:] @ weight[3].T])
    close(grouped_linear(x, weight, offsets), expected)
    close(grouped_linear(x, weight.mT.contiguous(), offsets, transposed=True), expected)


def test_a_hand_worked_factorised_matrix():
    factors = Factors(1, 3, 2, 1, 1)
    with torch.no_grad():
        factors.U.copy_(torch.tensor([[[1.0], [2.0], [0.0]]]))
        factors.V.copy_(torch.tensor([[[1.0, -1.0]]]))
        factors.S.copy_(torch.tensor([[[10.0, 20.0]]]))
        factors.rows.fill_(2)
    # V x = 3 - 1 = 2, U V x = (2, 4, 0), and row 2 gets 10 * 3 + 20 * 1
    x, group, offsets = torch.tensor([[3.0, 1.0]]), torch.tensor([0]), torch.tensor([1], dtype=torch.int32)
    assert factors(x, group, offsets).tolist() == [[2, 4, 50]]
    assert factors.dense().tolist() == [[[1, -1], [2, -2], [10, 20]]]


def test_tokens_of_which_all_experts_are_constants_get_constants(tmp_path):
    exact = write_exact("qwen3_moe", tmp_path / "exact", constants=1)
    experts = load_exact(exact.path).model.layers[0].mlp.experts
    index = torch.tensor([[0, 3], [6, 0]])  # rows of the constant
    with torch.no_grad():
        outputs = experts(torch.randn(2, 32), index, torch.tensor([[0.5, 0.25], [1.0, 2.0]]))
    close(outputs, torch.stack([0.75 * experts.constants[0], 3 * experts.constants[0]]))


def test_bfloat16_is_loaded_as_stored(tmp_path):
    exact = write_exact("qwen3_moe", tmp_path / "exact", factors=(3, 2), dtype=torch.bfloat16)
    model = load_exact(exact.path, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    close(logits_of(model), exact.expected(IDS), tolerance=0.05)


@pytest.mark.parametrize(("family", "entry", "said"), [
    ("longcat_flash", {"factors": {"down_proj": [3, 2]}}, "factorised matrices are not supported for LongcatFlashExp"),
    ("llama4_text", {"constants": 1}, "constant outputs are not supported for Llama4TextExperts"),
    ("jetmoe", {"constants": 1}, "are not supported for JetMoeMoE"),
])  # fmt: skip
def test_what_a_family_cannot_have_is_refused(family, entry, said, tmp_path):
    exact = write_exact(family, tmp_path / "exact")
    config = json.loads((exact.path / "config.json").read_text())
    name = next(name for name in config["msmoe"]["blocks"] if "attention" not in name)
    config["msmoe"]["blocks"][name] |= entry
    (exact.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        load_exact(exact.path)


def test_counts_in_per_layer_config_are_left_to_the_file(tmp_path):
    exact = write_exact("qwen3_moe", tmp_path / "exact")
    place = exact.path / "config.json"
    place.write_text(place.read_text().replace('"msmoe"', '"per_layer_config": {"0": {"num_experts": 3}}, "msmoe"'))
    close(logits_of(load_exact(exact.path)), exact.expected(IDS))


def test_stock_models_stay_what_they_are(tmp_path):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(again) is type(model)
    assert type(again.config) is type(model.config)
    assert torch.equal(logits_of(again), logits_of(model))
