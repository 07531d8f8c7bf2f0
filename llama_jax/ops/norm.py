"""Root mean square layer normalisation."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.ops.kernels import norm
from llama_jax.sharding import per_device


def rms_norm(x: Array, weight: Array, eps: float, *, kernels: bool = False) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467).

    The mean and the root are float32; the result is cast to x's dtype before it meets the weight, in the order of Meta's
    llama/model.py, which decides the last bits in bfloat16.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean of squares.
        kernels: of a single row, [1, 1, D] and not float32, by the GPU's kernel, which has no gradient.

    Returns:
        [..., D] in x's dtype.
    """

    def plain(x: Array, weight: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        return normed.astype(x.dtype) * weight.astype(x.dtype)

    if not kernels or x.dtype == jnp.float32 or x.shape[:-1] != (1, 1):
        return plain(x, weight)
    row = ("batch", "length", "act_embed")
    fused = per_device(functools.partial(norm.normalise_row, eps=eps), (row, ("norm",)), row)
    return jax.lax.platform_dependent(x, weight, cuda=fused, default=plain)
