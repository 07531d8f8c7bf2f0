"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounds a weight's inputs one after the other, and corrects for the error of
each with those that are still to come, so that products with given activations change least."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.choices import METHODS
from llama_jax.ops.qarray import GROUP, QArray, levels, num_groups, scale_of

DAMPING = 0.01  # of the mean of the diagonal, added to the diagonal (section 3.3, step 3)
METHODS_FOR = ("int8", "int4")

State = tuple[Array, Array, Array]


@functools.partial(jax.jit, static_argnames=("num_inputs", "method"))
def quantize_for(weight: Array, gram: Array, num_inputs: int, method: str) -> QArray:
    """`qarray.quantize` with the least error for what a weight is multiplied with; computes in float32.

    A scale is chosen as there: of int8 from the whole row, of int4 from a group's weights when their turn comes.

    Args:
        weight: [out..., in...].
        gram: [I, I] float32, the sum of x x^T over activations x [I], the inputs as one axis.
        num_inputs: how many of the last axes are inputs.
        method: one of METHODS_FOR.
    """
    outputs = weight.shape[: weight.ndim - num_inputs]
    w = weight.astype(jnp.float32).reshape(math.prod(outputs), -1)
    inputs, groups = w.shape[1], num_groups(w.shape[1], method)
    size, whole, root = math.gcd(inputs, GROUP), scale_of(w, method), _inverse_root(gram)

    def block(b: Array, state: State) -> State:
        w, value, scale = state
        rows = jax.lax.dynamic_slice_in_dim(root, b * size, size)
        part, corner = (jax.lax.dynamic_slice_in_dim(a, b * size, size, axis=1) for a in (w, rows))
        own = scale_of(part, method) if groups > 1 else whole
        steps, errors = _round_columns(part, corner, own, method)
        w = w - jnp.einsum("OC,CI->OI", errors, rows, precision="highest")  # rows are 0 before the block
        value = jax.lax.dynamic_update_slice_in_dim(value, steps.astype(value.dtype), b * size, axis=1)
        return w, value, jax.lax.dynamic_update_slice_in_dim(scale, own, b if groups > 1 else 0, axis=1)

    state = (w, jnp.zeros(w.shape, jnp.dtype(METHODS[method][0])), jnp.zeros((w.shape[0], groups), whole.dtype))
    _, value, scale = jax.lax.fori_loop(0, inputs // size, block, state)
    return QArray(value.reshape(weight.shape), scale.reshape(*outputs, groups))


def _round_columns(part: Array, corner: Array, scale: Array, method: str) -> tuple[Array, Array]:
    """The levels of columns [O, C], and their errors by the diagonal; corner [C, C] is theirs of the inverse root."""

    def column(i: Array, state: State) -> State:
        part, steps, errors = state
        w = jax.lax.dynamic_slice_in_dim(part, i, 1, axis=1)
        level = levels(w, scale, method)
        error = (w - level * scale.astype(jnp.float32)) / corner[i, i]
        part = part - error * corner[i]  # which is 0 before i
        steps, errors = (
            jax.lax.dynamic_update_slice_in_dim(a, each, i, axis=1) for a, each in ((steps, level), (errors, error))
        )
        return part, steps, errors

    _, steps, errors = jax.lax.fori_loop(0, part.shape[1], column, (part, jnp.zeros_like(part), jnp.zeros_like(part)))
    return steps, errors


def _inverse_root(gram: Array) -> Array:
    """U, upper triangular, U^T U the inverse of the damped matrix: the inverse of R in R R^T, which is Cholesky's backwards."""
    mean = jnp.mean(jnp.diagonal(gram))
    identity = jnp.eye(len(gram), dtype=jnp.float32)
    damped = gram + jnp.where(mean > 0, DAMPING * mean, 1) * identity
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], identity, lower=False)
