"""Train the decoder demo: a small Qwen3-MoE, from scratch, on text of twelve kinds and on closed-book facts.

    python scripts/decoder_demo/train.py --workdir build/decoder_demo

Resumable: run it again and it goes on from its last saved step with the same batches. `export.py` turns the result
into the embedded checkpoint. If the machine turns out faster or slower than planned, stop and go on with another
`--steps`: the learning rate falls in a straight line from `--decay-from` to 0 at `--steps`.
"""

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from data import ARROW, Fact, facts, texts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

VOCAB_SIZE = 4096
END, PAD = 0, 1
TEXT_LENGTH, FACT_LENGTH = 128, 64  # tokens of a row
MAX_FACT_TOKENS = 16
QUESTION_WEIGHT = 0.3  # of a question's token in the loss; an answer's token counts 1
ROUTER_STD = 0.15  # router logits of about two units from the start: gates that matter
ROW_MULTIPLE = 16  # tokens of an expert are padded to it: few distinct shapes for the matrix library
CONFIG = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48, "moe_intermediate_size": 192,
    "num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "initializer_range": 0.04, "pad_token_id": PAD, "eos_token_id": END,
    "bos_token_id": None,
}  # fmt: skip
DOMAIN_SHARES = {
    "dialogue": 0.12, "news": 0.14, "python": 0.13, "reviews": 0.07, "tweets": 0.1, "sms": 0.04, "questions": 0.04,
    "interface": 0.08, "cyrillic": 0.06, "markup": 0.06, "maths": 0.1, "json": 0.06,
}  # fmt: skip


def train_tokenizer(text: dict[str, dict[str, list[str]]], known: list[Fact]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the arrow between question and answer is a piece of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    lines = [side for f in known for side in (f.question, f.target)]
    for splits in text.values():  # about as much of every kind
        total = 0
        for document in splits["train"]:
            lines.append(document[:4000])
            total += len(lines[-1])
            if total > 250_000:
                break
    tokenizer.train_from_iterator(lines, trainer=trainer)
    tokenizer.add_tokens([AddedToken(ARROW, normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def fact_tokens(known: list[Fact], tokenizer: PreTrainedTokenizerFast) -> list[tuple[Fact, list[int], list[int]]]:
    """Facts of at most `MAX_FACT_TOKENS` with the ids of their source, and of their target and the end."""
    sources = tokenizer([f.source for f in known], add_special_tokens=False).input_ids
    targets = tokenizer([f.target for f in known], add_special_tokens=False).input_ids
    rows = zip(known, sources, targets, strict=True)
    return [(f, s, [*t, END]) for f, s, t in rows if len(s) + len(t) < MAX_FACT_TOKENS]


def pack(documents: list[list[int]], width: int) -> list[list[list[int]]]:
    """Rows of whole documents, in order; a document longer than a row is cut."""
    rows: list[list[list[int]]] = []
    room = 0
    for document in documents:
        for start in range(0, len(document), width):
            piece = document[start : start + width]
            if len(piece) > room:
                rows.append([])
                room = width
            rows[-1].append(piece)
            room -= len(piece)
    return rows


class Corpus:
    """Packed rows of a split: lists per text domain, and all facts, packed anew in every pass."""

    def __init__(self, text: dict, known: list[Fact], tokenizer: PreTrainedTokenizerFast, *, split: str, seed: int):
        self.seed = seed
        self.facts = fact_tokens(known, tokenizer)
        self.rows = {}
        for domain, splits in text.items():
            ids = tokenizer(splits[split], add_special_tokens=False).input_ids
            self.rows[domain] = pack([[*x, END] for x in ids], TEXT_LENGTH)
        self._pass: tuple[int, list] = (-1, [])

    def text_batch(self, size: int, *, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights (size, TEXT_LENGTH); every draw comes from (seed, step)."""
        rng = np.random.default_rng([self.seed, step])
        domains = rng.choice(list(DOMAIN_SHARES), size=size, p=list(DOMAIN_SHARES.values()))
        chosen = [self.rows[d][rng.integers(len(self.rows[d]))] for d in domains]
        ids = torch.full((size, TEXT_LENGTH), PAD)
        for i, row in enumerate(chosen):
            flat = [token for document in row for token in document]
            ids[i, : len(flat)] = torch.tensor(flat)
        return ids, (ids != PAD).float()

    def fact_rows(self, number: int) -> list[list[int]]:
        """Rows of fact numbers in the order of pass `number`."""
        if self._pass[0] != number:
            order = np.random.default_rng([self.seed, number, 1]).permutation(len(self.facts))
            rows, room = [], 0
            for i in order:
                length = len(self.facts[i][1]) + len(self.facts[i][2])
                if length > room:
                    rows.append([])
                    room = FACT_LENGTH
                rows[-1].append(int(i))
                room -= length
            self._pass = (number, rows)
        return self._pass[1]

    def fact_batch(self, size: int, place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple]:
        """Ids, weights and fact numbers in the row, each (size, FACT_LENGTH), and where the next batch begins.

        A pass is read from its first row to its last; what is left of it is filled from the next pass.
        """
        number, start = place
        chosen: list[list[int]] = []
        while len(chosen) < size:
            rows = self.fact_rows(number)[start:]
            taken = list(islice(rows, size - len(chosen)))
            chosen += taken
            number, start = (number, start + len(taken)) if len(taken) < len(rows) else (number + 1, 0)
        ids = torch.full((size, FACT_LENGTH), PAD)
        weights = torch.zeros(size, FACT_LENGTH)
        blocks = torch.zeros(size, FACT_LENGTH, dtype=torch.long)
        for i, row in enumerate(chosen):
            at = 0
            for block, fact in enumerate(row, start=1):
                _, source, target = self.facts[fact]
                end = at + len(source) + len(target)
                ids[i, at:end] = torch.tensor(source + target)
                weights[i, at + 1 : at + len(source)] = QUESTION_WEIGHT  # nothing tells the first token
                weights[i, at + len(source) : end] = 1.0
                blocks[i, at:end] = block
                at = end
        return ids, weights, blocks, (number, start)


def sorted_experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """The stock experts' function: tokens sorted by expert, one product for each expert, one scatter.

    Shapes as in the stock class: (tokens, hidden), (tokens, k), (tokens, k).
    """
    k = top_k_index.shape[-1]
    experts = top_k_index.flatten()
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=self.num_experts).tolist()
    tokens = order // k
    outputs = []
    gates_ups, downs = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
    for part, gate_up, down in zip(hidden_states[tokens].split(counts), gates_ups, downs, strict=True):
        padded = torch.nn.functional.pad(part, (0, 0, 0, -len(part) % ROW_MULTIPLE))
        gate, up = torch.nn.functional.linear(padded, gate_up).chunk(2, dim=-1)
        outputs.append(torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)[: len(part)])
    mixed = torch.cat(outputs) * top_k_weights.flatten()[order, None]
    return torch.zeros_like(hidden_states).index_add(0, tokens, mixed.to(hidden_states.dtype))


class RouterTap:
    """Router logits (tokens, experts) of the forward passes since `logits` was last cleared, layer by layer."""

    def __init__(self, model: torch.nn.Module):
        self.logits: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, qwen3_moe.Qwen3MoeTopKRouter):
                module.register_forward_hook(lambda _, __, output: self.logits.append(output[0].float()))


def balance_loss(logits: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """Load balance over all tokens of a step at once (1 is even), so that one kind of text may have its experts."""
    num_experts = logits.shape[-1]
    chosen = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=num_experts) / (len(logits) * top_k)
    return num_experts * (logits.softmax(-1).mean(0) * chosen).sum()


def block_mask(blocks: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L): a token sees earlier ones of its own block, and itself."""
    same = blocks[:, :, None] == blocks[:, None, :]
    return (same & torch.ones_like(same[0]).tril()).unsqueeze(1)


def token_losses(model, ids: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Loss of each token with a weight, in order (N,); only they are projected to the vocabulary."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0
    selected = hidden[wanted]
    selected = torch.nn.functional.pad(selected, (0, 0, 0, -len(selected) % 64))
    targets = ids[:, 1:][wanted]
    return torch.nn.functional.cross_entropy(model.lm_head(selected)[: len(targets)].float(), targets, reduction="none")


def step_losses(model, tap: RouterTap, corpus: Corpus, args, *, step: int, place: tuple[int, int]):
    """Losses and weights of the text and the facts of one step, the balance loss, the next place among the facts."""
    tap.logits.clear()
    parts, kept = {}, []
    ids, weights = corpus.text_batch(args.text_rows, step=step)
    parts["text"] = (token_losses(model, ids, weights, None), weights[:, 1:][weights[:, 1:] > 0])
    kept.append((ids != PAD).flatten())
    ids, weights, blocks, place = corpus.fact_batch(args.fact_rows, place)
    parts["facts"] = (token_losses(model, ids, weights, block_mask(blocks)), weights[:, 1:][weights[:, 1:] > 0])
    kept.append((ids != PAD).flatten())
    layers = len(tap.logits) // 2
    per_layer = [torch.cat([tap.logits[i + j * layers][kept[j]] for j in range(2)]) for i in range(layers)]
    balance = torch.stack([balance_loss(z, top_k=model.config.num_experts_per_tok) for z in per_layer])
    return parts, balance.mean(), place


@torch.no_grad()
def validate(model, tap: RouterTap, corpus: Corpus) -> dict[str, float]:
    """Loss per token of every kind of validation text, exact answers of 512 facts as the likeliest tokens."""
    model.eval()
    scores = {}
    for domain, rows in corpus.rows.items():
        ids = torch.full((min(len(rows), 32), TEXT_LENGTH), PAD)
        for i, row in enumerate(rows[: len(ids)]):
            flat = [token for document in row for token in document]
            ids[i, : len(flat)] = torch.tensor(flat)
        scores[domain] = token_losses(model, ids, (ids != PAD).float(), None).mean().item()
    right = 0
    for begin in range(0, 512, 128):
        part = corpus.facts[begin : begin + 128]
        ids = torch.full((len(part), MAX_FACT_TOKENS), PAD)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for i, (_, source, target) in enumerate(part):
            ids[i, : len(source) + len(target)] = torch.tensor(source + target)
            answer[i, len(source) : len(source) + len(target)] = True
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guess == ids[:, 1:]) | ~answer[:, 1:]).all(1).sum())
    scores["facts_exact"] = right / 512
    tap.logits.clear()
    model.train()
    return scores


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up, constant until `decay_from`, a straight line to 0 at `steps`."""
    falling = (args.steps - step) / max(args.steps - args.decay_from, 1)
    return args.lr * max(min((step + 1) / args.warmup, 1.0, falling), 0.0)


class Trainer:
    """bfloat16 model, float32 master weights, optimiser, step and place among the facts, saved together."""

    def __init__(self, workdir: Path, *, seed: int):
        self.state_file = workdir / "state.safetensors"
        torch.manual_seed(seed)
        self.model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
        for module in self.model.modules():
            if isinstance(module, qwen3_moe.Qwen3MoeTopKRouter):
                torch.nn.init.normal_(module.weight, std=ROUTER_STD)
        self.parameters = dict(self.model.named_parameters())
        self.masters = {name: p.detach().clone() for name, p in self.parameters.items()}
        groups = [
            {"params": [p for p in self.masters.values() if p.ndim > 1], "weight_decay": 0.03},
            {"params": [p for p in self.masters.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        self.step, self.place = 0, (0, 0)
        if self.state_file.exists():
            self.load()
        self.model.to(torch.bfloat16).train()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in self.parameters.items():
            self.masters[name].grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        self.optimizer.step()
        self.publish()
        self.step += 1

    def load(self) -> None:
        with safe_open(self.state_file, "pt") as file:
            meta = file.metadata()
        self.step, self.place = int(meta["step"]), tuple(json.loads(meta["place"]))
        state = load_file(self.state_file)
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            self.optimizer.state[master] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"exp_avg.{name}"],
                "exp_avg_sq": state[f"exp_avg_sq.{name}"],
            }

    def save(self) -> None:
        state = {f"master.{name}": master for name, master in self.masters.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            state |= {f"{key}.{name}": self.optimizer.state[master][key] for name, master in self.masters.items()}
        partial = self.state_file.with_suffix(".partial")
        save_file(state, partial, metadata={"step": str(self.step), "place": json.dumps(self.place)})
        os.replace(partial, self.state_file)


def train(args: argparse.Namespace) -> None:
    workdir: Path = args.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    text, known = texts(), facts()
    if not (workdir / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(text, known).save_pretrained(workdir / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workdir / "tokenizer")
    train_set = Corpus(text, known, tokenizer, split="train", seed=args.seed)
    validation_set = Corpus(text, known, tokenizer, split="validation", seed=args.seed)
    print({d: len(rows) for d, rows in train_set.rows.items()}, f"{len(train_set.facts):,} facts", flush=True)

    qwen3_moe.Qwen3MoeExperts.forward = sorted_experts_forward
    trainer = Trainer(workdir, seed=args.seed)
    tap = RouterTap(trainer.model)
    print(f"{sum(p.numel() for p in trainer.parameters.values()):,} parameters, at step {trainer.step}", flush=True)
    started, first = time.perf_counter(), trainer.step
    while trainer.step < args.steps:
        parts, balance, trainer.place = step_losses(
            trainer.model, tap, train_set, args, step=trainer.step, place=trainer.place
        )
        total = sum((losses * weights).sum() for losses, weights in parts.values())
        loss = total / sum(weights.sum() for _, weights in parts.values())
        (loss + args.balance * balance).backward()
        rate = learning_rate(trainer.step, args)
        trainer.update(rate)
        if trainer.step % args.log_every == 0:
            answers = parts["facts"][1] == 1
            logged = {
                "step": trainer.step, "lr": round(rate, 7), "text": round(parts["text"][0].mean().item(), 4),
                "answers": round(parts["facts"][0][answers].mean().item(), 4),
                "asked": round(parts["facts"][0][~answers].mean().item(), 4), "balance": round(balance.item(), 3),
                "pass": round(trainer.place[0] + trainer.place[1] / len(train_set.fact_rows(trainer.place[0])), 2),
                "seconds_per_step": round((time.perf_counter() - started) / (trainer.step - first), 3),
            }  # fmt: skip
            if trainer.step % args.validate_every == 0:
                logged |= {k: round(v, 4) for k, v in validate(trainer.model, tap, validation_set).items()}
                trainer.save()
            with (workdir / "log.jsonl").open("a") as log:
                log.write(json.dumps(logged) + "\n")
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/decoder_demo"))
    parser.add_argument("--steps", type=int, default=7600)
    parser.add_argument("--decay-from", type=int, default=1000, help="step from which the learning rate falls")
    parser.add_argument("--text-rows", type=int, default=10, help=f"of {TEXT_LENGTH} tokens, a step")
    parser.add_argument("--fact-rows", type=int, default=24, help=f"of {FACT_LENGTH} tokens, a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--balance", type=float, default=0.005, help="coefficient of the load-balancing loss")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--validate-every", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
