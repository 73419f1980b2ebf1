"""Does merging lower the stable rank of experts? Members, merged experts, and the control: random groups, same sizes.

python scripts/experiments/ranks.py

For the merged layers of a plan of `m-smoe` on the demo checkpoint: mean stable rank |W|_F^2 / |W|_2^2 of the members,
of the merged experts (and once more with `wo` refit), and of plain averages of random groups of the same sizes. Groups
of one expert are left out: nothing is merged in them.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import msmoe
from msmoe.checkpoint import Checkpoint
from msmoe.compression.group import Sources, merge_one
from msmoe.demo import CALIBRATION, CHECKPOINT
from msmoe.families import family_of
from msmoe.formats.layout import build_export
from msmoe.layer.expert import Expert
from msmoe.lowrank.measures import stable_rank
from msmoe.merge import merge_group

NUM_DRAWS = 10


def ranks(experts: Sequence[Expert]) -> tuple[float, float]:
    """Mean stable rank of `wi` and of `wo`."""
    return statistics.mean(stable_rank(e.front) for e in experts), statistics.mean(
        stable_rank(e.output) for e in experts
    )


def random_groups(sizes: Sequence[int], num_experts: int, *, seed: int) -> list[list[int]]:
    """Disjoint random groups of given sizes."""
    order = np.random.default_rng(seed).permutation(num_experts).tolist()
    ends = np.cumsum(sizes)
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def averages(groups: Sequence[Sequence[int]], load: Callable[[int], Expert], alignment) -> list[Expert]:
    """Plain averages, aligned to the first member or not."""
    return [merge_group(g, [1 / len(g)] * len(g), load, reference=g[0], alignment=alignment).expert for g in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--data", type=Path, default=CALIBRATION)
    parser.add_argument("--experts", type=float, default=4)
    args = parser.parse_args()
    source = Checkpoint(args.checkpoint)
    family = family_of(source)
    stats = msmoe.profile(args.checkpoint, args.data, samples=512, token_sample=16384)
    print("Mean stable rank, wi / wo. Control: plain averages of random groups of the same sizes, mean of "
          f"{NUM_DRAWS} draws (standard deviation over draws).\n")  # fmt: skip
    print("| layer | members | M-SMoE | M-SMoE + refit | random groups, aligned | random groups, not aligned |")
    print("|---|---|---|---|---|---|")
    plans = {m: msmoe.plan(args.checkpoint, stats, method=m, experts=args.experts) for m in ("m-smoe", "m-smoe-refit")}
    for name, layer in plans["m-smoe"].layers.items():
        load = lambda e, name=name: family.load_expert(source, name, e)
        chosen = [g for g, group in enumerate(layer.groups) if len(group.members) > 1]
        sizes = [len(layer.groups[g].members) for g in chosen]
        cells = [ranks([load(e) for g in chosen for e in layer.groups[g].members])]
        for plan in plans.values():
            layout = build_export("exact", family, source, plan)
            sources = Sources(family, source, plan, stats)
            cells.append(ranks([merge_one(sources, layout, name, g)[0] for g in chosen]))
        shown = [f"{wi:.1f} / {wo:.1f}" for wi, wo in cells]
        for alignment in ("weight", "none"):
            draws = [
                ranks(averages(random_groups(sizes, layer.num_experts, seed=seed), load, alignment))
                for seed in range(NUM_DRAWS)
            ]
            shown.append(
                " / ".join(f"{statistics.mean(v):.1f} ({statistics.stdev(v):.1f})" for v in zip(*draws, strict=True))
            )
        print(f"| `{name}` | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
