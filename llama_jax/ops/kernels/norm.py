"""RMS normalisation of one row on a GPU in one kernel, where XLA makes two: a sum, and what divides by it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

WARPS = 8


# A model's layers then share one trace.
@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def normalise_row(x: Array, weight: Array, eps: float, *, interpret: bool = False) -> Array:
    """ops.norm.rms_norm of a single row: x [..., D] of D elements, weight [D].

    Args:
        interpret: run it in JAX operations (for tests on a CPU).
    """
    from jax.experimental.pallas import triton

    row = pl.BlockSpec((pl.next_power_of_2(x.size),), lambda i: (0,))
    return pl.pallas_call(
        functools.partial(_kernel, width=x.size, eps=eps),
        grid=(1,),
        in_specs=[row, row],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="rms_norm",
        interpret=interpret,
    )(x.reshape(-1), weight.astype(x.dtype)).reshape(x.shape)


def _kernel(x_ref: Any, weight_ref: Any, out_ref: Any, *, width: int, eps: float) -> None:
    from jax.experimental.pallas import triton

    real = jnp.arange(x_ref.shape[0]) < width
    x, weight = (triton.load(ref.at[...], mask=real, other=0) for ref in (x_ref, weight_ref))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=0) / width + eps)
    triton.store(out_ref.at[...], normed.astype(x.dtype) * weight, mask=real)
