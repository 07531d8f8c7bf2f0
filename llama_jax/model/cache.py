"""Keys and values of the tokens already seen.

On a mesh a cache has K' heads: K, or one per device when there are more devices on tensor than key/value heads; each head is
then repeated, and every device writes and reads the one its query heads need.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.mesh import cache_heads
from llama_jax.sharding import constrain, mesh_axis_size, per_device

CACHE_AXES = ("batch", "kv_heads", "cache_length", "head_dim")


class LayerCache(NamedTuple):
    """k (rotated), v: [B, K', S, H]; the token at position p lies in slot p."""

    k: Array
    v: Array


KVCache = list[LayerCache]  # one per layer


def repeat_heads(x: Array) -> Array:
    """[B, T, K, H] -> [B, T, K', H], each head as often as there are devices that need it."""
    copies = cache_heads(x.shape[2], mesh_axis_size("tensor")) // x.shape[2]
    return x if copies == 1 else constrain(jnp.repeat(x, copies, axis=2), "batch", "length", "kv_heads", "head_dim")


def write(cache: LayerCache, k: Array, v: Array, start: Array) -> LayerCache:
    """Puts k, v [B, T, K', H] into slots start .. start + T - 1 of each row, in place where the cache is donated.

    Args:
        start: [B]; the caller keeps start + T <= S (past the end the last slots would be overwritten).
    """

    def put(slots: Array, new: Array, start: Array) -> Array:
        new = new.astype(slots.dtype).swapaxes(1, 2)
        return jax.lax.platform_dependent(slots, new, start, cpu=_write_rows, default=_write_batch)

    new = ("batch", "length", "kv_heads", "head_dim")
    put_local = per_device(put, (CACHE_AXES, new, ("batch",)), CACHE_AXES)  # the loop over rows is each device's own
    return LayerCache(put_local(cache.k, k, start), put_local(cache.v, v, start))


def _write_batch(slots: Array, new: Array, start: Array) -> Array:
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (0, at, 0)))(slots, new, start)


def _write_rows(slots: Array, new: Array, start: Array) -> Array:
    """Row by row: the batched form is a scatter, for which XLA:CPU copies the cache (and turns bfloat16 into float32)."""

    def write_row(b: Array, slots: Array) -> Array:
        return jax.lax.dynamic_update_slice(slots, jax.lax.dynamic_slice_in_dim(new, b, 1), (b, 0, start[b], 0))

    # The end is no constant: XLA would unroll a loop over one row, and copy the cache again.
    return jax.lax.fori_loop(0, jnp.where(start[0] < 0, 0, slots.shape[0]), write_row, slots)


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The same cache with room for `length` tokens a row."""
    room = length - cache[0].k.shape[2]
    pad = ((0, 0), (0, 0), (0, room), (0, 0))
    return [LayerCache(jnp.pad(layer.k, pad), jnp.pad(layer.v, pad)) for layer in cache]
