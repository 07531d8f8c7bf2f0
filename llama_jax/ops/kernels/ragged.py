"""Attention of one query a row to a cache, on TPUs: of each row, the filled blocks are read, and no others.

Plain attention reads all slots that the cache has. Softmax is computed as blocks come in (Milakov and Gimelshein 2018,
arXiv:1805.02867).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512  # slots; 128 are a TPU's lanes
BLOCK_BYTES = 2**20  # of a block of keys, of all its heads; keys and values, each twice, are on the chip
LOWEST = -1e30  # that a query's highest score is taken to be; finite, so that a block of scores of -inf leaves no NaN


def supports(slots: int, head_dim: int) -> bool:
    """Whether a cache of so many slots, of heads of this width, can be cut into the kernel's blocks."""
    return slots % SMALLEST_BLOCK == 0 and head_dim % 128 == 0


def block_slots(shape: tuple[int, ...], itemsize: int) -> int:
    """Slots of a block of a cache of this shape, [B, K, S, H]."""
    _, K, S, H = shape
    size = LARGEST_BLOCK
    while S % size or (size > SMALLEST_BLOCK and K * size * H * itemsize > BLOCK_BYTES):
        size //= 2
    return size


def attend_ragged(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Grouped-query attention to the first `lengths` slots of each row.

    Args:
        q: [B, N, H], rotated.
        k, v: [B, K, S, H], of q's dtype, or int8 with scales.
        lengths: [B] int32, 1 .. S.
        k_scale, v_scale: [B, K, S] float32, what an int8 key or value is multiplied with. They multiply scores and
            probabilities, so that keys and values are not made float as a whole.
        interpret: run it in JAX operations (for tests on a CPU).

    Returns:
        [B, N, H] in q's dtype.
    """
    with jax.default_matmul_precision("default"):  # XLA:TPU compiles no kernel that multiplies bfloat16 at another
        return _attend(q, k, v, lengths, k_scale, v_scale, interpret)


def _attend(
    q: Array, k: Array, v: Array, lengths: Array, k_scale: Array | None, v_scale: Array | None, interpret: bool
) -> Array:
    from jax.experimental.pallas import tpu

    B, K, _, H = k.shape
    size, group = block_slots(k.shape, k.dtype.itemsize), q.shape[1] // K
    rows = pl.BlockSpec((None, K, group, H), lambda b, j, lengths: (b, 0, 0, 0))
    slots = pl.BlockSpec((None, K, size, H), functools.partial(block_to_fetch, size=size))
    scales = pl.BlockSpec((None, K, size), lambda *at: block_to_fetch(*at, size=size)[:3])
    given = () if k_scale is None else (k_scale, v_scale)
    if not interpret:  # XLA would fetch what fits onto the chip, all slots of it, write the new ones there, and copy it back
        k, v, *given = (tpu.with_memory_space_constraint(x, tpu.HBM) for x in (k, v, *given))
    sums = tpu.VMEM((K, group, 1), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, 1 + jnp.max(_last_block(lengths, size))),
            in_specs=[rows, slots, slots, *(scales for _ in given)],
            out_specs=rows,
            scratch_shapes=[tpu.VMEM((K, group, H), jnp.float32), sums, sums],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, group, H), q.dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="ragged_attention",
        interpret=interpret,
    )(lengths, q.reshape(B, K, group, H), k, v, *given)
    return out.reshape(q.shape)


def block_to_fetch(b: Any, j: Any, lengths: Any, *, size: int) -> tuple:
    """Where in [B, K, S, H] the block lies that step j of row b has in memory.

    Beyond the last that the row fills it is already the next row's first, which is then there when that row begins; the last
    row keeps its last. A block that is there is not fetched again.
    """
    last = _last_block(lengths[b], size)
    ends = jnp.logical_and(j > last, b == lengths.shape[0] - 1)
    next_row = jnp.logical_and(j > last, b < lengths.shape[0] - 1)
    return jnp.where(next_row, b + 1, b), 0, jnp.where(next_row, 0, jnp.where(ends, last, j)), 0


def _last_block(length: Any, size: int) -> Any:
    return jax.lax.div(jnp.maximum(length, 1) - 1, size)


def _kernel(lengths_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, size: int) -> None:
    *scale_refs, out_ref, sum_ref, highest_ref, total_ref = refs
    length, j = lengths_ref[pl.program_id(0)], pl.program_id(1)
    q = q_ref[...]  # [K, G, H]

    @pl.when(j == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(j <= _last_block(length, size))
    def _() -> None:
        scores = dot("KGH,KSH->KGS", q, k_ref[...].astype(q.dtype)) * q.shape[-1] ** -0.5
        if scale_refs:
            scores = scores * scale_refs[0][...][:, None]
        slots = j * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        scores = jnp.where(slots < length, scores, -jnp.inf)
        highest = jnp.maximum(highest_ref[...], jnp.max(scores, axis=2, keepdims=True))
        shrink, weights = jnp.exp(highest_ref[...] - highest), jnp.exp(scores - highest)
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=2, keepdims=True)
        if scale_refs:
            weights = weights * scale_refs[1][...][:, None]
        sum_ref[...] = sum_ref[...] * shrink + dot("KGS,KSH->KGH", weights.astype(q.dtype), v_ref[...].astype(q.dtype))
        highest_ref[...] = highest

    @pl.when(j == _last_block(length, size))
    def _() -> None:
        out_ref[...] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)


def dot(equation: str, a: Array, b: Array) -> Array:
    """A matrix product summed in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
