"""What is read lies where jax takes it as it is."""

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.memory import aligned


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.int8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7, 2), (2**20, 3)])
def test_an_array_is_taken_by_jax_without_a_copy(shape, dtype):
    array = aligned(shape, np.dtype(dtype))
    assert array.shape == shape and array.dtype == dtype and array.flags.writeable and array.flags.c_contiguous
    array[...] = 3
    taken = jax.device_put(array, jax.devices()[0])
    assert np.array_equal(np.asarray(taken), np.full(shape, 3, dtype))
    if array.size:
        assert taken.unsafe_buffer_pointer() == array.ctypes.data
