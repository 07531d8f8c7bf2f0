"""Numbers in words, back as they were."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops.kernels.words import integer_flips, numbers, parts, per_word, to_words

LOWEST = {jnp.int8: -128, jnp.int4: -8}


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_every_integer_is_found_at_every_place(dtype):
    """As many of each, a word further each time."""
    levels = jnp.arange(LOWEST[dtype], -LOWEST[dtype])
    x = jnp.stack([jnp.roll(levels, i) for i in range(per_word(dtype))]).astype(dtype)
    found = jnp.stack(numbers(to_words(x), dtype, list(integer_flips(dtype))), axis=-1)
    np.testing.assert_array_equal(found.reshape(x.shape), x.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@given(st.integers(0, 2**32))
def test_floats_are_found_to_the_last_bit(dtype, seed):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 16)) * 10.0 ** (seed % 5 - 2), dtype)
    found = jnp.stack(numbers(to_words(x), dtype), axis=-1)
    np.testing.assert_array_equal(found.reshape(x.shape), x.astype(jnp.float32))


@pytest.mark.parametrize("words", [1, 2, 4])
def test_a_row_s_numbers_are_those_that_a_word_of_weights_is_multiplied_with(words):
    x = jnp.arange(32, dtype=jnp.bfloat16)
    found = parts(to_words(x).reshape(1, -1, words), 2, jnp.bfloat16)
    assert len(found) == 2 * words
    np.testing.assert_array_equal(jnp.stack(found, axis=-1).reshape(-1), x.astype(jnp.float32))
