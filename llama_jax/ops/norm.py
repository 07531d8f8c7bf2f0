"""Root mean square layer normalisation."""

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467).

    The mean and the root are float32; the result is cast to x's dtype before it meets the weight, in the order of Meta's
    llama/model.py, which decides the last bits in bfloat16.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean of squares.

    Returns:
        [..., D] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # Cast after it is repeated: its gradient is summed over tokens in float32.
    return normed.astype(x.dtype) * jnp.broadcast_to(weight, x.shape).astype(x.dtype)
