"""Time of a forward pass with statistics recorded over that of the plain one, for a small Qwen3-MoE model.

One thread; both in turn, several times over, in one run: the best of each is compared.

    python scripts/bench_profile.py --experts 8 64 128
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from msmoe.calibration.recorder import Recorder
from msmoe.families.generic import GENERIC

VOCABULARY = 512


def build(num_experts: int, top_k: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_experts=num_experts, num_experts_per_tok=top_k,
        max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(num_experts: int, top_k: int, repeats: int) -> dict:
    model = build(num_experts, top_k)
    batch = {
        "input_ids": torch.randint(0, VOCABULARY, (16, 128)),
        "attention_mask": torch.ones(16, 128, dtype=torch.int64),
    }
    recorder = Recorder(GENERIC, model, sample_size=4096, seed=0)
    recorder.records = torch.arange(16)

    def forward() -> None:
        for recorder.valid in GENERIC.forward(model, batch):
            pass

    plain, recorded = [], []
    with torch.no_grad():
        for _ in range(repeats + 1):  # the first is warm-up
            plain.append(seconds(forward))
            with recorder.attached():
                recorded.append(seconds(forward))
        drawing = seconds(lambda: [layer.stats() for layer in recorder.layers.values()])
    found = {"plain": min(plain[1:]), "recorded": min(recorded[1:]), "sample and sums at the end": drawing}
    return {"experts": num_experts, "top_k": top_k, **found, "ratio": found["recorded"] / found["plain"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 8, 8])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for num_experts, top_k in zip(given.experts, given.top_k, strict=True):
        print(json.dumps(measure(num_experts, top_k, given.repeats)), flush=True)


if __name__ == "__main__":
    main()
