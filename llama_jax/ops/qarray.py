"""Weights, keys and values in fewer bits: what they are, and how they are rounded.

int8: 255 levels, a scale per output channel. int4: 15 levels, a scale per output and 128 inputs, in bfloat16, which costs an
eighth of a bit. fp8: float8_e4m3fn, a scale per output channel. All symmetric about 0, the largest magnitude at the last level.
w8a8 is int8 whose activations are rounded as well, a scale per row, when they are multiplied.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from llama_jax.choices import METHODS

GROUP = 128  # inputs that share a scale, of int4; the greatest common divisor where 128 does not divide them


class QArray(NamedTuple):
    """A weight: value * scale.

    Attributes:
        value: [out..., in...] int8, int4 or float8_e4m3fn, in the place and shape of the float weight.
        scale: [out..., G] float32, or bfloat16; each of so many consecutive inputs, counted over all their axes.
    """

    value: Array
    scale: Array

    @property
    def has_groups(self) -> bool:
        """Whether an output has several scales."""
        return self.scale.shape[-1] > 1


class W8A8Array(QArray):
    """A QArray of int8, one scale per output, that is multiplied with activations rounded to int8."""


def quantize(weight: Array, num_inputs: int, method: str = "int8") -> QArray:
    """Rounds a weight [out..., in...] to the nearest level.

    Args:
        num_inputs: how many of the last axes are inputs.
        method: a key of llama_jax.choices.METHODS.
    """
    outputs, inputs = _split(weight.shape, num_inputs)
    w = weight.astype(jnp.float32).reshape(*outputs, num_groups(math.prod(inputs), method), -1)
    scale = scale_of(w, method)
    kind = W8A8Array if method == "w8a8" else QArray
    return kind(levels(w, scale, method).astype(jnp.dtype(METHODS[method][0])).reshape(weight.shape), scale[..., 0])


def num_groups(inputs: int, method: str) -> int:
    """How many scales an output with so many inputs has."""
    return inputs // math.gcd(inputs, GROUP) if method == "int4" else 1


def scale_of(w: Array, method: str) -> Array:
    """The scale of groups [..., I] of float32 weights, [..., 1], in the dtype that it is kept in."""
    scale = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / METHODS[method][1]
    return scale.astype(jnp.bfloat16 if method == "int4" else jnp.float32)


def levels(w: Array, scale: Array, method: str) -> Array:
    """float32 weights in steps of their scale: the nearest levels, for fp8 before it is rounded to its own."""
    dtype, largest = METHODS[method]
    steps = w / jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    return jnp.clip(steps if dtype == jnp.float8_e4m3fn else jnp.round(steps), -largest, largest)


def dequantize(weight: QArray, dtype: DTypeLike) -> Array:
    """The weight [out..., in...] in a dtype, multiplied in float32."""
    outputs, shape = weight.scale.shape[:-1], weight.value.shape
    steps = weight.value.astype(jnp.float32).reshape(*outputs, weight.scale.shape[-1], -1)
    return (steps * weight.scale[..., None].astype(jnp.float32)).reshape(shape).astype(dtype)


class QVectors(NamedTuple):
    """Vectors that are multiplied whole, as keys and values are: value * scale[..., None].

    Attributes:
        value: [..., H] int8.
        scale: [...] float32, one per vector.
    """

    value: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., H]."""
        return self.value.shape


def quantize_vectors(x: Array) -> QVectors:
    """Rounds vectors [..., H] as `quantize` rounds outputs of a weight to int8."""
    rounded = quantize(x, 1)
    return QVectors(rounded.value, rounded.scale[..., 0])


def _split(shape: tuple[int, ...], num_inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shape[: len(shape) - num_inputs], shape[len(shape) - num_inputs :]
