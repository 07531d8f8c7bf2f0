"""Scaled dot-product attention with grouped keys and values."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from llama_jax.ops.kernels import Kernels, cudnn, flash, ragged, ragged_chunk, splash
from llama_jax.ops.linear import dot
from llama_jax.ops.qarray import QVectors
from llama_jax.sharding import per_device

# Finite, so that a row that may look nowhere stays finite (a softmax of all -inf is NaN and spreads through the batch).
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
QUERIES, MOST_BLOCKS = 128, 8  # queries of a block at least, and blocks at most: every one is code of its own


def attend_causal(q: Array, k: Array, v: Array, segment_ids: Array | None = None, *, kernels: Kernels = True) -> Array:
    """Attention of whole sequences to themselves: a token sees those before it, and itself.

    Args:
        q: [B, T, N, H], rotated.
        k, v: [B, T, K, H], k rotated; N is a multiple of K.
        segment_ids: [B, T] where rows hold several sequences: a token sees its own only.
        kernels: by the kernel of the platform this is compiled for (TPU, CUDA), where it has one for the shape; "cudnn": on
            CUDA by cuDNN's, of rows without segments. False, shapes without one, float32, which kernels do not multiply in
            full, and CPUs: scores are in memory, of blocks of queries with the keys that one of them may see.

    Returns:
        [B, T, N, H] in q's dtype, which is k's and v's.
    """

    def plain(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        T = q.shape[1]
        size = max(QUERIES, -(-T // MOST_BLOCKS))
        firsts = list(range(size, T, size))
        ks, vs = (jnp.split(x.swapaxes(1, 2), firsts, axis=2) for x in (k, v))
        blocks = []
        for i, part in enumerate(jnp.split(q, firsts, axis=1)):  # what no query of a block may see is not multiplied
            first, last = i * size, min((i + 1) * size, T)
            mask = (jnp.arange(last) <= jnp.arange(first, last)[:, None])[None]
            if segment_ids is not None:
                mask = mask & (segment_ids[:, first:last, None] == segment_ids[:, None, :last])
            # XLA slices for a concatenation of neighbours; the gradient of a slice would be padded to the whole length.
            keys, values = (jnp.concatenate(x[: i + 1], axis=2) for x in (ks, vs))
            blocks.append(attend(part, keys, values, mask))
        return checkpoint_name(jnp.concatenate(blocks, axis=1), "attention")

    heads, kv_heads = ("batch", "length", "heads", "head_dim"), ("batch", "length", "kv_heads", "head_dim")
    known = {"tpu": (splash.attend_splash, splash.supports), "cuda": (flash.attend_flash, flash.supports)}
    if kernels == "cudnn" and segment_ids is None:
        known["cuda"] = (lambda q, k, v, _: cudnn.attend_cudnn(q, k, v)), cudnn.supports
    usable = {
        platform: per_device(kernel, (heads, kv_heads, kv_heads, ("batch", "length")), heads)
        for platform, (kernel, supports) in known.items()
        if supports(q.shape[1], q.shape[3])
    }
    if not kernels or not usable or q.dtype == jnp.float32:
        return plain(q, k, v, segment_ids)
    return jax.lax.platform_dependent(q, k, v, segment_ids, **usable, default=plain)


def attend_cached(q: Array, k: Array | QVectors, v: Array | QVectors, positions: Array, *, kernels: Kernels = True) -> Array:
    """Attention to a cache that has the queries' own keys and values: a token sees the slots up to its position.

    Args:
        q: [B, T, N, H], rotated.
        k, v: [B, K, S, H], k rotated; N is a multiple of K.
        positions: [B, T], consecutive in each row.
        kernels: by those of the platform this is compiled for, which read filled slots only, where it has one for the shape: of
            single tokens the TPU, of many TPU and GPU. Otherwise, and of float32, as attend, scores in memory for a block of
            queries at a time, one block after the other.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    S = k.shape[2]

    def plain(q: Array, positions: Array, *cache: Array) -> Array:
        k, v = of_arrays(cache)

        def block(queries: tuple[Array, Array]) -> Array:
            q, positions = queries
            return attend(q, k, v, jnp.arange(S) <= positions[:, :, None])

        if T <= QUERIES:
            return block((q, positions))
        count = -(-T // QUERIES)
        q, positions = (jnp.pad(x, ((0, 0), (0, count * QUERIES - T), *[(0, 0)] * (x.ndim - 2))) for x in (q, positions))
        blocks = (jnp.moveaxis(x.reshape(B, count, QUERIES, *x.shape[2:]), 1, 0) for x in (q, positions))
        return jnp.moveaxis(jax.lax.map(block, tuple(blocks)), 0, 1).reshape(B, count * QUERIES, N, H)[:, :T]

    def one_on_tpu(q: Array, positions: Array, k: Array, v: Array, *scales: Array) -> Array:
        return ragged.attend_ragged(q[:, 0], k, v, jnp.minimum(positions[:, 0] + 1, S), *scales)[:, None]

    def many_on_tpu(q: Array, positions: Array, k: Array, v: Array, *scales: Array) -> Array:
        return ragged_chunk.attend_ragged_chunk(q, k, v, jnp.minimum(positions[:, 0], S - T), *scales)

    def many_on_gpu(q: Array, positions: Array, k: Array, v: Array, *scales: Array) -> Array:
        return flash.attend_flash_cached(q, k, v, jnp.minimum(positions[:, 0], S - T), *scales)

    inputs = (q, positions, *cache_arrays(k, v))
    usable = {"tpu": one_on_tpu} if T == 1 and ragged.supports(S, H) else {}
    usable |= {"tpu": many_on_tpu} if ragged_chunk.supports(T, S, H, N // k.shape[1]) else {}
    usable |= {"cuda": many_on_gpu} if flash.supports_cached(T, S, H) else {}
    if not kernels or not usable or not multiplies_cache(q, k):
        return plain(*inputs)
    heads = ("batch", "length", "heads", "head_dim")
    axes = (heads, ("batch", "length"), *map(cache_array_axes, inputs[2:]))
    usable = {platform: per_device(kernel, axes, heads) for platform, kernel in usable.items()}
    return jax.lax.platform_dependent(*inputs, **usable, default=plain)


def multiplies_cache(q: Array, k: Array | QVectors) -> bool:
    """Whether kernels multiply such queries with such a cache: of their dtype, which is not float32; or int8 with bfloat16,
    float16 holding no probability times a small scale."""
    return q.dtype == jnp.bfloat16 if isinstance(k, QVectors) else q.dtype == k.dtype != jnp.float32


def cache_arrays(k: Array | QVectors, v: Array | QVectors) -> tuple[Array, ...]:
    """k, v, or their int8 values and then their scales, as kernels take them."""
    return (k.value, v.value, k.scale, v.scale) if isinstance(k, QVectors) else (k, v)


def cache_array_axes(x: Array) -> tuple[str, ...]:
    """Logical axes of one of them."""
    return ("batch", "kv_heads", "cache_length", "head_dim")[: x.ndim]


def of_arrays(arrays: Sequence[Array]) -> tuple[Array | QVectors, Array | QVectors]:
    """k and v again."""
    return tuple(arrays) if len(arrays) == 2 else (QVectors(arrays[0], arrays[2]), QVectors(arrays[1], arrays[3]))


def attend(q: Array, k: Array | QVectors, v: Array | QVectors, mask: Array) -> Array:
    """Grouped-query attention; one query head per key/value head is plain multi-head.

    Query head n reads key/value head n // G (Ainslie et al. 2023, arXiv:2305.13245); keys and values are not repeated. Scores
    and softmax are float32 whatever the inputs: at 64 one bfloat16 step is already 0.5.

    Args:
        q: [B, T, N, H], rotated.
        k, v: [B, K, S, H], k rotated; N is a multiple of K. Of QVectors the int8 values are cast to q's dtype in the products,
            and the scales, [B, K, S], multiply the scores and the probabilities.
        mask: [B or 1, T, S] bool, True where a query may look.

    Returns:
        [B, T, N, H] in q's dtype. A row that may look nowhere returns the mean of v; leave it out of the loss.
    """
    if q.dtype == jnp.float32 or q.shape[1] * q.shape[2] != k.shape[1]:
        return _attend(q, k, v, mask)

    def padded(q: Array, k: Array | QVectors, v: Array | QVectors, mask: Array) -> Array:
        """XLA:CPU has no kernel for one query a head: it would first make keys and values float32."""
        one_more = tuple(jnp.pad(a, ((0, 0), (0, 1), *[(0, 0)] * (a.ndim - 2))) for a in (q, mask))
        return _attend(one_more[0], k, v, one_more[1])[:, :1]

    return jax.lax.platform_dependent(q, k, v, mask, cpu=padded, default=_attend)


def _attend(q: Array, k: Array | QVectors, v: Array | QVectors, mask: Array) -> Array:
    B, T, N, H = q.shape
    K = k.shape[1]
    dtype = q.dtype
    q = q.reshape(B, T, K, N // K, H)
    if has_unit := isinstance(v, QVectors) and dtype == jnp.float16:  # which holds no probability times a small scale
        unit = jnp.maximum(jnp.max(v.scale, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)  # [B, K, 1]
        v = v._replace(scale=v.scale / unit)
    # XLA:CPU transposes the scores of the first form, and the keys of the second: here, what is smaller.
    if T * (N // K) < H:
        scores = dot("BTKGH,BKSH->BKGTS", q, _values(k, dtype))
    else:
        scores = dot("BKGTH,BKSH->BKGTS", jnp.moveaxis(q, 1, 3), _values(k, dtype))
    scores = _scaled(scores * H**-0.5, k)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    exps = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    # The product is left in its natural order and moved after: XLA:CPU has no bfloat16 kernel that writes BTKGH. Its rows are
    # divided by their sums, not the probabilities: fewer numbers, and so in the backward pass.
    out = dot("BKGTS,BKSH->BKGTH", _scaled(exps, v).astype(dtype), _values(v, dtype)) / jnp.sum(exps, axis=-1, keepdims=True)
    if has_unit:
        out *= unit[..., None, None]
    return jnp.moveaxis(out.astype(dtype), 3, 1).reshape(B, T, N, H)


def _values(x: Array | QVectors, dtype: DTypeLike) -> Array:
    """What is multiplied, [B, K, S, H]."""
    return x.value.astype(dtype) if isinstance(x, QVectors) else x


def _scaled(y: Array, x: Array | QVectors) -> Array:
    """y [B, K, G, T, S] times the scales of keys or values."""
    return y * x.scale[:, :, None, None] if isinstance(x, QVectors) else y
