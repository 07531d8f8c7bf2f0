"""One token a row on GPUs, from projection to attention: RoPE, its key and value put into the cache, and attention to the
filled slots, whose blocks several programs share (Dao et al. 2023, "Flash-Decoding"), in Pallas, compiled by Triton.

Two kernels, the second of which merges; one, where rows and heads alone occupy the GPU. Plain attention reads all slots.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

HEAD_DIMS = (64, 128)
BLOCK = 64  # slots that a program reads at a time
PROGRAMS = 256  # to be had: two for each processor of an H100 or H200, all at once
MOST_SPLITS = 32
SMALLEST_ROWS = 16  # of a Triton product; query heads of a key/value head are filled up to it
WARPS, STAGES = 4, 3
LOWEST = -1e30  # that a query's highest score is taken to be; finite, so that a block of scores of -inf leaves no NaN
LARGEST_LEVEL = 127.0  # of int8 (llama_jax.ops.qarray)


def supports(slots: int, head_dim: int) -> bool:
    """Whether a cache of so many slots, of heads of this width, can be cut into the kernel's blocks."""
    return slots % BLOCK == 0 and head_dim in HEAD_DIMS


def num_splits(batch: int, num_kv_heads: int, slots: int) -> int:
    """Programs that share the slots of a row and head: a power of two."""
    splits = 1
    while splits * batch * num_kv_heads < PROGRAMS and splits < MOST_SPLITS and 2 * splits * BLOCK <= slots:
        splits *= 2
    return splits


def rotate_append_attend(
    q: Array,
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    positions: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Rotates q and k, puts k and v into slot `positions` of each row, and attends to the slots up to it.

    Args:
        q: [B, N, H]; k, v: [B, K, H]; of one dtype, not rotated.
        cos, sin: [B, H/2] float32, of these positions.
        k_cache, v_cache: [B, K, S, H] of q's dtype, or int8 with scales; overwritten in place where donated.
        positions: [B] int32; past the end the last slot is overwritten.
        k_scale, v_scale: [B, K, S] float32, what an int8 key or value is multiplied with; they multiply scores and
            probabilities, so that keys and values are not made float as a whole.
        splits: programs that share a row and head; num_splits unless given.
        interpret: run it in JAX operations (for tests on a CPU).

    Returns:
        [B, N, H] in q's dtype, k_cache, v_cache, and the scales if there are.
    """
    B, K, _, H = k_cache.shape
    caches = (k_cache, v_cache) if k_scale is None else (k_cache, v_cache, k_scale, v_scale)
    # In one array, so that what sums up the products of several projections is one kernel, not one for each.
    new = jnp.concatenate([q.reshape(B, K, -1, H), k[:, :, None], v[:, :, None]], axis=2)
    out, *caches = attend_new(new, cos, sin, positions, caches, splits=splits, interpret=interpret)
    return out.reshape(q.shape), *caches


# A model's layers then share one trace.
@functools.partial(jax.jit, static_argnames=("splits", "interpret"))
def attend_new(
    new: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    caches: tuple[Array, ...],
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """rotate_append_attend of what is in one array.

    Args:
        new: [B, K, G + 2, H], of each key/value head its query heads, its key and its value.
        caches: k_cache, v_cache, and their scales if there are.

    Returns:
        [B, K, G, H], and the caches.
    """
    B, K, heads, H = new.shape
    positions, splits = positions.astype(jnp.int32), splits or num_splits(B, K, caches[0].shape[2])
    group, dtype = heads - 2, new.dtype
    rows = max(SMALLEST_ROWS, pl.next_power_of_2(group))

    def of_head(height: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, height, H), lambda i, n, b: (b, n, 0, 0))

    angles = pl.BlockSpec((None, H // 2), lambda i, n, b: (b, 0))
    position = pl.BlockSpec((None,), lambda i, n, b: (b,))
    slots = [pl.BlockSpec((None, None, *x.shape[2:]), lambda i, n, b, rank=x.ndim: (b, n, 0, 0)[:rank]) for x in caches]
    if splits == 1:
        outputs, specs = [jax.ShapeDtypeStruct((B, K, group, H), dtype)], [of_head(rows)]
    else:
        sums = jax.ShapeDtypeStruct((B, K, splits, group), jnp.float32)
        sum_spec = pl.BlockSpec((None, None, None, rows), lambda i, n, b: (b, n, i, 0))
        outputs = [jax.ShapeDtypeStruct((B, K, splits, group, H), jnp.float32), sums, sums]
        specs = [pl.BlockSpec((None, None, None, rows, H), lambda i, n, b: (b, n, i, 0, 0)), sum_spec, sum_spec]
    results = pl.pallas_call(
        functools.partial(_attend_kernel, group=group, rows=rows, num_caches=len(caches)),
        grid=(splits, K, B),
        in_specs=[position, of_head(max(rows, heads)), angles, angles, *slots],
        out_specs=[*specs, *slots],
        out_shape=[*outputs, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches)],
        input_output_aliases={4 + i: len(outputs) + i for i in range(len(caches))},
        name="decode_attention",
        compiler_params=_compiler_params(WARPS, STAGES),
        interpret=interpret,
    )(positions, new, cos, sin, *caches)
    found, caches = results[: len(outputs)], results[len(outputs) :]
    return (found[0] if splits == 1 else _merge(*found, dtype, interpret)), *caches


def _attend_kernel(position_ref: Any, new_ref: Any, *refs: Any, group: int, rows: int, num_caches: int) -> None:
    """The first of the programs that share a row and head writes the new key and value, and attends to them as it has them;
    what any program reads of their slot, before or after, is masked."""
    cos, sin, refs = refs[0][...], refs[1][...], refs[2:]
    caches, outputs, written = refs[:num_caches], refs[num_caches:-num_caches], refs[-num_caches:]
    (k_slots, v_slots), scale_refs = caches[:2], caches[2:]
    splits, i = pl.num_programs(0), pl.program_id(0)
    (S, H), dtype = k_slots.shape, new_ref.dtype
    halves = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
    position = jnp.minimum(position_ref[...], S - 1)

    real = jax.lax.broadcasted_iota(jnp.int32, (rows, H // 2), 0) < group
    q = _rotate(*(_load(new_ref.at[pl.ds(0, rows), half], real) for half in halves), cos, sin)
    keys, k_scale = _round(_rotate(*(new_ref[group, half] for half in halves), cos, sin), bool(scale_refs))
    (value,), v_scale = _round([new_ref[group + 1, :]], bool(scale_refs))

    in_base_2 = H**-0.5 * math.log2(math.e)
    products = (jnp.sum(part.astype(jnp.float32) * key[None, :], axis=1) for part, key in zip(q, keys, strict=True))
    first = i == 0
    start = (
        jnp.where(first, jnp.broadcast_to(value[None, :] * v_scale, (rows, H)), 0.0),
        jnp.where(first, sum(products) * k_scale * in_base_2, LOWEST),
        jnp.where(first, jnp.ones(rows, jnp.float32), 0.0),
    )

    def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, highest, total = carry
        at = pl.ds(j * BLOCK, BLOCK)
        scores = sum(_dot(part, k_slots[at, half].astype(part.dtype).T) for part, half in zip(q, halves, strict=True))
        if scale_refs:
            scores = scores * scale_refs[0][at][None, :]
        filled = (j * BLOCK + jnp.arange(BLOCK) < position)[None, :]
        scores = jnp.where(filled, scores * in_base_2, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp2(highest - higher), jnp.exp2(scores - higher[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        if scale_refs:
            weights = weights * scale_refs[1][at][None, :]
        return out * shrink[:, None] + _dot(weights.astype(dtype), v_slots[at, :].astype(dtype)), higher, total

    blocks = jax.lax.div(position + BLOCK - 1, BLOCK)
    share = jax.lax.div(blocks + splits - 1, splits)
    out, highest, total = jax.lax.fori_loop(i * share, jnp.minimum((i + 1) * share, blocks), visit, start)
    if len(outputs) == 1:
        out = out / total[:, None]
    else:
        for ref, sums in zip(outputs[1:], (highest, total), strict=True):
            _store(ref, sums, jnp.arange(rows) < group)
    _store(outputs[0], out.astype(outputs[0].dtype), jax.lax.broadcasted_iota(jnp.int32, (rows, H), 0) < group)

    @pl.when(i == 0)
    def _() -> None:
        for half, key in zip(halves, keys, strict=True):
            written[0][position, half] = key.astype(k_slots.dtype)
        written[1][position, :] = value.astype(v_slots.dtype)
        for ref, scale in zip(written[2:], (k_scale, v_scale), strict=False):
            ref[position] = scale


def _merge(out: Array, highest: Array, total: Array, dtype: jnp.dtype, interpret: bool) -> Array:
    """[B, K, splits, G, H] and [B, K, splits, G] of the programs -> [B, K, G, H]."""
    B, K, splits, group, H = out.shape
    sums = pl.BlockSpec((None, None, splits, None), lambda g, n, b: (b, n, 0, g))
    return pl.pallas_call(
        _merge_kernel,
        grid=(group, K, B),
        in_specs=[pl.BlockSpec((None, None, splits, None, H), lambda g, n, b: (b, n, 0, g, 0)), sums, sums],
        out_specs=pl.BlockSpec((None, None, None, H), lambda g, n, b: (b, n, g, 0)),
        out_shape=jax.ShapeDtypeStruct((B, K, group, H), dtype),
        name="decode_attention_merge",
        compiler_params=_compiler_params(1, 1),
        interpret=interpret,
    )(out, highest, total)


def _merge_kernel(out_ref: Any, highest_ref: Any, total_ref: Any, merged_ref: Any) -> None:
    highest = highest_ref[...]
    weights = jnp.exp2(highest - jnp.max(highest, axis=0))
    total = jnp.sum(weights * total_ref[...], axis=0)
    merged_ref[...] = (jnp.sum(out_ref[...] * weights[:, None], axis=0) / total).astype(merged_ref.dtype)


def _rotate(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """ops.rope.rotate, of halves [..., H/2]."""
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    return (a * cos - b * sin).astype(first.dtype), (b * cos + a * sin).astype(first.dtype)


def _round(parts: Sequence[Array], to_int8: bool) -> tuple[list[Array], Array | float]:
    """The parts of a vector as the cache will hold them, in float32, and what they are multiplied with."""
    parts = [part.astype(jnp.float32) for part in parts]
    if not to_int8:
        return parts, 1.0
    scale = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(part)) for part in parts)) / LARGEST_LEVEL
    return [_nearest(part / jnp.where(scale > 0, scale, 1.0)) for part in parts], scale


def _nearest(x: Array) -> Array:
    """jnp.round, which Pallas has not for Triton: of two, the even one."""
    below = jnp.floor(x)
    rest, odd = x - below, below != 2 * jnp.floor(below / 2)
    return jnp.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1, below)


def _dot(a: Array, b: Array) -> Array:
    """A matrix product summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _load(ref: Any, mask: Array) -> Array:
    from jax.experimental.pallas import triton

    return triton.load(ref, mask=mask, other=0)


def _store(ref: Any, value: Array, mask: Array) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref.at[...], value, mask=mask)


def _compiler_params(warps: int, stages: int) -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=warps, num_stages=stages)
