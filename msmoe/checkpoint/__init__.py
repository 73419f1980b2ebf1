"""Checkpoints on disk: a lazy reader, and in `writer` a sharded, atomic, resumable writer, which alone needs torch."""

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, to_dtype

__all__ = ["Checkpoint", "TensorSpec", "to_dtype"]
