"""Attention of many queries a row to a cache that has their own keys and values, on TPUs: a long prompt's later chunks, a
chat's turns. Of each row the blocks that a query sees are read, and no scores are held (Dao et al. 2022, arXiv:2205.14135)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from llama_jax.ops.kernels.ragged import LOWEST, dot

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512  # of queries, and of slots; 128 are a TPU's lanes
MOST_ROWS = 1024  # of a block: queries times their heads, unless the fewest queries have more
MOST_SCORES = 2**19  # of a block, on the chip in float32
MOST_GROUP = 16  # query heads of a key/value head: with 32 libtpu 0.0.42 finds no room for 128 queries on a v5e


def supports(length: int, slots: int, head_dim: int, group: int) -> bool:
    """Whether so many queries of a row, and so many slots of heads of this width, each of `group` query heads, can be cut into
    the kernel's blocks."""
    return length % SMALLEST_BLOCK == slots % SMALLEST_BLOCK == head_dim % 128 == 0 and group <= MOST_GROUP


def blocks(length: int, slots: int, group: int) -> tuple[int, int]:
    """Queries and slots of a block."""
    queries = _block(length, MOST_ROWS // group)
    return queries, _block(slots, MOST_SCORES // (group * queries))


def attend_ragged_chunk(
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """ops.attention.attend_cached of consecutive tokens.

    Args:
        q: [B, T, N, H], rotated.
        k, v: [B, K, S, H], of q's dtype, or int8 with scales.
        starts: [B] int32, the slot of each row's first token; T more are there.
        k_scale, v_scale: [B, K, S] float32; they multiply scores and probabilities.
        interpret: run it in JAX operations (for tests on a CPU).

    Returns:
        [B, T, N, H] in q's dtype.
    """
    with jax.default_matmul_precision("default"):  # XLA:TPU compiles no kernel that multiplies bfloat16 at another
        return _attend(q, k, v, starts.astype(jnp.int32), k_scale, v_scale, interpret)


def _attend(
    q: Array, k: Array, v: Array, starts: Array, k_scale: Array | None, v_scale: Array | None, interpret: bool
) -> Array:
    from jax.experimental.pallas import tpu

    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    queries, size = blocks(T, S, N // K)
    last_block = functools.partial(_last_block, queries=queries, size=size)

    def slots_at(b: Any, n: Any, i: Any, j: Any, starts: Any) -> tuple:
        """A block that is there is not fetched again."""
        return b, n, jnp.minimum(j, last_block(starts[b], i)), 0

    def scales_at(*at: Any) -> tuple:
        b, n, block, _ = slots_at(*at)
        return b, n, 0, block

    rows = pl.BlockSpec((None, None, N // K, queries, H), lambda b, n, i, j, starts: (b, n, 0, i, 0))
    slots, scales = pl.BlockSpec((None, None, size, H), slots_at), pl.BlockSpec((None, None, 1, size), scales_at)
    given = () if k_scale is None else (k_scale[:, :, None], v_scale[:, :, None])
    if not interpret:  # XLA would fetch what fits onto the chip, all slots of it
        k, v, *given = (tpu.with_memory_space_constraint(x, tpu.HBM) for x in (k, v, *given))
    sums = tpu.VMEM((N // K * queries, 1), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, last_block=last_block, queries=queries, size=size),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, T // queries, 1 + jnp.max(last_block(starts, T // queries - 1))),
            in_specs=[rows, slots, slots, *(scales for _ in given)],
            out_specs=rows,
            scratch_shapes=[tpu.VMEM((N // K * queries, H), jnp.float32), sums, sums],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, N // K, T, H), q.dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name="ragged_chunk_attention",
        interpret=interpret,
    )(starts, jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3), k, v, *given)
    return jnp.moveaxis(out, 3, 1).reshape(q.shape)


def _last_block(start: Any, i: Any, *, queries: int, size: int) -> Any:
    """Of slots that the i-th block of a row's queries sees."""
    return jax.lax.div(start + (i + 1) * queries - 1, size)


def _kernel(starts_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, last_block: Any, queries: int, size: int) -> None:
    *scale_refs, out_ref, sum_ref, highest_ref, total_ref = refs
    start, i, j = starts_ref[pl.program_id(0)], pl.program_id(2), pl.program_id(3)
    group, _, H = q_ref.shape

    @pl.when(j == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(j <= last_block(start, i))
    def _() -> None:
        q = q_ref[...].reshape(group * queries, H)
        scores = dot("MH,SH->MS", q, k_ref[...].astype(q.dtype)) * H**-0.5
        if scale_refs:
            scores = scores * scale_refs[0][...]
        shape = (group, queries, size)
        position = start + i * queries + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = j * size + jax.lax.broadcasted_iota(jnp.int32, shape, 2) <= position
        scores = jnp.where(seen, scores.reshape(shape), -jnp.inf).reshape(group * queries, size)
        highest = jnp.maximum(highest_ref[...], jnp.max(scores, axis=1, keepdims=True))
        shrink, weights = jnp.exp(highest_ref[...] - highest), jnp.exp(scores - highest)
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if scale_refs:
            weights = weights * scale_refs[1][...]
        sum_ref[...] = sum_ref[...] * shrink + dot("MS,SH->MH", weights.astype(q.dtype), v_ref[...].astype(q.dtype))
        highest_ref[...] = highest

    @pl.when(j == last_block(start, i))
    def _() -> None:
        out_ref[...] = (sum_ref[...] / total_ref[...]).reshape(group, queries, H).astype(out_ref.dtype)


def _block(size: int, most: int) -> int:
    """The largest power of two from SMALLEST_BLOCK to LARGEST_BLOCK that divides `size`, and is at most `most` if one is."""
    block = math.gcd(size, LARGEST_BLOCK)
    while block > max(most, SMALLEST_BLOCK):
        block //= 2
    return block
