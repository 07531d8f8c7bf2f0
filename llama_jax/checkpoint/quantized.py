"""Quantised weights on disk: in the place of a weight "layers.0.q_proj" the two arrays of its QArray, "layers.0.q_proj.value"
and "layers.0.q_proj.scale", in the shapes and dtypes that they have in memory and in chunks cut along the same axes.

int4 values are packed, two to a byte along the last axis, the first in the low four bits; a 0 follows an odd number of them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from llama_jax.checkpoint.layout import META, Source, leaf_of, names, shapes
from llama_jax.checkpoint.store import ArrayReader, Checkpoint, StoredArray
from llama_jax.choices import METHODS
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import quantize_leaf
from llama_jax.ops.qarray import QArray

INT4 = np.dtype(ml_dtypes.int4)
REMEDY = "quantise the float checkpoint again (python -m llama_jax.quantize)"


def stored_method(opened: Checkpoint | Source) -> str:
    """The method of the weights on disk, of an adapter's base for one with an adapter; "" of floats."""
    base = innermost(opened)
    return base.quantize if isinstance(base, Checkpoint) else ""


def innermost(opened: Checkpoint | Source) -> Checkpoint | Source:
    """Weights without the adapters that are on them."""
    while hasattr(opened, "base"):
        opened = opened.base
    return opened


def check_quantize(quantize: str) -> None:
    """Raises LlamaError where there is no such method; "" is none."""
    if quantize not in ("", *METHODS):
        raise LlamaError(ExitCode.BAD_REQUEST, f"quantize is {quantize!r}, expected {', '.join(METHODS)}, or None for none")


def check_method(opened: Checkpoint | Source, quantize: str) -> None:
    """Refuses what is no method, and one that is not that of the weights on disk; "" is as they are."""
    check_quantize(quantize)
    stored = stored_method(opened)
    if stored and quantize not in ("", stored):
        base = innermost(opened)
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"{base.path} holds {stored} weights, and quantize is {quantize!r}: rounding twice loses more than once; give the "
            f"float checkpoint that it was made from ({base.command}), or leave quantize out",
        )


def quantized_form(name: str, weight: jax.ShapeDtypeStruct, method: str) -> jax.ShapeDtypeStruct | QArray:
    """What rounding makes of a weight in memory: itself, or a QArray of shapes and dtypes."""
    return _quantized(leaf_of(name), weight.shape, np.dtype(weight.dtype), method)


def named_parts(name: str, weight: Any) -> dict[str, Any]:
    """An array, or a QArray's value and scale, by the names of the disk."""
    return {f"{name}.{part}": each for part, each in weight._asdict().items()} if isinstance(weight, QArray) else {name: weight}


def model_parts(cfg: ModelConfig, dtype: np.dtype, method: str) -> dict[str, jax.ShapeDtypeStruct]:
    """`named_parts` of all weights of a model, without padding."""
    sizes, parts = shapes(cfg), {}
    for name, _ in names(cfg, META):
        parts |= named_parts(name, quantized_form(name, jax.ShapeDtypeStruct(sizes[leaf_of(name)], dtype), method))
    return parts


def stored_form(part: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype on disk of an array in memory."""
    if part.dtype != INT4:
        return part.shape, np.dtype(part.dtype)
    return (*part.shape[:-1], -(-part.shape[-1] // 2)), np.dtype(np.uint8)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weights of a checkpoint's arrays on disk, by their shapes."""
    parts = model_parts(checkpoint.config, checkpoint.dtype, checkpoint.quantize).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in map(stored_form, parts))


def pack(values: np.ndarray) -> np.ndarray:
    """int4 [..., n] -> uint8 [..., ceil(n / 2)]."""
    nibbles = values.view(np.uint8) & 15
    if values.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> int4 [..., 2 n]."""
    nibbles = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    low, high = nibbles[..., ::2], nibbles[..., 1::2]
    np.right_shift((packed << 4).view(np.int8), 4, out=low)  # of int8: keeps the sign
    np.right_shift(packed.view(np.int8), 4, out=high)
    return nibbles.view(INT4)


class PackedArray:
    """int4 values on disk, with the face of a StoredArray of them."""

    def __init__(self, packed: StoredArray, size: int):
        """size: of the last axis, unpacked."""
        fits = packed.shape[-1] == -(-size // 2)
        self.shape = (*packed.shape[:-1], size if fits else 2 * packed.shape[-1])
        self.dtype = INT4
        self._packed = packed

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, or the part at `index`."""
        *outer, last = index or tuple(slice(0, size) for size in self.shape)
        lo, hi, _ = last.indices(self.shape[-1])
        values = unpack(self._packed.read((*outer, slice(lo // 2, -(-hi // 2)))))
        return values[..., lo % 2 : lo % 2 + hi - lo]

    def release(self) -> None:
        """Nothing is kept."""


class DequantizedArray:
    """value * scale in float32, multiplied as they are read; with the face of the float weight's array."""

    def __init__(self, value: StoredArray | PackedArray, scale: StoredArray):
        self.shape = value.shape
        self._value, self._scale = value, scale

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, or the part at `index`."""
        index = index or tuple(slice(0, size) for size in self.shape)
        *outputs, num_groups = self._scale.shape
        rows, columns, inputs = index[: len(outputs)], index[len(outputs) :], self.shape[len(outputs) :]
        size = math.prod(inputs)
        group = np.arange(size).reshape(inputs)[columns] // (size // num_groups)
        scale = self._scale.read((*rows, slice(0, num_groups))).astype(np.float32)
        return self._value.read(index).astype(np.float32) * scale[..., group]

    def release(self) -> None:
        """Nothing is kept."""


@dataclasses.dataclass(frozen=True)
class QuantizedReader:
    """The arrays of a checkpoint of quantised weights."""

    checkpoint: Checkpoint

    @functools.cached_property
    def _arrays(self) -> ArrayReader:
        return ArrayReader(self.checkpoint.path / "params", REMEDY)

    @functools.cached_property
    def _parts(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return model_parts(self.checkpoint.config, self.checkpoint.dtype, self.checkpoint.quantize)

    def part(self, name: str) -> StoredArray | PackedArray:
        """An array by its name as `named_parts` has it, as it is in memory.

        Raises:
            LlamaError: there is none, or it has another dtype.
        """
        array, wanted = self._arrays.array(name), self._parts[name]
        expected = stored_form(wanted)[1]
        if array.dtype != expected:
            raise LlamaError(
                ExitCode.WRONG_SHAPE, f"{self.checkpoint.path}: array {name!r} is {array.dtype}, expected {expected}: {REMEDY}"
            )
        return PackedArray(array, wanted.shape[-1]) if wanted.dtype == INT4 else array

    def array(self, name: str) -> StoredArray | DequantizedArray:
        """A weight by its name, as floats."""
        if name in self._parts:
            return self.part(name)
        return DequantizedArray(self.part(f"{name}.value"), self.part(f"{name}.scale"))


@functools.cache
def _quantized(leaf: str, shape: tuple[int, ...], dtype: np.dtype, method: str) -> jax.ShapeDtypeStruct | QArray:
    weight = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(functools.partial(quantize_leaf, leaf, method=method), weight) if method else weight
