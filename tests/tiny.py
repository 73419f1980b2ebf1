"""Tiny but real Switch models on disk, calibration files for them, and naive counterparts of our code."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from msmoe.calibration.profile import profile
from msmoe.compression.apply import apply
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan
from msmoe.planning.planner import plan as make_plan

VOCAB = 64
LAYERS = (
    "encoder.block.1.layer.1.mlp",
    "encoder.block.3.layer.1.mlp",
    "decoder.block.1.layer.2.mlp",
    "decoder.block.3.layer.2.mlp",
)


def build_switch(*, seed: int = 0, **options) -> SwitchTransformersForConditionalGeneration:
    """A random Switch model, 6 experts in every second block of either stack, whose routers use all of them."""
    settings = {
        "vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 4,
        "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 6,
        "expert_capacity": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**settings | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.classifier.weight"):
                parameter.normal_(std=0.5)
            elif "layer_norm" in name:
                parameter.uniform_(0.7, 1.3)
            elif "experts" in name:
                parameter.normal_(std=0.25)
    return model.eval()


def save_switch(path: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **options) -> Path:
    build_switch(**options).to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def random_records(count: int, *, seed: int = 0, longest: int = 14) -> list[dict]:
    """Tokenised records of many lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 1, size=(count, 2))
    return [
        {"input_ids": rng.integers(2, VOCAB, size=s).tolist(), "labels": rng.integers(2, VOCAB, size=t).tolist()}
        for s, t in lengths
    ]


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def profile_small(checkpoint: Path, data: Path, **options):
    return profile(checkpoint, data, **{"samples": 64, "batch_size": 8, "token_sample": 4096} | options)


def compress(
    checkpoint: Path, stats, out: Path, *, experts: float = 3, export: str = "exact", apply_options=None, **choices
):
    """Plan and apply; returns the plan."""
    if export != "exact":
        choices = {"budget": "uniform", "keep_layers": ["none"]} | choices
    plan = make_plan(checkpoint, stats, experts=experts, export=export, **choices)
    apply(checkpoint, plan, out, stats=stats, export=export, workers=1, **(apply_options or {}))
    return plan


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    return tensors


def size_of(folder: Path) -> int:
    """Bytes of all stored tensors."""
    return sum(t.numel() * t.element_size() for t in load_tensors(folder).values())


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors*"))}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def plan_for(checkpoint, layers: dict[str, LayerPlan], **parameters) -> Plan:
    """A hand-made plan for an open checkpoint."""
    identity = {"model_type": checkpoint.model_type, "fingerprint": checkpoint.fingerprint}
    return Plan("by-hand", Parameters(**{"align": "none", **parameters}), 0, identity, {}, layers)


def layer_plan(num_experts: int, *groups: list[int]) -> LayerPlan:
    """Groups with equal weights; the first member dominates."""
    return LayerPlan(num_experts, tuple(Group(g[0], tuple(sorted(g)), tuple(1 / len(g) for _ in g)) for g in groups))


def batch_of(records: list[dict]) -> dict[str, torch.Tensor]:
    """Right-padded model inputs of tokenised records, padded one record at a time."""
    source = max(len(r["input_ids"]) for r in records)
    target = max(len(r["labels"]) for r in records)
    return {
        "input_ids": torch.tensor([r["input_ids"] + [0] * (source - len(r["input_ids"])) for r in records]),
        "attention_mask": torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (source - len(r["input_ids"])) for r in records]
        ),
        "labels": torch.tensor([r["labels"] + [-100] * (target - len(r["labels"])) for r in records]),
    }


def logits_of(model, records: list[dict]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch_of(records)).logits


def stored_stack(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A stack of matrices of an `exact` export; factors are multiplied out, the kept rows added one at a time."""
    if name in tensors:
        return tensors[name]
    u, v, s, rows = (tensors[f"{name}.{part}"] for part in ("U", "V", "S", "rows"))
    dense = u.float() @ v.float()
    for g, kept in enumerate(rows.tolist()):
        for k, row in enumerate(kept):
            dense[g, row] += s[g, k].float()
    return dense


def with_merged_experts(source: Path, exact: Path, **options) -> SwitchTransformersForConditionalGeneration:
    """The stock model of `source`, each expert replaced by its group's weights stored in the `exact` export."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(source, **options).eval()
    tensors = load_tensors(exact)
    with torch.no_grad():
        for name, mapping in tensors.items():
            if name.endswith(".expert_map"):
                layer = name.removesuffix(".expert_map")
                experts = model.get_submodule(f"{layer}.experts")
                stacks = {part: stored_stack(tensors, f"{layer}.experts.{part}") for part in ("wi", "wo")}
                for e, g in enumerate(mapping.tolist()):
                    experts[f"expert_{e}"].wi.weight.copy_(stacks["wi"][g])
                    experts[f"expert_{e}"].wo.weight.copy_(stacks["wo"][g])
    return model
