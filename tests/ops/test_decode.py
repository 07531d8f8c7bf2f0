"""The GPU's kernels for single tokens, interpreted on the CPU, against the operations that they are in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ops.attention import attend
from llama_jax.ops.kernels.decode import num_splits, rotate_append_attend, supports
from llama_jax.ops.qarray import dequantize, quantize
from llama_jax.ops.rope import rotate

ROWS, SLOTS = 3, 256
kernel = jax.jit(functools.partial(rotate_append_attend, interpret=True), static_argnames="splits")
positions_of_rows = st.lists(st.integers(0, SLOTS - 1), min_size=ROWS, max_size=ROWS)
GROUPS_AND_SPLITS = [(1, 4), (4, 1), (8, 2)]
any_of_them = st.sampled_from(GROUPS_AND_SPLITS)


def draw(seed: int, group: int, dtype=np.float32, K: int = 2, H: int = 64) -> tuple[np.ndarray, ...]:
    """q [B, N, H], k and v [B, K, H], cos and sin [B, H/2], a cache of keys and values [B, K, S, H]."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(ROWS, heads, H)).astype(dtype) for heads in (K * group, K, K))
    angles = rng.uniform(0, 6, (ROWS, H // 2))
    cache = (rng.normal(size=(ROWS, K, SLOTS, H)).astype(dtype) for _ in range(2))
    return 2 * q, k, v, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), *cache


@jax.jit
def rotated(q, k, cos, sin):
    return tuple(rotate(x[:, None], cos[:, None], sin[:, None])[:, 0] for x in (q, k))


@jax.jit
def plain(q, k_cache, v_cache, positions):
    return attend(q[:, None], k_cache, v_cache, jnp.arange(SLOTS) <= positions[:, None, None])[:, 0]


def put(cache, new, positions) -> np.ndarray:
    """[B, K, S, ...] with [B, K, ...] in its rows' slots."""
    cache = np.array(cache)
    cache[np.arange(ROWS), :, positions] = new
    return cache


def check(inputs, positions, splits: int, *, atol: float, cache_atol: float) -> None:
    """Against attention in float32 to the rounded numbers."""
    q, k, v, cos, sin, *cache = inputs
    out, *written = kernel(*inputs, positions, splits=splits)
    assert out.dtype == q.dtype and [x.dtype for x in written] == [x.dtype for x in cache]
    q, k = rotated(q, k, cos, sin)
    for ours, wanted in zip(written, (put(x, new, positions) for x, new in zip(cache, (k, v), strict=True)), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), wanted.astype(np.float32), rtol=0, atol=cache_atol)
    exact = plain(*(np.asarray(x, np.float32) for x in (q, *written)), np.asarray(positions))
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=0, atol=atol)


@settings(max_examples=12)
@given(st.integers(0, 2**32), any_of_them, positions_of_rows)
def test_the_kernels_are_rope_append_and_attention(seed, shape, positions):
    group, splits = shape
    check(draw(seed, group), np.asarray(positions), splits, atol=1e-5, cache_atol=1e-6)


@pytest.mark.parametrize("group, splits, H", [(1, 4, 128), (3, 1, 64)])
@pytest.mark.parametrize("positions", [(0, SLOTS - 1, 63), (64, 65, 1), (128, 127, 192)])
def test_positions_at_the_ends_of_blocks(positions, group, splits, H):
    check(draw(1, group, H=H), np.asarray(positions), splits, atol=1e-5, cache_atol=1e-6)


@settings(max_examples=6)
@given(st.integers(0, 2**32), any_of_them, positions_of_rows)
def test_bfloat16_is_taken_and_given_back(seed, shape, positions):
    group, splits = shape
    check(draw(seed, group, ml_dtypes.bfloat16), np.asarray(positions), splits, atol=0.03, cache_atol=0.0)


def test_past_the_end_the_last_slot_is_overwritten():
    """As by llama_jax.model.cache.write; a finished row that fills its cache stays there."""
    inputs = draw(2, 4)
    past, last = (kernel(*inputs, np.full(ROWS, at), splits=2) for at in (SLOTS, SLOTS - 1))
    for ours, wanted in zip(past, last, strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("dtype, atol", [(np.float32, 1e-5), (ml_dtypes.bfloat16, 0.03)])
@pytest.mark.parametrize("group, splits", GROUPS_AND_SPLITS[:2])
def test_an_int8_cache_is_rounded_as_weights_are(group, splits, dtype, atol):
    q, k, v, cos, sin, *cache = draw(3, group, dtype)
    v[1, 0] = 0  # its scale is 0
    positions = np.array([0, 100, SLOTS - 1])
    rounded = [quantize(jnp.asarray(x, jnp.float32), 1) for x in cache]
    values, scales = [np.asarray(x.value) for x in rounded], [np.asarray(x.scale[..., 0]) for x in rounded]
    out, *written = kernel(q, k, v, cos, sin, *values, positions, *scales, splits=splits)
    assert out.dtype == dtype and [x.dtype for x in written] == [jnp.int8, jnp.int8, jnp.float32, jnp.float32]
    q, k = rotated(q, k, cos, sin)
    new = [quantize(jnp.asarray(x), 1) for x in (k, v)]
    for ours, old, wanted in zip(written[:2], values, new, strict=True):
        ours, wanted = np.asarray(ours, np.int32), put(old, wanted.value, positions).astype(np.int32)
        differ = ours != wanted  # where a rotated number is half-way between two levels, but for its last bit
        assert np.abs(ours - wanted).max() <= 1 and differ.sum() <= 1
    for ours, old, wanted in zip(written[2:], scales, new, strict=True):
        np.testing.assert_allclose(ours, put(old, wanted.scale[..., 0], positions), rtol=1e-6, atol=0)
    floats = (
        dequantize(rounded[0]._replace(value=x, scale=s[..., None]), jnp.float32)
        for x, s in zip(written[:2], written[2:], strict=True)
    )
    exact = plain(np.asarray(q, np.float32), *floats, positions)
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("value, level", [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (0.49999997, 0), (126.5, 126)])
def test_levels_are_rounded_to_even(value, level):
    q, k, v, *rest = draw(4, 1, H=64)
    v[...] = value
    v[..., 0] = 127
    scales = [np.ones((ROWS, 2, SLOTS), np.float32)] * 2
    slots = [np.zeros((ROWS, 2, SLOTS, 64), np.int8)] * 2
    written = kernel(q, k, v, *rest[:2], *slots, np.zeros(ROWS, np.int32), *scales, splits=1)[2]
    assert (written[:, :, 0, 0] == 127).all() and (written[:, :, 0, 1:] == level).all()


@pytest.mark.parametrize(
    "batch, kv_heads, slots, splits",
    [(1, 32, 2048, 8), (8, 32, 2048, 1), (1, 8, 2048, 32), (1, 1, 8192, 32), (1, 8, 128, 2), (2, 8, 2048, 16)],
)
def test_there_are_programs_for_the_whole_gpu_but_none_without_a_block(batch, kv_heads, slots, splits):
    assert num_splits(batch, kv_heads, slots) == splits


@pytest.mark.parametrize("slots, head_dim, does", [(64, 64, True), (2048, 128, True), (100, 128, False), (128, 96, False)])
def test_the_kernels_take_whole_blocks_only(slots, head_dim, does):
    assert supports(slots, head_dim) == does
