"""Attention of whole sequences on NVIDIA's GPUs by cuDNN. It takes no segments, so that prompts are read with it, and flash has
training's packed rows, and GPUs on which it does not work."""

import jax
from jax import Array

WIDTH_MULTIPLE, MOST_WIDTH = 8, 128  # of heads
LENGTH_MULTIPLE = 128  # of rows whose scores are worth not to be in memory


def supports(length: int, head_dim: int) -> bool:
    """Whether it takes sequences of this length and heads of this width."""
    return length % LENGTH_MULTIPLE == 0 and head_dim % WIDTH_MULTIPLE == 0 and head_dim <= MOST_WIDTH


def attend_cudnn(q: Array, k: Array, v: Array) -> Array:
    """ops.attention.attend_causal of rows that hold one sequence each.

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H]; of bfloat16 or float16.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
