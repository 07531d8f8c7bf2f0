"""Batches by the number of the step, made ahead of time in a thread of Grain's.

The stream of a run is a function of (dataset, seed, step) and of nothing else: a run resumes anywhere by asking for another
first step, and processes share a batch by asking for parts of its rows.
"""

from collections.abc import Iterator

import numpy as np

from llama_jax.data.batch import Batch
from llama_jax.data.dataset import PackedDataset

LAST_STEP = 2**40


def batch_rows(dataset: PackedDataset, step: int, batch_size: int, seed: int) -> np.ndarray:
    """[B] int64, the numbers of the rows of a step (from 0): places step*B to (step+1)*B of the stream."""
    return dataset.stream_rows(np.arange(step * batch_size, (step + 1) * batch_size), seed)


def train_batches(
    dataset: PackedDataset, *, batch_size: int, seed: int, start_step: int = 0, rows: slice = slice(None), prefetch: int = 4
) -> Iterator[Batch]:
    """The batches of start_step and of all steps after it, as NumPy arrays.

    Args:
        batch_size: B, of all processes together.
        rows: which rows of each batch this process needs.
        prefetch: batches that are made ahead; 0 to make each when it is asked for.

    Yields:
        [rows, T]. `close()` of the generator ends its thread.
    """
    import grain

    def batch_of(step: int) -> Batch:
        return dataset.rows(batch_rows(dataset, step, batch_size, seed)[rows])

    steps = grain.MapDataset.range(start_step, LAST_STEP).map(batch_of)
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)))
    try:
        yield from batches
    finally:
        batches.close()


def eval_batches(dataset: PackedDataset, batch_size: int, rows: slice = slice(None)) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with rows of padding, of weight 0."""
    for first in range(0, len(dataset), batch_size):
        numbers = np.arange(first, first + batch_size)
        yield dataset.rows(np.where(numbers < len(dataset), numbers, -1)[rows])
