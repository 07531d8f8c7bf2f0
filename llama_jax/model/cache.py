"""Keys and values of the tokens already seen.

On a mesh a cache has K' heads: K, or one per device when there are more devices on tensor than key/value heads; each head is
then repeated, and every device writes and reads the one its query heads need.

In int8 each key and each value, the vector of one token and head, has a scale of its own. What a call reads from the cache is
then rounded, what it has just written included; a call without a cache (prefill) attends with keys and values as they were
computed, and `round_cache` rounds what it returns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.mesh import cache_heads
from llama_jax.ops.qarray import QVectors, quantize_vectors
from llama_jax.sharding import constrain, mesh_axis_size, per_device

CACHE_AXES = ("batch", "kv_heads", "cache_length", "head_dim")  # scales have the first three
NEW_AXES = ("batch", "length", "kv_heads", "head_dim")
LANES = 128  # of a TPU


class LayerCache(NamedTuple):
    """k (rotated), v: [B, K', S, H], or QVectors of it; the token at position p lies in slot p."""

    k: Array | QVectors
    v: Array | QVectors


KVCache = list[LayerCache]  # one per layer


def repeat_heads(x: Array) -> Array:
    """[B, T, K, H] -> [B, T, K', H], each head as often as there are devices that need it."""
    copies = cache_heads(x.shape[2], mesh_axis_size("tensor")) // x.shape[2]
    return x if copies == 1 else constrain(jnp.repeat(x, copies, axis=2), *NEW_AXES)


def write(cache: LayerCache, k: Array, v: Array, start: Array) -> LayerCache:
    """Puts k, v [B, T, K', H] into slots start .. start + T - 1 of each row, in place where the cache is donated; rounded where
    the cache is.

    Args:
        start: [B]; the caller keeps start + T <= S (past the end the last slots would be overwritten).
    """

    def put(slots: Array, new: Array, start: Array) -> Array:
        new = new.astype(slots.dtype).swapaxes(1, 2)
        return jax.lax.platform_dependent(slots, new, start, cpu=_write_on_cpu, tpu=_write_on_tpu, default=_write_batch)

    def put_local(slots: Array, new: Array) -> Array:  # the loop over rows is each device's own
        axes = CACHE_AXES[: slots.ndim]
        return per_device(put, (axes, NEW_AXES[: slots.ndim], ("batch",)), axes)(slots, new, start)

    new = (quantize_vectors(x) if isinstance(slots, QVectors) else x for slots, x in zip(cache, (k, v), strict=True))
    return jax.tree.map(put_local, cache, LayerCache(*new))


def _write_batch(slots: Array, new: Array, start: Array) -> Array:
    rest = (0,) * (slots.ndim - 3)
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (0, at, *rest)))(slots, new, start)


def _write_rows(slots: Array, new: Array, start: Array, axis: int = 2) -> Array:
    """Row by row, slots along `axis`: the batched form is a scatter, for which XLA:CPU copies the cache, and of which XLA:TPU
    makes such a loop, too, with 7 kernels a row instead of 3 (libtpu 0.0.42)."""

    def write_row(b: Array, slots: Array) -> Array:
        at = [b if i == 0 else start[b] if i == axis else 0 for i in range(slots.ndim)]
        return jax.lax.dynamic_update_slice(slots, jax.lax.dynamic_slice_in_dim(new, b, 1), at)

    # The end is no constant: XLA:CPU would unroll a loop over one row and copy the cache again, and libtpu 0.0.42 fails.
    return jax.lax.fori_loop(0, jnp.where(start[0] < 0, 0, slots.shape[0]), write_row, slots)


def _write_on_cpu(slots: Array, new: Array, start: Array) -> Array:
    """Row by row but for 16-bit floats, of which XLA:CPU would make the whole cache float32 and back for every row."""
    return _write_bits(slots, new, start) if slots.dtype.itemsize == 2 else _write_rows(slots, new, start)


def _write_bits(slots: Array, new: Array, start: Array) -> Array:
    """Every slot takes a token's bits or keeps its own; the compiled loop does not touch what is kept."""
    T, bits = new.shape[2], jax.lax.bitcast_convert_type(new, jnp.uint16)

    def write_all(zero: Array, slots: Array) -> Array:
        token = (jnp.arange(slots.shape[2]) - start[:, None] - zero)[:, None, :, None]  # [B, 1, S, 1]: which of the T is there
        added = bits if T == 1 else jnp.take_along_axis(bits, jnp.clip(token, 0, T - 1), axis=2, mode="promise_in_bounds")
        own = jax.lax.bitcast_convert_type(slots, jnp.uint16)
        return jax.lax.bitcast_convert_type(jnp.where((token >= 0) & (token < T), added, own), slots.dtype)

    # A loop that runs once, which XLA:CPU does not know: readers of a cache of one row would write a copy of it, too. What does
    # not depend on the loop would be made ahead of it, as large as the cache.
    return jax.lax.fori_loop(0, jnp.where(start[0] < 0, 0, 1), write_all, slots)


def _write_on_tpu(slots: Array, new: Array, start: Array) -> Array:
    """Row by row, of the cache as a TPU is given it: heads that do not fill its lanes lie across them, slots along. Written in
    another order it would be laid out anew, filled up, before a call's first step, and back after its last."""
    if slots.ndim == 3 or slots.shape[3] % LANES == 0:
        return _write_rows(slots, new, start)
    return _write_rows(slots.swapaxes(2, 3), new.swapaxes(2, 3), start, axis=3).swapaxes(2, 3)


def num_slots(cache: KVCache) -> int:
    """S: tokens of a row that it has room for."""
    return cache[0].k.shape[2]


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The same cache with room for `length` tokens a row."""
    pad = ((0, 0), (0, 0), (0, length - num_slots(cache)), (0, 0))
    return jax.tree.map(lambda x: jnp.pad(x, pad[: x.ndim]), cache)


def round_cache(cache: KVCache, cache_dtype: str) -> KVCache:
    """A float cache in one of llama_jax.choices.CACHE_DTYPES."""
    if cache_dtype == "auto":
        return cache
    return [LayerCache(quantize_vectors(layer.k), quantize_vectors(layer.v)) for layer in cache]


def empty_cache(cfg: ModelConfig, shape: tuple[int, int], dtype: DTypeLike, cache_dtype: str) -> KVCache:
    """Zeros: room for B rows of S tokens each.

    Args:
        shape: B, S.
        dtype: of the computation.
        cache_dtype: one of llama_jax.choices.CACHE_DTYPES.
    """
    heads = cache_heads(cfg.num_kv_heads, mesh_axis_size("tensor"))
    slots = (shape[0], heads, shape[1], cfg.head_dim)
    empty = [LayerCache(jnp.zeros(slots, dtype), jnp.zeros(slots, dtype)) for _ in range(cfg.num_layers)]
    return round_cache(empty, cache_dtype)


def cache_axes(cache: KVCache) -> KVCache:
    """Logical axes of every array of a cache."""
    return jax.tree.map(lambda x: CACHE_AXES[: x.ndim], cache)
