"""Where what is read goes."""

import math
import mmap
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64  # bytes; what jax takes on a CPU without a copy begins at a multiple (xla/backends/cpu/alignment.h)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of zeros in pages of its own, which jax takes on a CPU as they are; of np.empty it makes a copy.

    np.empty would ask for huge pages, too, which the kernel may have to make room for first: 0.3 GB/s at worst.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array begins where jax takes it on a CPU without a copy."""
    return array.ctypes.data % ALIGNMENT == 0
