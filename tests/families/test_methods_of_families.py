"""Eight families and the table of methods: each method on each family writes what it planned, or says why it cannot.

Shapes: T tokens, E experts, K experts of a token.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_switch, load_tensors, random_records, size_of, write_records
from tiny_decoders import build

from msmoe.calibration.batches import collate, record_key
from msmoe.calibration.output_gradients import log_likelihood
from msmoe.calibration.profile import profile
from msmoe.calibration.records import TokenRecord
from msmoe.calibration.stats import Stats
from msmoe.calibration.tokenizer import special_tokens
from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.compression.layer_errors import layer_errors, refit_errors
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.families.generic import GENERIC
from msmoe.families.loading import load
from msmoe.families.names import number_of
from msmoe.families.protocol import load_expert
from msmoe.forecasting.run import forecast
from msmoe.formats.verify import has_reference, reference_model, trial
from msmoe.planning.methods import METHODS
from msmoe.planning.plan import check_layer
from msmoe.planning.planner import Planner, check_request

NUM_EXPERTS, KEPT = 8, 4
EVEN = {"budget": "uniform", "keep_layers": ["none"]}
SMALL_SWITCH = {
    "num_experts": NUM_EXPERTS, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}  # fmt: skip
DECODERS: dict[str, dict] = {
    "mixtral": {}, "qwen3_moe": {}, "olmoe": {}, "gpt_oss": {}, "llama4_text": {},
    "deepseek_v3": {"n_group": 1, "first_k_dense_replace": 0}, "glm4_moe": {"first_k_dense_replace": 0},
}  # fmt: skip
FAMILIES = ("switch_transformers", *DECODERS)
EXPORTS = ("native", "exact")

UNASKED = "cannot ask the router of .*: its weights multiply what goes into the experts"
CANNOT = (  # families, methods, exports -> why
    (DECODERS.keys() - {"llama4_text"}, {"dense"}, {"native"}, "cannot hold 1 experts.*each token goes to 2"),
    (set(FAMILIES), {"mone"}, {"native"}, "cannot store mean outputs in place of experts"),
    ({"llama4_text"}, {"mone"}, {"exact"}, "constant outputs are not supported for Llama4TextExperts"),
    ({"llama4_text"}, {"task-specific", "naee", "hc-smoe", "hc-smoe-refit", "sub-moe", "ream"}, set(EXPORTS), UNASKED),
    ({"llama4_text"}, {"frequency-refit", "reap-refit", "m-smoe-refit", "mc-smoe-refit"}, {"native"}, UNASKED),
)  # fmt: skip


def why_not(family: str, method: str, export: str) -> str | None:
    """What the refusal of a method says; None where it works."""
    return next((why for of, names, to, why in CANNOT if family in of and method in names and export in to), None)


def turn(family: str, method: str, length: int) -> int:
    """Which of so many equal parts of the pairs a pair belongs to."""
    return (FAMILIES.index(family) + list(METHODS).index(method)) % length


ALL = [(family, method) for family in FAMILIES for method in METHODS]
CASES = [(family, method, "native") for family, method in ALL]
CASES += [(family, method, "exact") for family, method in ALL if family == "qwen3_moe" or turn(family, method, 3) == 0]
ALL_KEPT = [(f, m, EXPORTS[turn(f, m, 6)]) for f, m in ALL if turn(f, m, 6) < 2 and METHODS[m].fixed != "one"]
ALL_KEPT = [case for case in ALL_KEPT if why_not(*case) != UNASKED]
WORKING = [case for case in CASES if why_not(*case) is None]
REFUSED = [(f, m, e) for f, m in ALL for e in EXPORTS if why_not(f, m, e) is not None]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, its logits for a few tokens, its calibration data and what was recorded on them."""

    path: Path
    logits: torch.Tensor
    data: Path
    stats: Stats
    planner: Planner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@lru_cache(maxsize=len(FAMILIES))
def case_of(family: str, folder: Path) -> Case:
    """Statistics with everything that the family can give."""
    path = folder / family / "original"
    build_model(family).save_pretrained(path)
    data = records_for(family, folder / f"{family}.jsonl")
    stats = profile(path, data, batch_size=8, fisher=24, gradients=True)
    return Case(path, trial(load(path)), data, stats, Planner(path, stats))


def build_model(family: str):
    if family == "switch_transformers":
        return build_switch(**SMALL_SWITCH)
    return build(family, num_hidden_layers=2, **DECODERS[family])


def records_for(family: str, path: Path) -> Path:
    records = random_records(24)
    if family != "switch_transformers":  # a decoder reads one sequence
        records = [{"input_ids": r["input_ids"] + r["labels"]} for r in records]
    return write_records(path, records)


def read_ids(case: Case) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in case.data.read_text().splitlines()]


def planned(case: Case, method: str, export: str, *, experts: int = KEPT, **choices):
    asked = {} if METHODS[method].fixed else {"experts": experts}
    return case.planner.plan(method, export=export, **EVEN, **asked, **choices)


def written(case: Case, plan, export: str, out: Path, **options):
    return apply(case.path, plan, out, stats=case.stats, export=export, workers=1, **options)


@pytest.mark.parametrize(("family", "method", "export"), WORKING)
def test_a_method_writes_what_it_planned(family, method, export, folder, tmp_path):
    case = case_of(family, folder)
    plan = planned(case, method, export)
    count = {"all": NUM_EXPERTS, "one": 1, None: KEPT}[METHODS[method].fixed]
    for name, layer in plan.layers.items():
        check_layer(name, layer)  # raises unless groups and removed experts are a partition
        assert len(layer.groups) == count
    router = "dominant" if turn(family, method, 3) else "fit"
    report = written(case, plan, export, tmp_path / "out", router=router)
    assert plan.predicted == {"bytes": report.num_bytes, "num_parameters": report.num_parameters}
    assert plan.predicted["bytes"] == size_of(tmp_path / "out")
    logits = trial(load(tmp_path / "out"))
    assert logits.isfinite().all()
    if export == "exact" and has_reference(case.path, tmp_path / "out"):
        expected = trial(reference_model(case.path, tmp_path / "out"))
        assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("family", "method", "export"), REFUSED)
def test_what_a_family_cannot_do_is_refused_with_its_reason(family, method, export, folder):
    with pytest.raises(UserError, match=why_not(family, method, export)):
        planned(case_of(family, folder), method, export)


@pytest.mark.parametrize(("family", "method", "export"), ALL_KEPT)
def test_keeping_every_expert_keeps_every_tensor(family, method, export, folder, tmp_path):
    case = case_of(family, folder)
    plan = planned(case, method, export, experts=NUM_EXPERTS)
    assert all(len(group.members) == 1 for layer in plan.layers.values() for group in layer.groups)
    written(case, plan, export, tmp_path / "out")
    if export == "native" and plan.parameters.factors is None:
        before, after = load_file(case.path / "model.safetensors"), load_tensors(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert (trial(load(tmp_path / "out")) - case.logits).norm() <= 1e-5 * case.logits.norm()


# reload without the package

RELOAD = """
import json, sys
sys.modules["msmoe"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

for folder, kind in json.loads(sys.argv[1]):
    auto = AutoModelForSeq2SeqLM if kind == "switch_transformers" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        logits = model(input_ids=ids, labels=ids.flip(1), use_cache=False).logits
        more = model.generate(ids[:1, 3:], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    torch.save({"logits": logits, "generated": more}, f"{folder}/said.pt")
"""


@pytest.fixture(scope="module")
def reloaded(folder, tmp_path_factory):
    """Family and export -> a written checkpoint, which one process without the package has run."""
    found = {}
    for family in FAMILIES:
        case = case_of(family, folder)
        for export in EXPORTS:
            out = folder / family / f"{family}-{export}"
            written(case, planned(case, "m-smoe", export), export, out)
            found[family, export] = out
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")), "HF_HUB_OFFLINE": "1"}
    listed = json.dumps([(str(out), family) for (family, _), out in found.items()])
    subprocess.run([sys.executable, "-c", RELOAD, listed], check=True, env=environment, capture_output=True)
    return found


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_the_package_computes_and_generates_the_same(family, export, reloaded):
    out = reloaded[family, export]
    said = torch.load(out / "said.pt")
    expected = trial(load(out))
    assert (said["logits"] - expected).norm() <= 1e-5 * expected.norm()
    assert said["generated"].shape[1] == (4 if family == "switch_transformers" else 8)


# planted duplicates


def save_doubled(family: str, path: Path) -> Path:
    """A checkpoint in which every second expert is a copy of the one before it, its neurons in another order."""
    build_model(family).save_pretrained(path / "single")
    source = Checkpoint(path / "single")
    adapter = family_of(source)
    model = load(source)
    generator = torch.Generator().manual_seed(3)
    state = model.state_dict()
    for layer in adapter.layers(source):
        for e in range(0, NUM_EXPERTS, 2):
            copied = load_expert(adapter, source, layer.name, e)
            copied = copied.permuted(torch.randperm(layer.d_ff, generator=generator))
            for part in adapter.memory_parts(source, layer.name, e + 1):
                part.place_in(state[part.key]).copy_(part.join(copied.weights))
    for name, axis in rows_of(family, source).items():
        assert axis == 0
        state[name][1::2] = state[name][::2]
    model.save_pretrained(path / "doubled")
    return path / "doubled"


def rows_of(family: str, source: Checkpoint) -> dict[str, int]:
    """Tensor with an entry per expert beside their weights -> its axis."""
    if family == "switch_transformers":
        return {family_of(source).router_key(source, layer.name): 0 for layer in family_of(source).layers(source)}
    return {name: axis.dim for block in GENERIC.discover(source).blocks for name, axis in block.per_expert.items()}


@pytest.fixture(scope="module")
def doubled(folder):
    """Family -> checkpoint of copies, statistics of it, and a plan that merges every pair."""

    @lru_cache(maxsize=len(FAMILIES))
    def make(family: str):
        path = save_doubled(family, folder / family)
        stats = profile(path, folder / f"{family}.jsonl", batch_size=8)
        case = Case(path, trial(load(path)), folder / f"{family}.jsonl", stats, Planner(path, stats))
        plan = planned(case, "m-smoe", "exact", similarity="weight", grouping="hierarchical")
        return case, plan

    for family in FAMILIES:
        case_of(family, folder)  # writes the data
    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_merged_with_each_other_and_nothing_is_lost_in_exact(family, doubled, tmp_path):
    case, plan = doubled(family)
    for layer in plan.layers.values():
        assert {group.members for group in layer.groups} == {(e, e + 1) for e in range(0, NUM_EXPERTS, 2)}
    written(case, plan, "exact", tmp_path / "out")
    assert (trial(load(tmp_path / "out")) - case.logits).norm() <= 1e-5 * case.logits.norm()


@pytest.mark.parametrize("family", DECODERS)
def test_copies_are_merged_without_loss_in_native_with_half_as_many_experts_per_token(family, doubled, tmp_path):
    """A token goes to both copies of one expert, or, of one expert per token, to either at the same weight.

    The top K of tied rows are whole pairs, and the weights of a pair add up to what K / 2 of the merged rows give:
    softmax over the chosen or over all, and normalised sigmoid. Llama 4 has K = 1, and a weight of its own row alone.
    Switch is not among them: its softmax runs over twice as many rows, so its gate values double.
    """
    case, plan = doubled(family)
    written(case, plan, "native", tmp_path / "out", router="dominant")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for name in ("num_experts_per_tok", "experts_per_token"):
        if config.get(name, 1) > 1:
            config[name] //= 2
    path.write_text(json.dumps(config))
    assert (trial(load(tmp_path / "out")) - case.logits).norm() <= 1e-5 * case.logits.norm()


# refits, layer errors, forecasts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_does_not_raise_the_error_of_a_layer(family, folder, tmp_path):
    case = case_of(family, folder)
    export = "exact" if family == "llama4_text" else "native"
    outs = {}
    for method in ("m-smoe", "m-smoe-refit"):
        outs[method] = written(case, planned(case, method, export), export, tmp_path / method)
    if family == "llama4_text":  # its layers cannot be run from files alone
        found = refit_errors(outs["m-smoe-refit"].groups)
        assert set(found) == set(case.stats.layers)
        assert all(after <= before for before, after in found.values())
        with pytest.raises(UserError, match="its router cannot be asked"):
            layer_errors(case.path, tmp_path / "m-smoe", case.stats)
        return
    measured = [layer_errors(case.path, tmp_path / method, case.stats, stable_ranks=False) for method in outs]
    for plain, refitted in zip(*(errors.values() for errors in measured), strict=True):
        assert 0 < refitted.error <= plain.error


@pytest.mark.parametrize("export", EXPORTS)
def test_layer_errors_are_those_of_the_running_models(export, folder, tmp_path):
    """The first layer sees the same tokens in both models: what its experts add differs as the layer error says."""
    case = case_of("qwen3_moe", folder)
    written(case, planned(case, "m-smoe-refit", export), export, tmp_path / "out")
    found = layer_errors(case.path, tmp_path / "out", case.stats, every=True, stable_ranks=False)
    first = next(iter(found))
    given = []
    for path in (case.path, tmp_path / "out"):
        model, outputs = load(path), []
        model.get_submodule(first).register_forward_hook(lambda module, args, out, to=outputs: to.append(out[0]))
        with torch.inference_mode():
            for ids in read_ids(case):
                model(input_ids=torch.tensor([ids]))
        given.append(torch.cat([out.reshape(-1, out.shape[-1]) for out in outputs]))
    original, compressed = given
    expected = (compressed - original).square().sum() / original.square().sum()
    assert found[first].error == pytest.approx(float(expected), rel=1e-4)
    assert found[first].num_tokens == len(original)


def test_a_forecast_of_a_decoder_ends_at_no_error(folder):
    case = case_of("qwen3_moe", folder)
    for layer in forecast(case.path, case.stats, method="m-smoe-refit", sizes=[2, 4, 8], workers=1).layers.values():
        assert layer.output_error[0] > layer.output_error[1] > layer.output_error[2] == 0
        assert layer.kl[0] > layer.kl[2] == 0


def test_a_forecast_of_pruning_starts_at_the_experts_that_a_token_needs(folder):
    case = case_of("qwen3_moe", folder)
    found = forecast(case.path, case.stats, method="frequency", workers=1)
    assert {layer.sizes for layer in found.layers.values()} == {(2, 3, 4, 5, 6, 7, 8)}


def test_a_forecast_of_a_router_that_cannot_be_asked_is_refused(folder):
    case = case_of("llama4_text", folder)
    with pytest.raises(UserError, match="its router cannot be asked"):
        forecast(case.path, case.stats, method="m-smoe", sizes=[4])


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_factors_multiplied_out_are_the_model_of_the_factors(family, folder, tmp_path):
    """With biases, transposed and interleaved, or a tensor for each expert."""
    case = case_of(family, folder)
    logits = {}
    for export in EXPORTS:
        factorize(case.path, tmp_path / export, stats=case.stats, rank=8, export=export, workers=1)
        logits[export] = trial(load(tmp_path / export))
    assert (logits["exact"] - logits["native"]).norm() <= 1e-5 * logits["native"].norm()
    assert (logits["native"] - case.logits).norm() > 1e-3 * case.logits.norm()
    biases = [name for name in load_tensors(case.path) if "experts" in name and name.endswith("bias")]
    assert bool(biases) == (family == "gpt_oss")
    for export in EXPORTS:
        before, after = load_tensors(case.path), load_tensors(tmp_path / export)
        assert all(torch.equal(before[name], after[name]) for name in biases)


# what calibration records


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradient_grams_are_inner_products_of_the_experts_gradients(family, folder):
    """Record by record; experts read out of the fused parameters by hand."""
    case = case_of(family, folder)
    model = load(case.path)
    for tokens in read_ids(case):
        ids = torch.tensor([tokens])
        log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        (-log_probabilities.gather(1, ids[0, 1:, None]).sum()).backward()
    for name, layer in case.stats.layers.items():
        parameters = model.get_submodule(f"{name}.experts").parameters()
        flat = [(p.grad.flatten(1).double(), p.detach().flatten(1).double()) for p in parameters]
        gram = sum(g @ g.T for g, _ in flat)
        scaled = sum((g * w) @ (g * w).T for g, w in flat)
        torch.testing.assert_close(layer.gradient_gram, gram, rtol=1e-3, atol=1e-4 * float(gram.max()))
        torch.testing.assert_close(layer.weight_gradient_gram, scaled, rtol=1e-3, atol=1e-4 * float(scaled.max()))


def test_tokens_of_a_decoder_are_counted_once(folder):
    case = case_of("qwen3_moe", folder)
    lengths = [len(ids) for ids in read_ids(case)]
    described = case.stats.data
    assert described["num_tokens"] == sum(lengths)
    assert described["num_targets"] == sum(lengths) - len(lengths)  # nothing predicts the first of a record
    assert all(layer.num_tokens == sum(lengths) for layer in case.stats.layers.values())


def test_outputs_of_experts_that_get_every_token_are_those_of_the_chosen_ones(folder):
    """Llama 4: sums over tokens of what the expert that a token goes to makes of its input, read from disk."""
    case = case_of("llama4_text", folder)
    source = Checkpoint(case.path)
    for name, layer in case.stats.layers.items():
        sample = layer.tokens()
        for e in range(NUM_EXPERTS):
            given = load_expert(GENERIC, source, name, e)(sample.inputs[sample.of(e)[0]]).double()
            torch.testing.assert_close(layer.output_sum[e], given.sum(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.output_norm_sum[e], given.norm(dim=1).sum(), rtol=1e-5, atol=1e-6)


def test_output_gradients_of_experts_that_get_every_token_are_those_of_the_block(folder):
    """Llama 4: what the block adds is linear in the outputs of its experts, so both have the same gradient."""
    case = case_of("llama4_text", folder)
    model = load(case.path)
    special = special_tokens(model.config.to_dict(), "config")
    records = [TokenRecord(ids, [-100, *ids[1:]]) for ids in read_ids(case)]
    for name, layer in case.stats.layers.items():
        sample, leaves = layer.tokens(), []

        def add(module, args, out, leaves=leaves):
            leaves.append(torch.zeros_like(out[0], requires_grad=True))
            return out[0] + leaves[-1], out[1]

        handle = model.get_submodule(name).register_forward_hook(add)
        for record in records[:3]:
            key = record_key(record)
            leaves.clear()
            log_likelihood(model, collate([record], pad_id=special.pad_id), [key], seed=0).backward()
            at = sample.record == key
            wanted = leaves[0].grad.reshape(len(record.input_ids), -1)[sample.position[at]]
            torch.testing.assert_close(sample.output_gradient[at], wanted, rtol=1e-3, atol=1e-6)
        handle.remove()


def test_a_sequential_refit_of_a_decoder_is_refused(folder):
    with pytest.raises(UserError, match="--refit sequential is for encoder-decoder models: choose independent"):
        planned(case_of("qwen3_moe", folder), "m-smoe", "exact", refit="sequential")


@pytest.mark.parametrize(
    ("family", "method", "why"),
    [
        ("muse_spark_text", "m-smoe-refit", "--refit independent cannot solve for .*: a norm follows each expert"),
        ("jetmoe", "m-smoe", "method m-smoe merges experts, but .*: experts of an attention can be pruned only"),
        ("jetmoe", "reap", "method reap needs the outputs of the experts .*not called with choices"),
    ],
)
def test_what_no_layer_can_give_is_refused_before_calibration(family, method, why, tmp_path):
    build(family).save_pretrained(tmp_path / "original")
    source = Checkpoint(tmp_path / "original")
    asked = {"export": None, "router": "fit", "keep_layers": None, "experts": KEPT}
    check_request(GENERIC, source, method="frequency", **asked)
    with pytest.raises(UserError, match=why):
        check_request(GENERIC, source, method=method, **asked)


def test_gradients_at_outputs_that_cannot_be_seen_are_refused_before_the_model_runs(tmp_path):
    build("jetmoe").save_pretrained(tmp_path / "original")
    records = [{"input_ids": [3, 4, 5]}]
    with pytest.raises(UserError, match=r"--fisher needs the outputs of the experts of .*not called with"):
        profile(tmp_path / "original", records, fisher=1)


def test_the_number_of_a_single_stored_expert_is_found_by_the_rule_that_reads_it():
    name = "model.layers.3.block_sparse_moe.experts.0.w1.weight"
    assert number_of([name], "block_sparse_moe.experts.*.w1.weight") == 5  # w1 is no number of an expert
