"""Numbers read as 32-bit words inside a GPU's kernel, several to a word, and made float32 by their bits, without converting."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

WORD = 32  # bits
MANTISSA = 23  # bits of a float32's


def per_word(dtype: Any) -> int:
    """How many numbers a word holds."""
    return WORD // jax.dtypes.itemsize_bits(dtype)


def to_words(x: Array) -> Array:
    """[..., n] -> int32 [..., n / per_word], the same bytes."""
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, per_word(x.dtype)), jnp.int32)


def numbers(words: Array, dtype: Any, flips: Sequence[Array] = ()) -> list[Array]:
    """The numbers in each word, in order, each in an array of the words' shape.

    Args:
        dtype: of the numbers: bfloat16, float16, int8 or int4.
        flips: of integers, what `integer_flips` has.

    Returns:
        float32.
    """
    if dtype == jnp.bfloat16:
        return [_as_float(words << 16), _as_float(words & ~0xFFFF)]
    if dtype == jnp.float16:
        halves = (jnp.right_shift(words, shift).astype(jnp.int16) for shift in (0, 16))
        return [jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) for half in halves]
    found, bits = [], jax.dtypes.itemsize_bits(dtype)
    sign = 1 << (bits - 1)
    for shift, at in _places(bits):
        shifted = jnp.right_shift(words, shift) if shift else words
        flipped = (shifted & ((2 * sign - 1) << at)) ^ flips[at // bits]
        found.append(_as_float(flipped) - (2.0 ** (MANTISSA - at) + sign))
    return found


def integer_flips(dtype: Any) -> np.ndarray:
    """int32 [n]: which bits, flipped in a word that has an integer's at bit 0, `bits`, 2 * bits, ... and no others, make it a
    float32: a power of two, plus the integer, plus 2^(bits - 1). Kernels get them in an array, for each use of a constant costs
    an instruction."""
    bits = jax.dtypes.itemsize_bits(dtype)
    places = sorted({at for _, at in _places(bits)})
    return np.array([np.float32(2.0 ** (MANTISSA - at)).view(np.int32) | 1 << (at + bits - 1) for at in places], np.int32)


def parts(words: Array, rank: int, dtype: Any) -> list[Array]:
    """Words of this rank, or of one more with n words along the last axis: `numbers` of all n, in order."""
    if words.ndim == rank:
        return numbers(words, dtype)
    if words.shape[-1] == 1:
        return parts(words.reshape(words.shape[:-1]), rank, dtype)
    return [part for half in jnp.split(words, 2, axis=-1) for part in parts(half, rank, dtype)]


def _places(bits: int) -> list[tuple[int, int]]:
    """Of each integer in a word, how far to shift it right and where its bits then begin: inside a float32's mantissa."""
    found, shift = [], 0
    for at in range(0, WORD, bits):
        if at + bits - shift > MANTISSA:
            shift = at
        found.append((shift, at - shift))
    return found


def _as_float(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
