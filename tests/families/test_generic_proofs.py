"""Every decoder family of transformers, a tiny random model of each: read, listened to, pruned, loaded again.

Shapes: T tokens, K chosen experts of a token, E experts, D d_model.
"""

import copy
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoders import DECODERS, build, outputs, tokens
from torch.overrides import TorchFunctionMode

from msmoe.checkpoint.reader import Checkpoint
from msmoe.checkpoint.writer import CheckpointWriter
from msmoe.compression.apply import copy_tensors, write_cut
from msmoe.families.generic import GENERIC
from msmoe.formats.build import build_export
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan


@dataclass
class Case:
    """A tiny model, its checkpoint and what was heard of a batch."""

    model: torch.nn.Module
    checkpoint: Checkpoint
    inputs: dict
    logits: torch.Tensor
    heard: dict
    block_outputs: dict


@lru_cache(maxsize=1)
def case_of(model_type: str, folder: Path) -> Case:
    model = build(model_type)
    path = folder / model_type
    model.save_pretrained(path)
    checkpoint, inputs = Checkpoint(path), tokens(model)
    heard, given = {}, {}
    found = GENERIC.discover(checkpoint)
    handles = [
        model.get_submodule(b.experts).register_forward_hook(lambda m, a, out, b=b: given.setdefault(b.name, out))
        for b in found.blocks
    ]
    with GENERIC.listen(model, lambda name, routed: heard.setdefault(name, routed)):
        logits = outputs(model, inputs)
    for handle in handles:
        handle.remove()
    return Case(model, checkpoint, inputs, logits, heard, given)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoders")


def write(checkpoint, kept, out):
    """A native checkpoint in which every layer keeps some experts."""
    layers = {layer.name: layer for layer in GENERIC.layers(checkpoint)}
    plans = {name: pruned(layers[name].num_experts, experts) for name, experts in kept.items()}
    plan = Plan("frequency", Parameters(others="remove"), 0, {}, {}, plans)
    layout = build_export("native", GENERIC, checkpoint, plan)
    with CheckpointWriter(out, layout.tensors, identity="test") as writer:
        copy_tensors(writer, layout, checkpoint)
        write_cut(writer, layout, GENERIC, checkpoint)
        writer.finish_copied()
        writer.write_text("config.json", json.dumps(layout.config))
    return layout


def pruned(num_experts, kept):
    groups = tuple(Group(e, (e,), (1.0,)) for e in kept)
    return LayerPlan(num_experts, groups, tuple(e for e in range(num_experts) if e not in kept))


def in_memory(model, block, expert):
    """The weights of an expert in the model, by role, read with the flags of its module."""
    found = {}
    for parameter in block.parameters:
        held = parameter.held
        tensor = model.get_parameter(parameter.name)
        size = parameter.axis.block
        one = tensor[expert] if size == 1 else tensor[expert * size : (expert + 1) * size]
        one = one.T if held.transposed and one.ndim == 2 else one
        parts = (
            [one[i :: len(held.roles)] for i in range(len(held.roles))]
            if held.interleaved
            else one.chunk(len(held.roles))
        )
        found |= dict(zip(held.roles, parts, strict=True))
    return found


def check_parts(case):
    """(a) what is read of every expert is what the model computes with, and joining it gives the stored bytes."""
    found = GENERIC.discover(case.checkpoint)
    for layer in GENERIC.layers(case.checkpoint):
        block = found.block(layer.name)
        for e in range(layer.num_experts):
            expert = GENERIC.load_expert(case.checkpoint, layer.name, e)
            weights = expert.weights
            wanted = in_memory(case.model, block, e)
            assert set(wanted) == set(layer.roles)
            for role, tensor in wanted.items():
                assert torch.equal(weights[role], tensor)
                assert tuple(tensor.shape) == layer.shapes[role]
            for part in GENERIC.parts(case.checkpoint, layer.name, e):
                stored = case.checkpoint.read(part.key, index=part.index, rows=part.rows)
                assert torch.equal(part.join(weights), stored)


def check_identity(case, out):
    """(b) keeping all gives every tensor bit-equal, and the same logits."""
    layout = write(case.checkpoint, {}, out)
    before, after = load_file(case.checkpoint.path / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert layout.config == case.checkpoint.config
    assert (outputs(loaded(case, out), case.inputs) - case.logits).norm() <= 1e-6 * case.logits.norm()


def loaded(case, path):
    """What plain transformers makes of a folder, nothing missing or left over."""
    model, report = type(case.model).from_pretrained(path, output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def least_used_removed(case):
    """Layer -> the experts that stay: the most used half of each group of the router."""
    kept = {}
    for layer in GENERIC.layers(case.checkpoint):
        usage, size = torch.zeros(layer.num_experts), layer.num_experts // layer.num_groups
        if layer.name in case.heard:
            usage = torch.bincount(case.heard[layer.name].experts.flatten(), minlength=layer.num_experts)
        order = usage.view(-1, size).argsort(dim=1, descending=True, stable=True)[:, : size // 2]
        kept[layer.name] = sorted((order + size * torch.arange(layer.num_groups)[:, None]).flatten().tolist())
    return kept


class Masked(TorchFunctionMode):
    """Gives the router logits of removed experts the value -inf, wherever they are computed."""

    def __init__(self, model, blocks, kept):
        super().__init__()
        self.gone, self.hits = {}, 0
        for block in blocks:
            gone = [e for e in range(block.num_experts) if e not in kept[block.name]]
            self.gone[id(model.get_parameter(block.router))] = gone
            for name, axis in block.per_expert.items():
                if name.endswith(("bias", "biases")):
                    model.state_dict()[name].index_fill_(axis.dim, torch.tensor(gone), float("-inf"))
            for name in block.numbers:
                table = model.state_dict()[name]
                new = block.special.renumbered(table, kept[block.name], block.num_experts)
                table.copy_(torch.tensor(kept[block.name])[new])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and id(args[1]) in self.gone:
            self.hits += 1
            out = out.index_fill(-1, torch.tensor(self.gone[id(args[1])]), float("-inf"))
        return out


def check_pruned(case, out):
    """(c) the pruned checkpoint, loaded by transformers alone, is the original that never chooses removed experts."""
    kept = least_used_removed(case)
    write(case.checkpoint, kept, out)
    masked = copy.deepcopy(case.model)
    with Masked(masked, GENERIC.discover(case.checkpoint).blocks, kept) as mask:
        wanted = outputs(masked, case.inputs)
    found = outputs(loaded(case, out), case.inputs)
    assert mask.hits >= len(case.heard)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert (wanted - case.logits).norm() > 1e-3 * wanted.norm()


@torch.no_grad()
def check_heard(case):
    """(d) what was heard, times experts read from disk, gives what the experts of the model gave."""
    found = GENERIC.discover(case.checkpoint)
    for layer in GENERIC.layers(case.checkpoint):
        if layer.name not in case.heard or layer.name not in case.block_outputs:
            continue
        routed, module = case.heard[layer.name], case.model.get_submodule(found.block(layer.name).experts)
        assert routed.experts.shape == routed.weights.shape == (len(routed.inputs), layer.top_k)
        total = torch.zeros(len(routed.inputs), layer.d_model)
        for e in range(layer.num_experts):
            token, choice = (routed.experts == e).nonzero(as_tuple=True)
            given = GENERIC.load_expert(case.checkpoint, layer.name, e)(routed.inputs[token])
            given = module.post_expert_norm(given) if layer.refits.startswith("a norm") else given
            total.index_add_(0, token, given * routed.weights[token, choice, None])
        wanted = case.block_outputs[layer.name]
        if type(module).__name__ == "Llama4TextExperts":  # all tokens E times over
            wanted = wanted.view(layer.num_experts, -1, layer.d_model).sum(0)
        wanted = wanted.reshape(-1, layer.d_model) - (module.bias if type(module).__name__ == "JetMoeMoE" else 0)
        if type(module).__name__ == "LongcatFlashExperts":  # identities give their input
            extra = wanted - total
            share = (extra * routed.inputs).sum(-1, keepdim=True) / routed.inputs.square().sum(-1, keepdim=True)
            assert bool((share[routed.dispatched.all(-1)].abs() < 1e-5).all())
            total = total + share * routed.inputs
        assert (total - wanted).norm() <= 1e-5 * wanted.norm()


def check_router(case):
    """(e) a router that is asked about the tokens alone says what was heard."""
    found, asked = GENERIC.discover(case.checkpoint), 0
    for layer in GENERIC.layers(case.checkpoint):
        block, routed = found.block(layer.name), case.heard.get(layer.name)
        router = GENERIC.router(case.checkpoint, layer.name)
        assert (router is None) == bool(block.why_no_router)
        if router is None or routed is None:
            continue
        asked += 1
        routing = router(routed.router_inputs)
        order, wanted = routing.experts.argsort(-1), routed.experts.argsort(-1)
        assert torch.equal(routing.experts.gather(-1, order), routed.experts.gather(-1, wanted))
        torch.testing.assert_close(routing.weights.gather(-1, order), routed.weights.gather(-1, wanted))
        torch.testing.assert_close(router.logits(routed.router_inputs), routed.logits)
        if len(block.per_expert) == 1 and layer.num_groups == 1 and not any(a.tail for a in block.per_expert.values()):
            best = routed.logits.topk(layer.top_k).indices.sort().values
            assert torch.equal(best, routed.experts.sort().values)
        check_keeping(layer, router, routed, unbiased=len(block.per_expert) == 1)
    return asked


def check_keeping(layer, router, routed, *, unbiased):
    """Dropping rows that a token did not choose changes nothing of the choice, among the rows that stay.

    With a selection bias it can: a softmax over fewer rows is larger beside it.
    """
    size = layer.num_experts // layer.num_groups
    rows = [e for e in range(layer.num_experts) if e % size < size // 2]
    routing = router.keeping(rows)(routed.router_inputs)
    same = torch.isin(routed.experts, torch.tensor(rows)).all(-1)
    if layer.num_groups == 1 and unbiased:
        chosen = torch.tensor(rows)[routing.experts[same]]
        assert torch.equal(chosen.sort().values, routed.experts[same].sort().values)
    assert int(routing.experts.max()) < len(rows)


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_family_is_read_heard_pruned_and_asked_as_transformers_computes_it(model_type, folder, tmp_path):
    case = case_of(model_type, folder)
    check_parts(case)
    check_identity(case, tmp_path / "same")
    check_pruned(case, tmp_path / "pruned")
    check_heard(case)
    check_router(case)
