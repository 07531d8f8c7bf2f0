"""The GPU's attention kernels, interpreted on the CPU, against attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ops.attention import attend_cached, attend_causal, cache_arrays
from llama_jax.ops.kernels.flash import (
    TILES,
    Tile,
    Tiles,
    attend_flash,
    attend_flash_cached,
    segment_spans,
    supports,
    supports_cached,
)
from llama_jax.ops.qarray import quantize_vectors
from tests.make_mesh import equations
from tests.ops.test_splash import draw

SHAPES = {  # T, N, K, H
    "one block": (128, 4, 2, 64),
    "wide heads, one for all": (256, 2, 1, 128),
    "two blocks": (256, 3, 3, 64),
}
TALL = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))
WIDE = Tiles(Tile(64, 128, 4, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))


def out_and_gradients(f, q, k, v, segments, dy):
    def both(q, k, v):
        out, pull = jax.vjp(lambda *a: f(*a, segments), q, k, v)
        return out, *pull(dy.astype(out.dtype))

    return [np.asarray(a, np.float32) for a in jax.jit(both)(q, k, v)]


@pytest.mark.parametrize(
    "shape, packed, tiles",
    [
        ("one block", False, TILES),
        ("wide heads, one for all", True, TALL),
        pytest.param("two blocks", True, WIDE, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_are_attention_and_its_gradients(shape, packed, tiles):
    q, k, v, segments = draw(*SHAPES[shape])
    segments = segments if packed else None
    dy = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    kernel = functools.partial(attend_flash, tiles=tiles, interpret=True)
    for ours, wanted in zip(*(out_and_gradients(f, q, k, v, segments, dy) for f in (kernel, attend_causal)), strict=True):
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(ml_dtypes.bfloat16, 1e-2), (np.float16, 2e-3)])
def test_the_kernels_take_half_precision_and_give_it_back(dtype, tolerance):
    """Within a few of its roundings, relative to the largest."""
    q, k, v, segments = draw(*SHAPES["one block"], dtype=dtype)
    dy = np.random.default_rng(1).normal(size=q.shape).astype(dtype)
    kernel = functools.partial(attend_flash, interpret=True)
    assert jax.eval_shape(kernel, q, k, v, segments).dtype == dtype
    exact = out_and_gradients(attend_causal, *(a.astype(np.float32) for a in (q, k, v)), segments, dy.astype(np.float32))
    for ours, wanted in zip(out_and_gradients(kernel, q, k, v, segments, dy), exact, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_what_the_kernels_keep_for_the_backward_pass_has_a_name():
    """By which a rematerialised layer may save it: the forward kernel then does not run again."""
    q, k, v, _ = draw(*SHAPES["one block"])

    def kernels(policy) -> int:
        layer = jax.checkpoint(lambda q: jnp.tanh(attend_flash(jnp.sin(q), k, v, None, interpret=True)), policy=policy)
        gradient = jax.grad(lambda q: jnp.sum(layer(q)))
        return sum(equation.primitive.name == "pallas_call" for equation in equations(gradient, q))

    forward = kernels(jax.checkpoint_policies.nothing_saveable)
    assert forward - kernels(jax.checkpoint_policies.save_only_these_names("attention")) == 1


segments_of_blocks = st.lists(st.integers(0, 4), min_size=24, max_size=24)


@given(segments_of_blocks)
def test_no_pair_of_one_segment_is_skipped_whatever_the_order_of_its_numbers(ids):
    tile = Tile(4, 2, 4, 1)
    spans = segment_spans(jnp.asarray([ids]), Tiles(tile, tile, tile))
    first, end = np.asarray(spans.first_forward)[0], np.asarray(spans.end_dkv)[0]
    np.testing.assert_array_equal(spans.first_dq, spans.first_forward)
    for query, key in np.argwhere(np.equal.outer(ids, ids)):
        assert first[query // 4] <= key // 2 and query // 4 < end[key // 2]
    assert all(first <= np.arange(6) * 2) and all(end > np.arange(12) // 2)  # a block meets its own tokens


@given(segments_of_blocks)
def test_of_segments_in_order_only_blocks_of_the_same_are_visited(ids):
    ids, tile = np.sort(ids), Tile(4, 2, 4, 1)
    spans = segment_spans(jnp.asarray([ids]), Tiles(tile, tile, tile))
    shared = np.equal.outer(ids, ids).reshape(6, 4, 12, 2).any(axis=(1, 3))
    np.testing.assert_array_equal(spans.first_forward[0], shared.argmax(axis=1))
    np.testing.assert_array_equal(spans.end_dkv[0], 6 - shared[::-1].argmax(axis=0))


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("tile", [TILES.forward, Tile(128, 64, 8, 3), Tile(64, 128, 4, 2)])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(128, 4, 2, 64), (256, 2, 1, 128)])
def test_tokens_see_what_is_before_them_in_a_cache(T, N, K, H, tile, in_int8):
    """Rows that start at, before and after the edge of a tile; the slots after a row's last token are not read."""
    S, starts = 512, np.array([0, 63, 128, 512 - T], np.int32)
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((4, T, N, H), (4, K, S, H), (4, K, S, H)))
    positions = starts[:, None] + np.arange(T)
    after = (np.arange(S) > positions[:, -1:])[:, None, :, None]
    cache = [np.where(after, 1e4, x) for x in (k, v)]
    cache = [quantize_vectors(jnp.asarray(x)) for x in cache] if in_int8 else cache
    run = jax.jit(functools.partial(attend_flash_cached, tile=tile, interpret=True))
    arrays = cache_arrays(*cache)
    ours = run(q, *arrays[:2], starts, *arrays[2:])
    wanted = attend_cached(jnp.asarray(q), *cache, jnp.asarray(positions), kernels=False)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


@given(st.integers(0, 3), st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_tokens_may_start_anywhere_in_a_cache(count, seed):
    rng = np.random.default_rng(seed)
    S, T = 256, 64
    starts = rng.integers(0, S - T + 1, count + 1).astype(np.int32)
    q, k, v = (rng.normal(size=(count + 1, *shape)).astype(np.float32) for shape in ((T, 2, 64), (1, S, 64), (1, S, 64)))
    ours = attend_flash_cached(q, k, v, starts, interpret=True)
    wanted = attend_cached(*map(jnp.asarray, (q, k, v, starts[:, None] + np.arange(T))), kernels=False)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


def test_tokens_of_a_cache_in_half_precision():
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(1, *shape, 64)), jnp.bfloat16) for shape in ((64, 4), (2, 128), (2, 128)))
    ours = attend_flash_cached(q, k, v, np.array([40], np.int32), interpret=True)
    wanted = attend_cached(*(x.astype(jnp.float32) for x in (q, k, v)), 40 + jnp.arange(64)[None], kernels=False)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted, rtol=0, atol=1e-2 * np.abs(wanted).max())


def test_the_kernel_of_a_cache_takes_whole_tiles_only():
    assert supports_cached(64, 256, 64) and supports_cached(4096, 16384, 128)
    assert not supports_cached(32, 256, 64) and not supports_cached(64, 200, 64) and not supports_cached(64, 256, 80)


@pytest.mark.parametrize(
    "length, head_dim, does",
    [(128, 64, True), (4096, 128, True), (384, 128, True), (64, 128, False), (200, 128, False), (128, 192, False)],
)
def test_the_kernels_take_whole_tiles_only(length, head_dim, does):
    assert supports(length, head_dim) == does
