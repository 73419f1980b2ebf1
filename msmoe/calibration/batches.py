"""Token records -> padded batches of similar length.

Shapes: B batch, S source length, S' target length.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from msmoe.calibration.spans import IGNORE, TokenRecord

MAX_WEIGHTS = 64 * 512**2  # of one attention head over a batch


def batch_indices(records: Sequence[TokenRecord], batch_size: int) -> Iterator[list[int]]:
    """Positions of the records, longest first, `batch_size` at a time.

    Fewer at a time where one of them is so long that the attention weights of all, padded to its length, would take
    more than those of 64 sequences of 512 tokens.
    """
    order = sorted(range(len(records)), key=lambda i: (-len(records[i].input_ids), -len(records[i].labels), i))
    start = 0
    while start < len(order):
        chosen = order[start : start + batch_size]
        longest = max(max(len(records[i].input_ids), len(records[i].labels)) for i in chosen)
        chosen = chosen[: max(1, MAX_WEIGHTS // longest**2)]
        yield chosen
        start += len(chosen)


def collate(records: Sequence[TokenRecord], *, pad_id: int) -> dict[str, Tensor]:
    """Right-pad records: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B, S') padded with -100.

    Of records of a decoder-only model S' is S.
    """
    inputs = pad([r.input_ids for r in records], pad_id)
    lengths = torch.tensor([len(r.input_ids) for r in records])
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return {"input_ids": inputs, "attention_mask": mask, "labels": pad([r.labels for r in records], IGNORE)}


def collate_prompts(prompts: Sequence[Sequence[int]], *, pad_id: int) -> dict[str, Tensor]:
    """Left-pad what a decoder-only model goes on from: `input_ids` and `attention_mask` (B, longest)."""
    inputs = pad([prompt[::-1] for prompt in prompts], pad_id).flip(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(inputs.shape[1]).flip(0) < lengths[:, None]).long()
    return {"input_ids": inputs, "attention_mask": mask}


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack sequences (B, longest), filled up with `value` on the right."""
    padded = np.full((len(sequences), max(map(len, sequences))), value, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(padded)


def record_key(record: TokenRecord) -> int:
    """63-bit identity of a record's content, the same wherever the record stands."""
    content = np.asarray([*record.input_ids, IGNORE, *record.labels], dtype=np.int64).tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") >> 1
