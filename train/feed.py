"""Batches of a dataset, put on the mesh: what this process's devices hold of them."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.data.batch import BATCH_AXES, Batch
from llama_jax.data.dataset import PackedDataset
from llama_jax.data.pipeline import eval_batches, train_batches
from llama_jax.sharding import sharding


def train_feed(
    dataset: PackedDataset, mesh: Mesh, *, batch_size: int, seed: int, start_step: int = 0, prefetch: int
) -> Iterator[Batch]:
    """The endless stream of batches from that of start_step (from 0) on; `close()` ends its thread."""
    rows, place = _own_rows(mesh, batch_size, dataset.length)
    batches = train_batches(dataset, batch_size=batch_size, seed=seed, start_step=start_step, rows=rows, prefetch=prefetch)
    with contextlib.closing(batches):
        for batch in batches:
            yield place(batch)


def held_out_feed(dataset: PackedDataset, mesh: Mesh, *, batch_size: int) -> Iterator[Batch]:
    """All rows once."""
    rows, place = _own_rows(mesh, batch_size, dataset.length)
    return map(place, eval_batches(dataset, batch_size, rows))


def _own_rows(mesh: Mesh, batch_size: int, length: int) -> tuple[slice, Callable[[Batch], Batch]]:
    """Which rows of a batch this process needs, and what puts them where its devices have them."""
    shape = (batch_size, length)
    place = sharding(mesh, BATCH_AXES.tokens, shape)
    parts = [index[0].indices(batch_size)[:2] for index in place.addressable_devices_indices_map(shape).values()]
    first, last = min(begin for begin, _ in parts), max(end for _, end in parts)

    def put(rows: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(batch_size)
            return rows[begin - first : end - first]

        return jax.make_array_from_callback(shape, place, part)

    return slice(first, last), lambda batch: Batch(*map(put, batch))
