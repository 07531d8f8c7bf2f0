"""Arrays as they are written: one per layer, only the rows that a model has, every chunk by one process.

What lies on a mesh is cut into the parts that a process owns. A chunk that two processes would write in turn would keep the
words of one of them (each writes files of its own, merged at the end by name), so an array is gathered first along axes that
the mesh cuts finer than the chunks: fsdp=64 has eight devices for each of the eight chunks along embed.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from llama_jax.checkpoint.store import chunk_shape, stored_names
from llama_jax.errors import ExitCode, LlamaError

Index = tuple[slice, ...] | EllipsisType
COPIED_TOGETHER_BYTES = 256 * 2**20  # copies on the devices that are on their way to the host


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is made when it is written.

    Attributes:
        read: returns it, in memory, C order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

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
        """What this process writes, and where."""
        return [(index, _leaf(data)) for index, data in self.cut(chunks)]

    def cut(self, chunks: Sequence[int]) -> list[tuple[Index, jax.Array]]:
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
        return [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """What this process writes of an array, in its own memory: the devices may go on."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[Index, Leaf], ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def parts(self, chunks: Sequence[int]) -> list[tuple[Index, Leaf]]:
        return list(self.pieces)


def on_host(leaves: Mapping[str, MeshLeaf], axes: Mapping[str, Sequence[str]]) -> dict[str, HostLeaf]:
    """Copies what this process writes into its memory; what the arrays hold afterwards, or whether they live, is no matter.

    Args:
        leaves: by names of the disk, the same in all processes.
        axes: logical axes of each array, by the same names.
    """
    cut: collections.deque[tuple[str, list[tuple[Index, jax.Array]]]] = collections.deque()
    copied, on_the_way = {}, 0

    def take() -> None:
        nonlocal on_the_way
        name, parts = cut.popleft()
        on_the_way -= sum(data.nbytes for _, data in parts)
        pieces = tuple((index, _leaf(np.asarray(data))) for index, data in parts)  # of a CPU device: the cut's own memory
        copied[name] = HostLeaf(leaves[name].shape, leaves[name].dtype, pieces)

    for name, leaf in leaves.items():
        parts = leaf.cut(chunk_shape(leaf.shape, axes[name], leaf.dtype.itemsize))
        for _, data in parts:
            data.copy_to_host_async()
        cut.append((name, parts))
        on_the_way += sum(data.nbytes for _, data in parts)
        while on_the_way > COPIED_TOGETHER_BYTES:
            take()
    while cut:
        take()
    return copied


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


@functools.partial(jax.jit, static_argnames=("stacked", "shape", "sharding"))
def _cut(array: jax.Array, layer: int, stacked: bool, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """A copy of one layer, or of all, without padding."""
    x = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else array
    return jax.lax.with_sharding_constraint(x[tuple(slice(size) for size in shape)], sharding)


def _leaf(data: jax.Array | np.ndarray) -> Leaf:
    return Leaf(data.shape, np.dtype(data.dtype), lambda: np.asarray(data))
