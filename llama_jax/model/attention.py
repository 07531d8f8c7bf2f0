"""Attention of new tokens to the cache, and to themselves once they are in it."""

import jax
from jax import Array

from llama_jax.model.cache import LayerCache, repeat_heads, write
from llama_jax.ops.attention import attend_cached, cache_array_axes, cache_arrays, multiplies_cache, of_arrays
from llama_jax.ops.kernels import Kernels, decode
from llama_jax.ops.rope import rotate
from llama_jax.sharding import per_device


def attend_and_write(
    q: Array, k: Array, v: Array, cos: Array, sin: Array, cache: LayerCache, positions: Array, *, kernels: Kernels = True
) -> tuple[Array, LayerCache]:
    """Rotates q and k, puts k and v into the cache, and attends: each token to the slots up to its own.

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H]; not rotated.
        cos, sin: [B, T, H/2], of these positions.
        positions: [B, T], consecutive in each row.
        kernels: by the kernels of the platform this is compiled for, where it has some for the shape: of single tokens here, of
            many in attend_cached; not float32.

    Returns:
        [B, T, N, H], and the cache.
    """

    def plain(
        q: Array, k: Array, v: Array, cos: Array, sin: Array, cache: LayerCache, positions: Array
    ) -> tuple[Array, LayerCache]:
        q, k = rotate(q, cos, sin), repeat_heads(rotate(k, cos, sin))
        cache = write(cache, k, repeat_heads(v), positions[:, 0])
        return attend_cached(q, cache.k, cache.v, positions, kernels=kernels), cache

    inputs = (q, k, v, cos, sin, cache, positions)
    if not kernels or q.shape[1] != 1 or not multiplies_cache(q, cache.k) or not decode.supports(cache.k.shape[2], q.shape[3]):
        return plain(*inputs)
    return jax.lax.platform_dependent(*inputs, cuda=_fused, default=plain)


def _fused(
    q: Array, k: Array, v: Array, cos: Array, sin: Array, cache: LayerCache, positions: Array
) -> tuple[Array, LayerCache]:
    """The same of single tokens, by the GPU's kernels."""
    heads, kv_heads, angles = ("batch", "heads", "head_dim"), ("batch", "kv_heads", "head_dim"), ("batch", "head_dim")
    k_slots, v_slots, *scales = cache_arrays(*cache)
    slots = tuple(map(cache_array_axes, (k_slots, v_slots, *scales)))
    inputs = (heads, kv_heads, kv_heads, angles, angles, *slots[:2], ("batch",), *slots[2:])
    run = per_device(decode.rotate_append_attend, inputs, (heads, *slots))
    single = (x[:, 0] for x in (q, repeat_heads(k), repeat_heads(v), cos, sin))
    y, *written = run(*single, k_slots, v_slots, positions[:, 0], *scales)
    return y[:, None], LayerCache(*of_arrays(written))
