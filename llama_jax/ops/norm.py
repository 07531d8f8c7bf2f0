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
    return _scale(normed.astype(x.dtype), weight)


@jax.custom_vjp
def _scale(x: Array, weight: Array) -> Array:
    """[..., D] times [D], whose gradient is summed over tokens in float32."""
    return x * weight.astype(x.dtype)


def _scale_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scale(x, weight), (x, weight)


def _scale_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight = saved
    products = cotangent.astype(jnp.float32) * x.astype(jnp.float32)
    gradient = jnp.sum(products, axis=tuple(range(x.ndim - 1)))
    return cotangent * weight.astype(x.dtype), gradient.astype(weight.dtype)


_scale.defvjp(_scale_forward, _scale_backward)
