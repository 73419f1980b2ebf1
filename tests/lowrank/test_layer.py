"""From calibration tokens to factors: which tokens count, how much, and what is solved with them."""

import json

import pytest
import torch
from tiny import LAYERS, load_tensors, profile_small, stored_stack

from msmoe.checkpoint import Checkpoint
from msmoe.compression.factorize import expert_maps, factorize
from msmoe.families import inspectable_family_of
from msmoe.layer.expert import switch_expert
from msmoe.lowrank import layer as factorize_layer_module
from msmoe.lowrank.decompose import RIDGE
from msmoe.lowrank.layer import LEAST_SENSITIVITY, FactorSources, output_sensitivity
from msmoe.lowrank.options import FactorOptions
from msmoe.merge import refit_output
from msmoe.planning.plan import Plan


def tokens_by_hand(stats, layer: str, members: list[int]):
    """Inputs, gates, weights and held-out flags of the sampled tokens of some experts, one token at a time."""
    sample, dispatched = stats.layers[layer].tokens(), stats.layers[layer].dispatched
    chosen = [t for t in range(len(sample)) if int(sample.expert[t]) in members]
    counts = [int((sample.expert == e).sum()) for e in range(6)]
    weights = torch.tensor([float(dispatched[e]) / counts[e] for e in sample.expert[chosen, 0].tolist()])
    return sample.inputs[chosen], sample.gate[chosen, 0], weights, sample.held_out[chosen]


@pytest.fixture(scope="module")
def few(switch, data):
    """Statistics of `switch` in which a sampled token stands for several."""
    return profile_small(switch, data, token_sample=100)


@pytest.mark.parametrize("which", ["switch", "exact", "native"])
def test_a_stored_expert_is_weighed_by_the_tokens_of_its_members(which, request, few):
    source = Checkpoint(request.getfixturevalue(which))
    family = inspectable_family_of(source)
    sources = FactorSources(family, source, FactorOptions(), few, expert_maps(family, source, few))
    for layer in LAYERS:
        mapping = members_of(source.path, layer)
        assert len(sources.tokens(layer)) == len(mapping)
        for found, members in zip(sources.tokens(layer), mapping, strict=True):
            inputs, gate, weights, held_out = tokens_by_hand(few, layer, members)
            assert torch.equal(found.inputs, inputs)
            assert torch.equal(found.held_out, held_out)
            torch.testing.assert_close(found.weights.float(), weights)
            torch.testing.assert_close(found.scale[:, 0].square(), gate.square() * weights)


def members_of(folder, layer: str) -> list[list[int]]:
    """Stored expert -> experts of the original that it stands for."""
    layers = Plan.load(folder / "plan.json").layers if (folder / "plan.json").exists() else {}
    if layer not in layers:
        return [[e] for e in range(6)]
    return [list(g.members) for g in sorted(layers[layer].groups, key=lambda g: g.dominant)]


def test_sensitivity_is_how_far_an_error_of_the_pre_activation_moves_the_output():
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    expert, x, scale = switch_expert(randn(7, 5), randn(5, 7)), randn(60, 5), randn(60, 1).abs()
    found = output_sensitivity(expert, x, scale)
    step = 1e-4
    for neuron in range(7):
        before = x @ expert.inputs["wi"].T
        moved = before.clone()
        moved[:, neuron] += step
        difference = (moved.double().relu() - before.double().relu()) @ expert.output.T.double() / step * scale
        expected = float((difference.square().sum() / scale.double().square().sum()).sqrt())
        assert float(found[neuron]) == pytest.approx(expected, rel=1e-2)


def test_a_neuron_that_never_fires_keeps_a_little_sensitivity():
    expert = switch_expert(torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0, 4.0]]))
    x, scale = torch.ones(5, 1), torch.ones(5, 1)
    # the first neuron always fires: 3; the second never: a share of the mean of 3 and 0
    assert output_sensitivity(expert, x, scale).tolist() == pytest.approx([3, LEAST_SENSITIVITY * 1.5])


def test_an_expert_without_tokens_is_weighed_by_its_output_matrix():
    expert = switch_expert(torch.ones(2, 3), torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    none = torch.zeros(0, 3)
    assert output_sensitivity(expert, none, torch.zeros(0, 1)).tolist() == pytest.approx([5, 2])


def test_an_output_matrix_of_zeros_weighs_all_neurons_alike():
    expert = switch_expert(torch.ones(2, 3), torch.zeros(3, 2))
    assert output_sensitivity(expert, torch.ones(4, 3), torch.ones(4, 1)).tolist() == [1, 1]


@pytest.fixture(scope="module")
def by_activation(exact, stats, tmp_path_factory):
    """`exact` at rank 3 without kept rows and refit."""
    out = tmp_path_factory.mktemp("activation") / "out"
    factorize(exact, out, stats=stats, rank=3, keep_rows=0.0, refit=False)
    return out


def whitened_by_hand(weight, x, scale):
    """The best matrix of rank 3 for outputs on the tokens `x`, errors of an output counting by `scale`."""
    gram = x.double().T @ x.double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ values.sqrt().diag() @ vectors.T
    u, s, vt = torch.linalg.svd(scale.double()[:, None] * weight.double() @ root, full_matrices=False)
    return (u[:, :3] @ s[:3].diag() @ vt[:3] @ torch.linalg.inv(root) / scale.double()[:, None]).float()


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_wi_is_the_best_for_inputs_times_gates_and_errors_that_reach_the_output(layer, by_activation, exact, stats):
    before, after = load_tensors(exact), load_tensors(by_activation)
    stored = stored_stack(after, f"{layer}.experts.wi")
    for g, members in enumerate(members_of(exact, layer)):
        inputs, gate, weights, _ = tokens_by_hand(stats, layer, members)
        wi, wo = (before[f"{layer}.experts.{part}"][g] for part in ("wi", "wo"))
        count = gate.square() * weights
        active = (((inputs @ wi.T) > 0).float() * count[:, None]).sum(0) / count.sum()
        sensitivity = wo.norm(dim=0) * active.sqrt()
        sensitivity = sensitivity.clamp(min=LEAST_SENSITIVITY * float(sensitivity.mean()))
        expected = whitened_by_hand(wi, inputs * count.sqrt()[:, None], sensitivity)
        torch.testing.assert_close(stored[g], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_wo_is_the_best_for_hidden_activations_times_gates(layer, by_activation, exact, stats):
    before, after = load_tensors(exact), load_tensors(by_activation)
    stored = stored_stack(after, f"{layer}.experts.wo")
    for g, members in enumerate(members_of(exact, layer)):
        inputs, gate, weights, _ = tokens_by_hand(stats, layer, members)
        wi, wo = (before[f"{layer}.experts.{part}"][g] for part in ("wi", "wo"))
        hidden = (inputs @ wi.T).relu() * (gate * weights.sqrt())[:, None]
        expected = whitened_by_hand(wo, hidden, torch.ones(16))
        torch.testing.assert_close(stored[g], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row_score", ["activation", "magnitude"])
def test_the_plain_form_is_the_published_one(row_score, switch, tmp_path):
    factorize(switch, tmp_path / "out", rank=3, keep_rows=0.25, svd="plain", row_score=row_score)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    for layer in LAYERS[1:]:
        for matrix, num_rows in (("wi", 6), ("wo", 4)):
            for e, stored in enumerate(stored_stack(after, f"{layer}.experts.{matrix}")):
                weight = before[f"{layer}.experts.expert_{e}.{matrix}.weight"]
                u, s, vt = torch.linalg.svd(weight, full_matrices=False)
                expected = u[:, :3] @ s[:3].diag() @ vt[:3]
                kept = (weight - expected).norm(dim=1).topk(num_rows).indices.sort().values
                expected[kept] = weight[kept]
                assert after[f"{layer}.experts.{matrix}.rows"][e].tolist() == kept.tolist()
                torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-5)


def test_wo_is_solved_again_for_the_hidden_activations_that_the_truncated_wi_gives(exact, stats, tmp_path):
    report = factorize(exact, tmp_path / "out", stats=stats, rank=9, keep_rows=0.05)  # wo stays dense
    assert [matrix for _, matrix in report.dense] == ["wo"] * 3
    before, after = load_tensors(exact), load_tensors(tmp_path / "out")
    for layer in LAYERS[1:]:
        truncated = stored_stack(after, f"{layer}.experts.wi")
        for g, members in enumerate(members_of(exact, layer)):
            inputs, gate, weights, held_out = tokens_by_hand(stats, layer, members)
            expert = switch_expert(before[f"{layer}.experts.wi"][g], before[f"{layer}.experts.wo"][g])
            targets = torch.stack(
                [p * (expert.output @ (expert.inputs["wi"] @ x).relu()) for p, x in zip(gate, inputs, strict=True)]
            )
            refit = refit_output(
                switch_expert(truncated[g], expert.output), inputs, gate, targets, weights.double(), held_out
            )  # fmt: skip
            torch.testing.assert_close(after[f"{layer}.experts.wo"][g], refit.output, rtol=1e-3, atol=1e-4)
            entry = next(
                m for m in report.matrices if (m["layer"], m["expert"], m["matrix"]) == (layer, g, "wo")
            )  # fmt: skip
            assert entry["refit"]["ridge"] == refit.ridge
            assert entry["refit"]["error_after"] == pytest.approx(refit.error_after, rel=1e-3)


def test_without_refit_a_dense_matrix_is_copied_bit_for_bit(exact, stats, tmp_path):
    report = factorize(exact, tmp_path / "out", stats=stats, rank=9, keep_rows=0.05, refit=False)
    before, after = load_tensors(exact), load_tensors(tmp_path / "out")
    assert {m["refit"] for m in report.matrices if m["matrix"] == "wi"} == {None}
    for layer in LAYERS[1:]:
        assert torch.equal(after[f"{layer}.experts.wo"], before[f"{layer}.experts.wo"])


@pytest.fixture(scope="module")
def scarce(switch, data):
    """Statistics of one record: many experts saw nothing."""
    return profile_small(switch, data, samples=1)


def test_an_expert_that_no_token_reached_is_factorised_as_without_tokens(switch, scarce, tmp_path):
    report = factorize(switch, tmp_path / "out", stats=scarce, rank=3, keep_rows=0.0)
    before, after = load_tensors(switch), load_tensors(tmp_path / "out")
    idle = [(layer, e) for layer in LAYERS[1:] for e in range(6) if scarce.layers[layer].dispatched[e] == 0]
    assert len(idle) > 2
    for layer, e in idle:
        wo = before[f"{layer}.experts.expert_{e}.wo.weight"]
        u, s, vt = torch.linalg.svd(wo, full_matrices=False)
        expected = u[:, :3] @ s[:3].diag() @ vt[:3]
        torch.testing.assert_close(stored_stack(after, f"{layer}.experts.wo")[e], expected, rtol=1e-3, atol=1e-5)
        entries = [m for m in report.matrices if (m["layer"], m["expert"]) == (layer, e)]
        assert [entry["output_error"] for entry in entries] == [None, None]


def test_what_is_recorded_of_experts_without_tokens_is_standard_json(switch, scarce, tmp_path):
    factorize(switch, tmp_path / "out", stats=scarce, rank=3)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "out" / "msmoe.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("options", [{"rank": 4}, {"target_ratio": 0.75}])
def test_experts_done_one_at_a_time_come_out_as_experts_done_together(options, switch, stats, tmp_path, monkeypatch):
    factorize(switch, tmp_path / "together", stats=stats, **options)
    monkeypatch.setattr(factorize_layer_module, "CHUNK_VALUES", 1)
    factorize(switch, tmp_path / "alone", stats=stats, **options)
    one, other = load_tensors(tmp_path / "together"), load_tensors(tmp_path / "alone")
    for layer in LAYERS[1:]:
        for matrix in ("wi", "wo"):
            name = f"{layer}.experts.{matrix}"
            torch.testing.assert_close(stored_stack(one, name), stored_stack(other, name), rtol=1e-3, atol=1e-4)
