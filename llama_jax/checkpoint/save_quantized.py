"""Writing quantised weights: each is read, rounded on the default device, written and dropped; or, for a text, a layer's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llama_jax.checkpoint.adapter import Stored, reader
from llama_jax.checkpoint.arrays import Leaf, is_finite
from llama_jax.checkpoint.calibrate import Calibration
from llama_jax.checkpoint.layout import META, Source, leaf_of, names
from llama_jax.checkpoint.load import read_part
from llama_jax.checkpoint.quantized import INT4, named_parts, pack, quantized_form, stored_form
from llama_jax.checkpoint.save import Room, save_rooms
from llama_jax.checkpoint.store import Checkpoint, to_flat
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import param_axes, quantize_axes, quantize_leaf
from llama_jax.ops.qarray import QArray


def save_quantized(
    checkpoint: Checkpoint, opened: Checkpoint | Source, *, rows: np.ndarray | None = None, **options: Any
) -> Checkpoint:
    """Writes what `load_params(opened, checkpoint.dtype, quantize=checkpoint.quantize)` returns, or something better.

    Args:
        checkpoint: what to write; its path is the output directory.
        opened: float weights.
        rows: [R, T] tokens of a text that the weights are rounded for (llama_jax.checkpoint.calibrate); None: each to the
            nearest level.
        options: of `save_checkpoint`.

    Raises:
        LlamaError: as `save_checkpoint` does, or weights are not finite in the checkpoint's dtype.
    """
    cfg, dtype, method = checkpoint.config, checkpoint.dtype, checkpoint.quantize
    arrays = {name: reader(opened)(name) for name, _ in names(cfg, META)}

    def read(name: str) -> np.ndarray:
        return _read(name, arrays[name], dtype)

    def nearest(name: str) -> QArray:
        return _round(leaf_of(name), read(name), method)

    rounded = nearest if rows is None else Calibration(cfg, read, rows, method).take
    leaves: dict[str, Leaf] = {}
    for name, array in arrays.items():
        leaves |= _leaves(name, jax.ShapeDtypeStruct(array.shape, dtype), method, read, rounded)
    axes: dict[str, Any] = {}
    for name, each in to_flat(quantize_axes(param_axes(cfg), method)).items():
        axes |= named_parts(name, each)
    return save_rooms(checkpoint, {"params": Room(leaves, axes)}, **options)


def _leaves(
    name: str,
    weight: jax.ShapeDtypeStruct,
    method: str,
    read: Callable[[str], np.ndarray],
    rounded: Callable[[str], QArray],
) -> dict[str, Leaf]:
    """What is written of a weight, by the names of the disk."""
    forms = named_parts(name, quantized_form(name, weight, method))
    if name in forms:
        return {name: Leaf(weight.shape, np.dtype(weight.dtype), functools.partial(read, name))}
    parts = _Parts(lambda: named_parts(name, rounded(name)))
    making = 2 * weight.size * weight.dtype.itemsize  # as it was read, and its copy on the device
    leaves = {part: Leaf(*stored_form(form), functools.partial(parts.take, part), name) for part, form in forms.items()}
    return leaves | {f"{name}.value": dataclasses.replace(leaves[f"{name}.value"], making_bytes=making)}


class _Parts:
    """Arrays that are made together when the first is asked for; each is taken once."""

    def __init__(self, make: Callable[[], Mapping[str, jax.Array]]):
        self._make = make
        self._made: dict[str, jax.Array] = {}

    def take(self, name: str) -> np.ndarray:
        """One of them as it is on disk."""
        self._made = self._made or dict(self._make())
        part = np.asarray(self._made.pop(name))
        return pack(part) if part.dtype == INT4 else part


_round = jax.jit(quantize_leaf, static_argnums=(0, 2))


def _read(name: str, array: Stored, dtype: np.dtype) -> np.ndarray:
    """All of an array, finite, in a dtype."""
    with np.errstate(over="ignore"):
        values = read_part([array], tuple((0, size) for size in array.shape), dtype)
    array.release()
    if not is_finite(values):
        raise LlamaError(
            ExitCode.NOT_FINITE,
            f"{name} has NaN or infinite values in {dtype}: the weights are damaged, or need another --dtype",
        )
    return values
