"""Time the experts of a decoder: the stock ones against those of an `exact` export, on one thread.

    python scripts/bench_exact_forward.py

Milliseconds of CPU time of one call, the best of many that take turns. E router rows, G stored experts (half of them),
T tokens of K experts each, D = 256, F = 128, float32. Factors have ranks of a quarter of the smaller side and 24 kept
rows; constants take the place of a quarter of the experts.
"""

import time

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from msmoe.formats.modeling.modeling_msmoe_decoder import shrink_experts

D, F, SECONDS = 256, 128, 1.5


def experts_of(num_experts: int, spec: dict | None = None) -> Qwen3MoeExperts:
    """Random experts, those of an `exact` export where `spec` is given."""
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=num_experts)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config)
    if spec:
        shrink_experts(experts, spec)
        entries = spec["groups"] + spec.get("constants", 0)
        experts.expert_map.copy_(torch.arange(num_experts) * entries // num_experts)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.05)
    return experts


@torch.inference_mode()
def milliseconds(modules: dict[str, torch.nn.Module], inputs: tuple) -> dict[str, float]:
    """Best CPU time of a call of each, in turn."""
    best = dict.fromkeys(modules, float("inf"))
    end = time.monotonic() + SECONDS * len(modules)
    while time.monotonic() < end:
        for name, module in modules.items():
            start = time.thread_time()
            module(*inputs)
            best[name] = min(best[name], 1000 * (time.thread_time() - start))
    return best


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'E':>3} {'K':>2} {'T':>5}  stock  mapped  factors  constants")
    for num_experts, k in ((8, 2), (64, 8)):
        half, quarter = num_experts // 2, num_experts // 4
        factors = {"gate_up_proj": [64, 24], "down_proj": [32, 24]}
        modules = {
            "stock": experts_of(num_experts),
            "mapped": experts_of(num_experts, {"groups": half}),
            "factors": experts_of(num_experts, {"groups": half, "factors": factors}),
            "constants": experts_of(num_experts, {"groups": num_experts - quarter, "constants": quarter}),
        }
        for num_tokens in (16, 1024):
            torch.manual_seed(1)
            weights, index = torch.rand(num_tokens, num_experts).softmax(-1).topk(k)
            times = milliseconds(modules, (torch.randn(num_tokens, D), index, weights))
            print(f"{num_experts:3} {k:2} {num_tokens:5}  " + "  ".join(f"{times[name]:6.2f}" for name in modules))


if __name__ == "__main__":
    main()
