"""Records as token ids, and span corruption: a text -> what an encoder-decoder is asked to fill in."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = -100  # label of a position that counts for nothing
NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


@dataclass(frozen=True)
class TokenRecord:
    """One record as token ids, both sequences unpadded.

    Attributes:
        input_ids: what the encoder reads; of a decoder-only model, everything: what is given and what is wanted.
        labels: what the decoder writes. Of a decoder-only model, as long as `input_ids`: at every position its own
            token, or -100 where that does not count. The first never counts: no position before it predicts it.
    """

    input_ids: list[int]
    labels: list[int]


def corrupt_spans(
    token_ids: Sequence[int], *, sentinel_ids: Sequence[int], eos_id: int, rng: np.random.Generator
) -> TokenRecord:
    """Mask random spans and ask for them back: the span corruption of T5 (arXiv 1910.10683, section 3.1.4).

    15 % of the tokens are masked, in spans of 3 on average; span i is replaced by sentinel i in the input, and
    the target is each sentinel followed by the tokens it hides.

    Args:
        token_ids: at least two tokens, without end-of-sequence token.
        sentinel_ids: ids of `<extra_id_0>`, `<extra_id_1>`, ...; bounds the number of spans.
        eos_id: appended to both sequences.
        rng: source of the span lengths and positions.

    Raises:
        ValueError: if there are fewer than two tokens or no sentinel.
    """
    num_tokens = len(token_ids)
    if num_tokens < 2:
        raise ValueError(f"span corruption needs at least 2 tokens, got {num_tokens}")
    if not sentinel_ids:
        raise ValueError("span corruption needs a tokenizer with <extra_id_0>, <extra_id_1>, ... tokens")
    num_noise = min(max(round(num_tokens * NOISE_DENSITY), 1), num_tokens - 1)
    num_spans = min(max(round(num_noise / MEAN_SPAN_LENGTH), 1), num_tokens - num_noise, len(sentinel_ids))
    noise_lengths = random_partition(num_noise, num_spans, rng)
    kept_lengths = random_partition(num_tokens - num_noise, num_spans, rng)

    inputs: list[int] = []
    targets: list[int] = []
    position = 0
    for sentinel, kept, noise in zip(sentinel_ids, kept_lengths, noise_lengths, strict=False):
        inputs += [*token_ids[position : position + kept], sentinel]
        position += kept
        targets += [sentinel, *token_ids[position : position + noise]]
        position += noise
    return TokenRecord([*inputs, eos_id], [*targets, eos_id])


def random_partition(total: int, num_parts: int, rng: np.random.Generator) -> list[int]:
    """Split `total` into `num_parts` positive integers, every such split equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=num_parts - 1, replace=False) + 1)
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()


def sentinel_ids(tokenizer) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, ... in this order; empty if the tokenizer has none."""
    ids = []
    while (token_id := tokenizer.convert_tokens_to_ids(f"<extra_id_{len(ids)}>")) not in (None, tokenizer.unk_token_id):
        ids.append(token_id)
    return ids
