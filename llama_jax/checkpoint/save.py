"""Writing a checkpoint, one array at a time.

`ocp.StandardCheckpointer.save` of a whole tree copies it in memory (measured: +8.3 GB for 3.2 GB). Here Orbax is given leaves
that know shape and dtype and are read when their turn comes, and the chunk shape that partitioned loading needs.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llama_jax.checkpoint.store import MANIFEST, Checkpoint, chunk_shape, to_tree
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import param_axes

UNFINISHED = "unfinished"  # marks a directory whose writing has begun; gone when it is complete
TOGETHER_BYTES = 128 * 2**20  # leaves that are written at the same time have no more; a larger one is alone
REPLACED = ".replaced"  # suffix of an old checkpoint while its successor is written


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
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves in our chunks: one at a time, or several that together are small.

    Attributes:
        failure: the first error; the leaves after it are skipped. Orbax is never left with an error of ours in one of its
            tasks: the others would go on writing while the directory is being removed.
    """

    def __init__(self, axes: Mapping[str, tuple[str, ...]], written: Callable[[str, int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.failure: BaseException | None = None
        self._axes = axes
        self._written = written
        self._in_memory = 0
        self._freed = asyncio.Condition()
        self._context: Any = None

    async def _open_and_write(self, value: Leaf, tspec: dict[str, Any], ts_context: Any) -> None:
        async with self._freed:
            await self._freed.wait_for(lambda: not self._in_memory or self._in_memory + value.nbytes <= TOGETHER_BYTES)
            self._in_memory += value.nbytes
        try:
            if self.failure is None:
                await self._write_leaf(value, tspec, ts_context)
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            async with self._freed:
                self._in_memory -= value.nbytes
                self._freed.notify_all()

    async def _write_leaf(self, value: Leaf, tspec: dict[str, Any], ts_context: Any) -> None:
        import tensorstore as ts

        name = tspec["kvstore"]["path"].strip("/")
        chunks = chunk_shape(value.shape, self._axes[name], value.dtype.itemsize)
        tspec["metadata"] = {
            "shape": list(value.shape),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        if self._context is None:  # the disk is waited for once, at the end, and not after every file
            self._context = ts.Context({"file_io_sync": False}, parent=ts_context)
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=self._context)
        array = await asyncio.to_thread(value.read)
        await store.write(array, can_reference_source_data_indefinitely=True)
        self._written(name, value.nbytes)


def save_checkpoint(
    checkpoint: Checkpoint,
    leaves: Mapping[str, Leaf],
    *,
    tokenizer_files: Sequence[Path] = (),
    overwrite: bool = False,
    written: Callable[[str, int], None] = lambda name, size: None,
    finish: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint,
) -> Checkpoint:
    """Writes params, tokenizer files and, last, checkpoint.json.

    Args:
        checkpoint: what to write; its `path` is the output directory.
        leaves: dotted name -> array, for every array of the config.
        tokenizer_files: copied beside the weights under their own names.
        overwrite: replace a complete checkpoint at the path; until the new one is complete, the old one is kept beside it.
        written: called with name and bytes after each array.
        finish: called when all arrays are written; returns the checkpoint to describe (with hashes, say).

    Raises:
        LlamaError: the output exists, or the disk is full. Whatever was begun is removed, on any error.
    """
    folder = checkpoint.path if "://" in str(checkpoint.path) else checkpoint.path.absolute()
    with _output(folder, sum(leaf.nbytes for leaf in leaves.values()), overwrite):
        _write_arrays(folder / "params", leaves, LeafHandler(_flat_axes(checkpoint), written))
        for file in tokenizer_files:
            (folder / file.name).write_bytes(file.read_bytes())
        checkpoint = finish(checkpoint)
        _wait_for_disk(folder)
        (folder / MANIFEST).write_text(json.dumps(checkpoint.manifest(), indent=1) + "\n")
        (folder / UNFINISHED).unlink()
    return checkpoint


def _write_arrays(folder: epath.Path, leaves: Mapping[str, Leaf], handler: LeafHandler) -> None:
    """Returns, or raises, when nothing is being written any more; Ctrl-C ends it after the leaf under way."""
    registry = ocp.type_handlers.create_type_handler_registry((Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler()))
    tree = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, type_handler_registry=registry)
    args = ocp.args.PyTreeSave(to_tree(leaves), ocdbt_target_data_file_size=64 * 2**20)
    with ocp.Checkpointer(tree) as checkpointer, concurrent.futures.ThreadPoolExecutor(1) as pool:
        saving = pool.submit(checkpointer.save, folder, args=args)
        try:
            saving.result()
        except BaseException as error:
            handler.failure = handler.failure or error
    if handler.failure is not None:
        raise handler.failure


def _wait_for_disk(folder: epath.Path) -> None:
    """Returns when all files are on the disk: a checkpoint.json must not outlive its arrays in a power cut."""
    if "://" in str(folder):
        return
    for path in (*Path(folder).rglob("*"), Path(folder)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flat_axes(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    tree = param_axes(checkpoint.config)
    flat = {f"layers.{i}.{leaf}": axes for i, layer in enumerate(tree.pop("layers")) for leaf, axes in layer.items()}
    return tree | flat


@contextlib.contextmanager
def _output(folder: epath.Path, nbytes: int, overwrite: bool) -> Iterator[None]:
    """An empty directory to write into, removed again if writing fails; an old checkpoint comes back then."""
    old = folder.parent / (folder.name + REPLACED)
    if (old / MANIFEST).exists() and not (folder / MANIFEST).exists():  # a killed run was overwriting: the old one is whole
        _remove(folder)
        old.rename(folder)
    if (folder / MANIFEST).exists():
        if not overwrite:
            raise LlamaError(
                ExitCode.OUTPUT_EXISTS,
                f"{folder} holds a checkpoint already: give another --output, or --overwrite to replace it",
            )
        _remove(old)
        folder.rename(old)
    elif (folder / UNFINISHED).exists():
        _remove(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LlamaError(
            ExitCode.OUTPUT_EXISTS, f"{folder} exists and is no checkpoint of ours: give the name of a new or empty directory"
        )
    try:
        _check_space(folder, nbytes)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).write_text("")
        yield
    except BaseException as error:
        _remove(folder)
        if old.exists():
            old.rename(folder)
        if _is_disk_full(error):
            raise LlamaError(
                ExitCode.DISK_FULL, f"the disk of {folder} is full: the checkpoint needs {nbytes:,} bytes; nothing was kept"
            ) from None
        raise
    _remove(old)


def _check_space(folder: epath.Path, nbytes: int) -> None:
    if "://" in str(folder):
        return
    existing = next(parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise LlamaError(
            ExitCode.DISK_FULL,
            f"{folder} needs {nbytes:,} bytes and its disk has {free:,} free: make room or choose another disk",
        )


def _is_disk_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or any(
        words in str(error) for words in ("No space left on device", "Disk quota exceeded")
    )


def _remove(folder: epath.Path) -> None:
    """checkpoint.json goes first and the mark last: what a kill leaves is neither complete nor somebody else's."""
    if not folder.is_dir():
        return
    (folder / UNFINISHED).write_text("")
    (folder / MANIFEST).unlink(missing_ok=True)
    for child in folder.iterdir():
        if child.is_dir():
            child.rmtree()
        elif child.name != UNFINISHED:
            child.unlink()
    folder.rmtree()
