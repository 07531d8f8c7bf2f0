"""Keys and values of the tokens already seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LayerCache(NamedTuple):
    """k (rotated), v: [B, K, S, H]; the token at position p lies in slot p."""

    k: Array
    v: Array


KVCache = list[LayerCache]  # one per layer


def write(cache: LayerCache, k: Array, v: Array, start: Array) -> LayerCache:
    """Puts k, v [B, T, K, H] into slots start .. start + T - 1 of each row, in place where the cache is donated.

    Args:
        start: [B]; the caller keeps start + T <= S (past the end the last slots would be overwritten).
    """

    def put(slots: Array, new: Array) -> Array:
        new = new.astype(slots.dtype).swapaxes(1, 2)
        return jax.lax.platform_dependent(slots, new, start, cpu=_write_rows, default=_write_batch)

    return LayerCache(put(cache.k, k), put(cache.v, v))


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
