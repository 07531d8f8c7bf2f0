"""What a training step eats."""

from typing import NamedTuple

import jax
from jax import Array


class Batch(NamedTuple):
    """Rows of tokens, each holding one sequence or several.

    Attributes:
        tokens: [B, T] int32.
        targets: [B, T] int32, the token that follows each.
        weights: [B, T] float32: 1 where the target is to be learnt, 0 where not (padding, prompts).
        positions: [B, T] int32, from 0 in each segment.
        segment_ids: [B, T] int32, which sequence of its row a token belongs to; attention does not cross segments.
    """

    tokens: Array
    targets: Array
    weights: Array
    positions: Array
    segment_ids: Array


BATCH_AXES = Batch(*[("batch", "length")] * len(Batch._fields))


def batch_shapes(batch_size: int, length: int) -> Batch:
    """ShapeDtypeStructs of a batch [B, T]."""
    tokens = jax.ShapeDtypeStruct((batch_size, length), "int32")
    return Batch(tokens, tokens, jax.ShapeDtypeStruct((batch_size, length), "float32"), tokens, tokens)
