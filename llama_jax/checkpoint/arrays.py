"""Arrays as they are written: one per layer, only the rows that a model has, every chunk by one process.

What lies on a mesh is cut into the parts that a process owns. A chunk that two processes would write in turn would keep the
words of one of them (each writes files of its own, merged at the end by name), so an array is gathered first along axes that
the mesh cuts finer than the chunks: fsdp=64 has eight devices for each of the eight chunks along embed.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from llama_jax.checkpoint.store import stored_names
from llama_jax.errors import ExitCode, LlamaError

Index = tuple[slice, ...] | EllipsisType


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is made when it is written.

    Attributes:
        read: returns it, in memory, C order.
        made_of: the name of what several leaves are made of, once: they are written together.
        making_bytes: what is in memory, beside the array, while it is made.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    made_of: str = ""
    making_bytes: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def parts(self, chunks: Sequence[int]) -> list[tuple[Index, "Leaf"]]:
        """What this process writes, and where: the first all of it."""
        return [(..., self)] if jax.process_index() == 0 else []


@dataclasses.dataclass(frozen=True)
class MeshLeaf:
    """An array on the disk that is, or is part of, an array on a mesh.

    Attributes:
        array: in memory: the same, or with rows of padding, or the stacked arrays of all layers [L, ...].
        shape: on disk.
        layer: which of a stack; -1 when the array is none.
    """

    array: jax.Array
    shape: tuple[int, ...]
    layer: int = -1

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def parts(self, chunks: Sequence[int]) -> list[tuple[Index, Leaf]]:
        """What this process writes, and where: whole chunks, of each the first copy.

        Runs a program on the mesh: all processes come here for the same arrays in the same order. Its result, a copy, goes
        when the parts do, and with it what reading them would otherwise leave in host memory beside the model.
        """
        sharding = self.array.sharding
        if isinstance(sharding, NamedSharding):
            sharding = aligned(sharding, self.shape, chunks, stacked=self.layer >= 0)
        if self.array.is_fully_addressable and jax.process_index() > 0:  # every process has one
            return []
        shards = _cut(self.array, max(self.layer, 0), self.layer >= 0, self.shape, sharding).addressable_shards
        return [(shard.index, _leaf(shard.data)) for shard in shards if shard.replica_id == 0]


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """An array on disk whose parts are in this process's memory: the devices may go on."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[Index, np.ndarray], ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def parts(self, chunks: Sequence[int]) -> list[tuple[Index, Leaf]]:
        """The pieces, or all in one where they do not begin and end with chunks."""
        if len(self.pieces) == 1 or all(_has_whole_chunks(index, self.shape, chunks) for index, _ in self.pieces):
            return [(index, _leaf(piece)) for index, piece in self.pieces]
        whole = np.empty(self.shape, self.dtype)
        for index, piece in self.pieces:
            whole[index] = piece
        return [(..., _leaf(whole))]


def on_host(leaves: Mapping[str, MeshLeaf]) -> dict[str, HostLeaf]:
    """Copies arrays into the memory of a process that is alone: what they hold later, and whether they live, is no matter.

    Nothing runs on the devices but the copies, all at once; a stack is one array.
    """
    arrays = {id(leaf.array): leaf.array for leaf in leaves.values()}
    shards = {}
    for key, array in arrays.items():
        shards[key] = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        for shard in shards[key]:
            shard.data.copy_to_host_async()
    copies = {key: [(shard.index, _copied(shard.data)) for shard in found] for key, found in shards.items()}
    return {name: HostLeaf(leaf.shape, leaf.dtype, _pieces(leaf, copies[id(leaf.array)])) for name, leaf in leaves.items()}


def mesh_leaves(arrays: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, MeshLeaf]:
    """What is written of arrays on a mesh, by the names of the disk.

    Args:
        arrays: by dotted names; "layers.q_proj" is a stack of [L, ...], "layers.0.q_proj" is not.
        shapes: on disk, of arrays that have padding in memory, by their names in memory.
    """
    leaves = {}
    for name, array in arrays.items():
        names = stored_names(name, array.shape)
        if names == [name]:
            leaves[name] = MeshLeaf(array, (shapes or {}).get(name, array.shape))
        else:
            leaves |= {stored: MeshLeaf(array, array.shape[1:], i) for i, stored in enumerate(names)}
    return leaves


def aligned(sharding: NamedSharding, shape: Sequence[int], chunks: Sequence[int], *, stacked: bool = False) -> NamedSharding:
    """The sharding with every part a number of whole chunks: fewer parts, and more copies of each, where it has smaller ones.

    Args:
        sharding: of the array in memory.
        shape, chunks: of the array on disk.
        stacked: the array in memory has an axis of layers before those of `shape`, which is not cut.
    """
    spec = tuple(sharding.spec)[1:] if stacked else tuple(sharding.spec)
    parts = dict.fromkeys(sharding.mesh.axis_names, 1)
    for names, size, chunk in zip(spec, shape, chunks, strict=False):  # a spec may leave out the last axes
        left = size // chunk
        for name in () if names is None else (names,) if isinstance(names, str) else names:
            parts[name] = math.gcd(sharding.mesh.shape[name], left)
            left //= parts[name]
    pairs = [(n, sharding.mesh.shape[name] // n) for name, n in parts.items()]
    names = [split for name in parts for split in (name, f"{name} copies")]
    devices = sharding.mesh.devices.reshape([size for pair in pairs for size in pair])
    return NamedSharding(Mesh(devices, names), PartitionSpec(*spec))


@contextlib.contextmanager
def everywhere(what: str = "the checkpoint was not written") -> Iterator[None]:
    """What one process fails in, all do, so that none waits for one that has given up. Also a barrier.

    Args:
        what: has happened when another process fails.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if jax.process_count() > 1:
        code = failure.code if isinstance(failure, LlamaError) else int(failure is not None)
        codes = multihost_utils.process_allgather(np.int32(code))
        if failure is None and codes.any():
            process = int(np.flatnonzero(codes)[0])
            code = ExitCode(codes[process]) if codes[process] > 1 else ExitCode.PEER_DIED
            raise LlamaError(code, f"{what}: process {process} failed and says why")
    if failure is not None:
        raise failure


def is_finite(values: np.ndarray, step: int = 2**18) -> bool:
    """Whether an array in memory has no NaN and no infinity."""
    flat = values.reshape(-1)
    blocks = (flat[i : i + step] for i in range(0, flat.size, step))
    if (
        values.dtype == ml_dtypes.bfloat16
    ):  # whose isfinite is ten times slower than this; the exponent is all ones in NaN and inf
        return all((block.view(np.uint16) & 0x7FFF).max() < 0x7F80 for block in blocks)
    return all(np.isfinite(block).all() for block in blocks)


@functools.partial(jax.jit, static_argnames=("stacked", "shape", "sharding"))
def _cut(array: jax.Array, layer: int, stacked: bool, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """A copy of one layer, or of all, without padding."""
    x = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else array
    return jax.lax.with_sharding_constraint(x[tuple(slice(size) for size in shape)], sharding)


def _leaf(data: jax.Array | np.ndarray) -> Leaf:
    return Leaf(data.shape, np.dtype(data.dtype), lambda: np.asarray(data))


def _copied(data: jax.Array) -> np.ndarray:
    """The array in memory that no device has; a CPU device's is only lent to NumPy."""
    is_lent = data.sharding.memory_kind != "device" or data.device.platform == "cpu"
    return np.asarray(data).copy() if is_lent else np.asarray(data)


def _pieces(leaf: MeshLeaf, copies: Sequence[tuple[tuple[slice, ...], np.ndarray]]) -> tuple[tuple[Index, np.ndarray], ...]:
    """What parts of the array in memory are of the array on disk."""
    pieces = []
    for index, part in copies:
        if leaf.layer >= 0:  # layers are not cut
            index, part = index[1:], part[leaf.layer]
        ranges = [axis.indices(size) for axis, size in zip(index, leaf.shape, strict=True)]
        if all(start < stop for start, stop, _ in ranges):
            inside = tuple(slice(start, stop) for start, stop, _ in ranges)
            pieces.append((inside, part[tuple(slice(stop - start) for start, stop, _ in ranges)]))
    return tuple(pieces)


def _has_whole_chunks(index: tuple[slice, ...], shape: Sequence[int], chunks: Sequence[int]) -> bool:
    return all(
        part.start % chunk == 0 and (part.stop % chunk == 0 or part.stop == size)
        for part, size, chunk in zip(index, shape, chunks, strict=True)
    )
