"""Tiny but real decoder-only Mixture-of-Experts models, and a byte-level tokenizer for them."""

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
VOCAB = len(SPECIAL) + 256
CHAT = (
    "<|bos|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "num_local_experts": 4,
    "num_experts_per_tok": 2, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
CLASSES = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 8, "moe_intermediate_size": 24}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"sliding_window": None}),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM, {"logits_scaling": 3.0}),
}


def byte_tokenizer(*, chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A token per byte, `<|bos|>` before every text and nothing after it."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(BPE(vocabulary, []))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=chat_template
    )


def build_decoder(kind: str = "qwen3_moe", *, seed: int = 0, **options):
    """A random model of one of `CLASSES`, in evaluation mode."""
    config, model, own = CLASSES[kind]
    torch.manual_seed(seed)
    return model._from_config(config(**SHARED | own | options)).eval()


@torch.no_grad()
def full_log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """What a model says after every token of one unpadded sequence, (S, V), by its own forward pass."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def log_likelihood(model, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of an answer after a prompt, one token at a time."""
    said = full_log_probabilities(model, [*prompt, *answer])
    return sum(float(said[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
