"""Reading arrays straight to where they lie: every process and device reads the bytes of its own parts and no others.

From checkpoints of ours and, without one, from the files of Meta, Hugging Face or llama2.c. A process holds as many arrays'
parts in memory as there are threads, whatever the size of the model.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoint.adapter import Stored, reader
from llama_jax.checkpoint.layout import META, Source, leaf_of, names, shapes
from llama_jax.checkpoint.lazy import LazyArray
from llama_jax.checkpoint.quantized import QuantizedReader, check_method, named_parts, quantized_form
from llama_jax.checkpoint.store import Checkpoint, stored_names, to_flat, to_tree
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import padded_vocab
from llama_jax.model import Params, param_axes, quantize_axes, quantize_leaf
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import sharding

THREADS = 4
Ranges = tuple[tuple[int, int], ...]  # first and last + 1 of each axis


def load_params(
    opened: Checkpoint | Source, dtype: np.dtype, *, mesh: Mesh | None = None, quantize: str = "", scan: bool = False
) -> Params:
    """The parameters of a checkpoint of ours or of another format, cast to a dtype.

    Args:
        mesh: where they go, by llama_jax.sharding; the default device when None.
        quantize: a method (llama_jax.ops.qarray) for projections and head as QArrays; each array is rounded on the devices as
            soon as it is there. Of weights that are stored quantised, their method, or "" for the same.
        scan: layers as one dict of [L, ...].

    Raises:
        LlamaError: an array is missing, damaged, or of another shape than the config says; or the weights are stored in another
            method.
    """
    check_method(opened, quantize)
    targets = _targets(opened.config, dtype, mesh, scan)
    on_disk = shapes(opened.config)
    tables = {name: on_disk[name] for name in ("embedding", "lm_head")}
    is_stored = isinstance(opened, Checkpoint) and bool(opened.quantize)
    method = opened.quantize if is_stored else quantize
    if not method:
        return to_tree(read_arrays(reader(opened), targets, tables))
    wanted = _quantized(opened.config, targets, method, mesh, scan)
    if is_stored:
        return to_tree(_read_quantized(opened, wanted, tables))
    return to_tree(read_arrays(reader(opened), targets, tables, then=_rounding(wanted, method)))


def read_arrays(
    stored: Callable[[str], Stored],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    on_disk: Mapping[str, tuple[int, ...]] | None = None,
    *,
    then: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Arrays by name, each process reading its parts; what `save.write_arrays` wrote, in this form or another.

    Args:
        stored: an array by its name on disk, e.g. `ArrayReader(folder).array`.
        targets: shape, dtype and sharding (None: the default device) by name in memory; "layers.q_proj" is a stack [L, ...].
        on_disk: shapes of arrays that have rows of padding, zeros, in memory.
        then: called with each array in the order of targets, the same in all processes; its result takes the array's place,
            and so few arrays are read ahead of it that they are not in memory together.

    Raises:
        LlamaError: an array is missing, damaged, or has another shape.
    """

    def read(name: str) -> jax.Array:
        target = targets[name]
        each = stored_names(name, target.shape)
        shape = (on_disk or {}).get(name, target.shape[1:] if each != [name] else target.shape)
        arrays = [stored(one) for one in each]
        for one, array in zip(each, arrays, strict=True):
            if array.shape != tuple(shape):
                raise LlamaError(
                    ExitCode.WRONG_SHAPE,
                    f"array {one!r} has shape {list(array.shape)}, expected {list(shape)}: the checkpoint is of another model "
                    "than the config",
                )
        return _place(arrays, target, stacked=each != [name])

    ahead = len(targets) if then is None else THREADS
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        done = zip(targets, _in_order(pool, read, targets, ahead), strict=True)
        return {name: array if then is None else then(name, array) for name, array in done}
    finally:
        pool.shutdown(cancel_futures=True)


def read_part(arrays: Sequence[Stored], ranges: Ranges, dtype: np.dtype, *, stacked: bool = False) -> np.ndarray:
    """A part of an array in memory, or mapped and read-only; what lies beyond the rows on disk is zero.

    Args:
        arrays: one, or those of all layers.
        ranges: of the array in memory, with an axis of layers first when stacked.
    """
    if stacked:
        (first, last), *rest = ranges
        out = np.empty([hi - lo for lo, hi in ranges], dtype)
        for i in range(first, last):
            out[i - first] = read_part(arrays[i : i + 1], tuple(rest), dtype)
        return out
    (array,) = arrays
    inside = tuple(slice(lo, min(hi, size)) for (lo, hi), size in zip(ranges, array.shape, strict=True))
    read = array.view if isinstance(array, LazyArray) else array.read
    if all(part.stop == hi for part, (_, hi) in zip(inside, ranges, strict=True)):
        return read(inside).astype(dtype, copy=False)
    out = np.zeros([hi - lo for lo, hi in ranges], dtype)
    if all(part.start < part.stop for part in inside):
        out[tuple(slice(part.stop - part.start) for part in inside)] = read(inside)
    return out


def _place(arrays: Sequence[Stored], target: jax.ShapeDtypeStruct, *, stacked: bool) -> jax.Array:
    """The array in memory; a part that several devices hold is read once."""

    @functools.cache
    def part(ranges: Ranges) -> np.ndarray:
        return read_part(arrays, ranges, target.dtype, stacked=stacked)

    def ranges(index: tuple[slice, ...]) -> Ranges:
        return tuple(axis.indices(size)[:2] for axis, size in zip(index, target.shape, strict=True))

    if target.sharding is None:
        placed = jax.device_put(part(tuple((0, size) for size in target.shape)))
    else:
        placed = jax.make_array_from_callback(target.shape, target.sharding, lambda index: part(ranges(index)))
    for array in arrays:
        array.release()
    return placed


def _in_order(
    pool: concurrent.futures.Executor, read: Callable[[str], jax.Array], wanted: Sequence[str], ahead: int
) -> Iterator[jax.Array]:
    """read(name) for each, so many at most begun or waiting to be taken."""
    waiting = collections.deque()
    for name in wanted:
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(read, name))
    while waiting:
        yield waiting.popleft().result()


def _targets(cfg: ModelConfig, dtype: np.dtype, mesh: Mesh | None, scan: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What is wanted of each parameter. Without a mesh no axes are needed, which take a trace of the model to find."""
    rows = padded_vocab(cfg.vocab_size, 1 if mesh is None else mesh.shape["tensor"])
    in_memory = shapes(dataclasses.replace(cfg, vocab_size=rows))
    axes = {} if mesh is None else to_flat(param_axes(cfg, scan=scan))
    targets = {}
    for name, _ in names(cfg, META):
        shape = in_memory[leaf_of(name)]
        if scan and name.startswith("layers."):
            name, shape = f"layers.{leaf_of(name)}", (cfg.num_layers, *shape)
        place = None if mesh is None else sharding(mesh, axes[name], shape)
        targets[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return targets


def _quantized(
    cfg: ModelConfig, targets: Mapping[str, jax.ShapeDtypeStruct], method: str, mesh: Mesh | None, scan: bool
) -> dict[str, jax.ShapeDtypeStruct | QArray]:
    """The targets as rounding leaves them: of weights QArrays, value and scale placed by the weight's axes."""
    axes = {} if mesh is None else to_flat(quantize_axes(param_axes(cfg, scan=scan), method))
    wanted = {}
    for name, target in targets.items():
        form = quantized_form(name, target, method)
        if mesh is not None and isinstance(form, QArray):
            places = (sharding(mesh, axis, part.shape) for axis, part in zip(axes[name], form, strict=True))
            form = type(form)(*(part.update(sharding=place) for part, place in zip(form, places, strict=True)))
        wanted[name] = form if isinstance(form, QArray) else target
    return wanted


def _rounding(
    wanted: Mapping[str, jax.ShapeDtypeStruct | QArray], method: str
) -> Callable[[str, jax.Array], jax.Array | QArray]:
    """A function of name and array: the array rounded where it lies, if it is one of those. The float array can go then."""

    def rounded(name: str, array: jax.Array) -> jax.Array | QArray:
        if not isinstance(wanted[name], QArray):
            return array
        places = jax.tree.map(lambda part: part.sharding, wanted[name])
        compiled = jax.jit(quantize_leaf, static_argnums=(0, 2), out_shardings=places)  # once for the layers' equal weights
        return jax.block_until_ready(compiled(leaf_of(name), array, method))

    return rounded


def _read_quantized(
    checkpoint: Checkpoint, wanted: Mapping[str, jax.ShapeDtypeStruct | QArray], tables: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.Array | QArray]:
    """Weights that are stored as value and scale; tables: shapes on disk of weights with rows of padding in memory."""
    targets, on_disk = {}, {}
    for name, form in wanted.items():
        targets |= named_parts(name, form)
    for name, shape in tables.items():
        form = quantized_form(name, jax.ShapeDtypeStruct(shape, checkpoint.dtype), checkpoint.quantize)
        on_disk |= {part: each.shape for part, each in named_parts(name, form).items()}
    arrays = read_arrays(QuantizedReader(checkpoint).part, targets, on_disk)

    def assembled(name: str, form: jax.ShapeDtypeStruct | QArray) -> jax.Array | QArray:
        parts = [arrays[part] for part in named_parts(name, form)]
        return type(form)(*parts) if isinstance(form, QArray) else parts[0]

    return {name: assembled(name, form) for name, form in wanted.items()}
