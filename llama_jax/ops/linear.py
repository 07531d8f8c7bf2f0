"""Matrix products with weights."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def project(equation: str, x: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    """Contracts activations with a weight kept as `[out..., in...]`, PyTorch's orientation.

    Operands are in x's dtype, the sum is float32 (a bfloat16 sum of 4,096 products keeps two digits), and the result is cast
    once, at the end.

    Args:
        equation: einsum equation in the letters of the project, e.g. "BTD,NHD->BTNH".
        x: activations.
        weight: cast to x's dtype.
        dtype: of the result; x's when not given.
    """
    y = jnp.einsum(equation, x, weight.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(dtype or x.dtype)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """float32 means float32: by default TPUs multiply it in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
