"""Measure what the experts of the decoder demo do, with plain transformers: nothing of msmoe is needed.

    python scripts/decoder_demo/prove.py

Measured on the saved checkpoint, its held-out text and test facts: the loss with the output of all experts set to zero;
the loss of every domain with the experts masked that one domain uses most (router logits -inf), for all pairs of
domains; the facts that greedy `generate` answers exactly; the choices whose likeliest answer is right.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

DEMO = Path(__file__).resolve().parents[2] / "msmoe" / "demo" / "decoder"
MASKED_EXPERTS = 4  # of each layer
MAX_LENGTH = 256
BATCH = 32
FACTS_PER_DOMAIN = 100


@dataclass(frozen=True)
class Sequence:
    """Token ids, and the position of the first of them that counts in the loss."""

    ids: list[int]
    first: int


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sequences(records: list[dict], tokenizer) -> list[Sequence]:
    """A text counts from its second token, a fact from its answer; ids(source) + ids(target) + end."""
    found = []
    for record in records:
        ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        if "text" in record:
            found.append(Sequence(ids(record["text"])[:MAX_LENGTH], 1))
        else:
            source = ids(record["source"])
            found.append(Sequence([*source, *ids(record["target"]), tokenizer.eos_token_id], len(source)))
    return found


def by_domain(records: list[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[record["domain"]].append(record)
    return dict(groups)


def batches(rows: list[Sequence]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, which of them are no padding, and which count in the loss, each (B, L); padding stands right."""
    rows = sorted(rows, key=lambda r: len(r.ids))
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        width = len(part[-1].ids)
        ids, real, counted = (torch.zeros(len(part), width, dtype=torch.long) for _ in range(3))
        for i, row in enumerate(part):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            real[i, : len(row.ids)] = 1
            counted[i, row.first : len(row.ids)] = 1
        yield ids, real.bool(), counted.bool()


@torch.inference_mode()
def mean_loss(model, rows: list[Sequence]) -> float:
    """Nats per token that counts."""
    total, count = 0.0, 0
    for ids, _, counted in batches(rows):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        wanted = counted[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="none")
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def routers(model) -> list[qwen3_moe.Qwen3MoeTopKRouter]:
    return [m for m in model.modules() if isinstance(m, qwen3_moe.Qwen3MoeTopKRouter)]


@contextmanager
def hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeroed(model):
    """All experts silent."""
    blocks = [m for m in model.modules() if isinstance(m, qwen3_moe.Qwen3MoeSparseMoeBlock)]
    return hooks([block.register_forward_hook(lambda _, __, output: output * 0.0) for block in blocks])


def masked(model, experts: torch.Tensor):
    """The experts (layers, n) never chosen: the choice is made again from logits with -inf in their places."""

    def choose(router, logits: torch.Tensor, absent: torch.Tensor):
        logits = logits.index_fill(-1, absent, -torch.inf)
        gates, chosen = logits.float().softmax(-1).topk(router.top_k)
        return logits, (gates / gates.sum(-1, keepdim=True)).to(logits.dtype), chosen

    return hooks([
        router.register_forward_hook(lambda router, _, output, absent=absent: choose(router, output[0], absent))
        for router, absent in zip(routers(model), experts, strict=True)
    ])  # fmt: skip


@torch.inference_mode()
def usage(model, rows: list[Sequence]) -> torch.Tensor:
    """Share of the tokens of a domain that each expert is chosen for: (layers, experts), rows sum to 1."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for ids, real, _ in batches(rows):
        chosen: list[torch.Tensor] = []
        taps = [
            r.register_forward_hook(lambda _, __, output, seen=chosen: seen.append(output[2])) for r in routers(model)
        ]
        with hooks(taps):
            model(input_ids=ids, use_cache=False)
        for layer, index in enumerate(chosen):
            counts[layer] += torch.bincount(index[real.flatten()].flatten(), minlength=counts.shape[1])
    return counts / counts.sum(-1, keepdim=True)


@torch.inference_mode()
def answers(model, tokenizer, records: list[dict]) -> list[str]:
    """What greedy `generate` writes after each source, in batches of sources of one length."""
    sources = [tokenizer(r["source"], add_special_tokens=False).input_ids for r in records]
    written = [""] * len(records)
    by_length = defaultdict(list)
    for i, source in enumerate(sources):
        by_length[len(source)].append(i)
    for length, places in by_length.items():
        ids = torch.tensor([sources[i] for i in places])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for i, text in zip(places, texts, strict=True):
            written[i] = text
    return written


def exact_match(model, tokenizer, records: list[dict]) -> float:
    pairs = zip(answers(model, tokenizer, records), records, strict=True)
    return sum(text.strip() == record["target"] for text, record in pairs) / len(records)


@torch.inference_mode()
def choice_accuracy(model, tokenizer, records: list[dict]) -> float:
    """Share of records whose right choice has the largest likelihood, its end included."""
    pairs = [{"source": r["source"], "target": choice} for r in records for choice in r["choices"]]
    scores = [0.0] * len(pairs)
    rows = sequences(pairs, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # as `batches` sorts them
    places = iter(order)
    for ids, _, counted in batches(rows):
        likelihoods = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        tokens = likelihoods.gather(-1, ids[:, 1:, None])[..., 0] * counted[:, 1:]
        for score in tokens.sum(-1).tolist():
            scores[next(places)] = score
    right, start = 0, 0
    for record in records:
        own = scores[start : start + len(record["choices"])]
        right += own.index(max(own)) == record["answer"]
        start += len(own)
    return right / len(records)


@dataclass(frozen=True)
class Proofs:
    """What was measured.

    Attributes:
        full, zeroed: nats per token of each domain, with all experts and with none.
        increase: `[i][j]`, nats per token of domain i more with the experts of domain j masked.
        usage: share of the tokens of a domain that each expert is chosen for, domain by layer by expert.
        exact: share of exact answers, by file and by domain.
        choices: share of right choices.
    """

    domains: list[str]
    full: list[float]
    zeroed: list[float]
    increase: list[list[float]]
    usage: list[list[list[float]]]
    exact: dict[str, float]
    choices: float

    @property
    def largest_of_row(self) -> int:
        """Domains that no other domain's mask costs more than their own."""
        return sum(row[i] == max(row) for i, row in enumerate(self.increase))

    @property
    def largest_of_column(self) -> int:
        """Masks that cost no domain more nats than their own."""
        return columns_led(self.increase)

    @property
    def largest_share_of_column(self) -> int:
        """The same, each increase as a share of what all experts are worth to the domain."""
        worth = [b - a for a, b in zip(self.full, self.zeroed, strict=True)]
        return columns_led([[x / w for x in row] for row, w in zip(self.increase, worth, strict=True)])


def columns_led(table: list[list[float]]) -> int:
    """Columns of a square table with their largest value on the diagonal."""
    return sum(column[j] == max(column) for j, column in enumerate(zip(*table, strict=True)))


def prove(checkpoint: Path, data: Path) -> Proofs:
    """Measure the checkpoint on the records of `data` (calibration, held-out text and test facts)."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    calibration = by_domain(read(data / "calibration.jsonl"))
    facts = {name: read(data / "tasks" / f"{name}.jsonl") for name in ("facts", "facts_near")}
    held_out = by_domain(read(data / "heldout_text.jsonl")) | {
        domain: records[:FACTS_PER_DOMAIN] for domain, records in by_domain(facts["facts"]).items()
    }
    domains = sorted(calibration, key=lambda d: (d.startswith("facts"), d))
    rows = {d: sequences(held_out[d], tokenizer) for d in domains}
    used = {d: usage(model, sequences(calibration[d], tokenizer)) for d in domains}
    full = [mean_loss(model, rows[d]) for d in domains]
    with zeroed(model):
        without = [mean_loss(model, rows[d]) for d in domains]
    increase = [[0.0] * len(domains) for _ in domains]
    for j, owner in enumerate(domains):
        with masked(model, used[owner].topk(MASKED_EXPERTS).indices):
            for i, domain in enumerate(domains):
                increase[i][j] = mean_loss(model, rows[domain]) - full[i]
    exact = {name: exact_match(model, tokenizer, records) for name, records in facts.items()}
    exact |= {d: exact_match(model, tokenizer, r) for d, r in by_domain(facts["facts"]).items()}
    choices = choice_accuracy(model, tokenizer, read(data / "tasks" / "choices.jsonl"))
    return Proofs(domains, full, without, increase, [used[d].tolist() for d in domains], exact, choices)


def matrix(proofs: Proofs) -> str:
    """Markdown table: a row for each domain, a column for each domain whose experts are masked."""
    head = "| loss of ↓ without the experts of → | " + " | ".join(proofs.domains) + " |\n"
    head += "|---" * (len(proofs.domains) + 1) + "|\n"
    lines = []
    for i, domain in enumerate(proofs.domains):
        cells = [f"**{x:+.2f}**" if i == j else f"{x:+.2f}" for j, x in enumerate(proofs.increase[i])]
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return head + "\n".join(lines)


def losses(proofs: Proofs) -> str:
    """Markdown table of the loss with all experts and with none."""
    rows = zip(proofs.domains, proofs.full, proofs.zeroed, strict=True)
    head = "| domain | loss | all experts zeroed | difference |\n|---|---|---|---|\n"
    return head + "\n".join(f"| {d} | {a:.3f} | {b:.3f} | {b - a:+.3f} |" for d, a, b in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint")
    parser.add_argument("--data", type=Path, default=DEMO / "data")
    args = parser.parse_args()
    proofs = prove(args.checkpoint, args.data)
    count = len(proofs.domains)
    print(losses(proofs), matrix(proofs), sep="\n\n")
    print(f"\nown mask costs a domain most: {proofs.largest_of_row} of {count}")
    print(f"a mask costs its own domain most: {proofs.largest_of_column} of {count}")
    print(f"the same, beside what all experts are worth to the domain: {proofs.largest_share_of_column} of {count}")
    print("exact answers: " + ", ".join(f"{name} {share:.3f}" for name, share in proofs.exact.items()))
    print(f"right choices: {proofs.choices:.3f}")


if __name__ == "__main__":
    main()
