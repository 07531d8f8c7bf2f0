"""The TPU's kernel for many tokens that follow others, interpreted on the CPU, against attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ops.attention import attend_cached, cache_arrays
from llama_jax.ops.kernels import ragged_chunk
from llama_jax.ops.kernels.ragged_chunk import attend_ragged_chunk, blocks, supports
from llama_jax.ops.qarray import quantize_vectors

H, S = 128, 1024


def check(T: int, group: int, starts, *, dtype=np.float32, in_int8=False, K: int = 2, atol: float = 1e-5) -> None:
    """Slots after a row's last token hold another sequence's."""
    rng, starts = np.random.default_rng(T + group), np.asarray(starts, np.int32)
    B = len(starts)
    shapes = (B, T, K * group, H), (B, K, S, H), (B, K, S, H)
    q, k, v = ((1.2 * rng.normal(size=shape)).astype(dtype) for shape in shapes)
    positions = starts[:, None] + np.arange(T)
    after = (np.arange(S) > positions[:, -1:])[:, None, :, None]
    k, v = (jnp.asarray(np.where(after, np.asarray(50, dtype), x)) for x in (k, v))
    cache = [quantize_vectors(x) for x in (k, v)] if in_int8 else [k, v]
    arrays = cache_arrays(*cache)
    ours = jax.jit(functools.partial(attend_ragged_chunk, interpret=True))(q, *arrays[:2], starts, *arrays[2:])
    exact = [x.astype(jnp.float32) for x in cache] if not in_int8 else cache
    wanted = attend_cached(jnp.asarray(q, jnp.float32), *exact, jnp.asarray(positions), kernels=False)
    assert ours.dtype == dtype and ours.shape == q.shape
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize(("T", "group"), [(128, 1), (640, 2), (256, 8)])
def test_tokens_see_what_is_before_them(T, group, in_int8):
    """Rows that start at, before and after the edge of a block."""
    check(T, group, [0, 127, 384, S - T], in_int8=in_int8)


@given(st.lists(st.integers(0, S - 128), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
def test_tokens_may_start_anywhere(starts):
    check(128, 2, starts, K=1)


def test_blocks_of_every_size(monkeypatch):
    for largest in (128, 256):
        monkeypatch.setattr(ragged_chunk, "LARGEST_BLOCK", largest)
        check(256, 2, [0, 200])


def test_bfloat16_is_taken_and_given_back():
    check(128, 4, [3, 300], dtype=ml_dtypes.bfloat16, atol=0.05)
    check(128, 4, [3, 300], dtype=ml_dtypes.bfloat16, in_int8=True, atol=0.05)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((4096, 8192, 1), (512, 512)),
        ((4096, 8192, 4), (256, 512)),
        ((2048, 16384, 8), (128, 512)),
        ((512, 1024, 16), (128, 256)),
        ((384, 640, 1), (128, 128)),
    ],
)
def test_what_is_on_the_chip_at_once_is_bounded(shape, wanted):
    assert blocks(*shape) == wanted
    assert shape[2] * wanted[0] * wanted[1] <= ragged_chunk.MOST_SCORES
    assert wanted[0] == 128 or shape[2] * wanted[0] <= ragged_chunk.MOST_ROWS


def test_it_takes_whole_blocks_only():
    assert supports(128, 256, 128, 1) and supports(4096, 16384, 256, 8) and supports(4096, 16384, 128, 16)
    assert not supports(64, 256, 128, 1) and not supports(128, 200, 128, 1) and not supports(128, 256, 64, 1)
    assert not supports(128, 256, 128, 32)  # there is no room on the chip
