"""The GPU's kernel of a row's products, interpreted on the CPU, against float32 products with the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ops.kernels.gemv import TILES, Tile, multiply_row, supports
from llama_jax.ops.qarray import QArray, dequantize, quantize

EPS = 1e-5
METHODS = ["", "int8", "int4"]
SPACING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a number, where it is rounded to the nearest


def draw(seed: int, inputs: int, outputs: int, method: str = "", dtype: str = "bfloat16") -> tuple:
    """x [I], a norm's weight [I], and a weight [O, I]."""
    rng = np.random.default_rng(seed)
    x, norm = rng.normal(size=inputs) * 2, rng.uniform(0.5, 1.5, inputs)
    weight = jnp.asarray(rng.normal(size=(outputs, inputs)) / inputs**0.5, dtype)
    return jnp.asarray(x, dtype), jnp.asarray(norm, dtype), quantize(weight, 1, method) if method else weight


def exact(x: jax.Array, weight: jax.Array | QArray, norm: jax.Array | None = None) -> np.ndarray:
    """In float64."""
    x = np.asarray(x, np.float64)
    if norm is not None:
        x = x / np.sqrt(np.mean(x**2) + EPS) * np.asarray(norm, np.float64)
    weight = dequantize(weight, jnp.float32) if isinstance(weight, QArray) else weight.astype(jnp.float32)
    return np.asarray(weight, np.float64) @ x


def check(ours: jax.Array, wanted: np.ndarray, dtype: str = "bfloat16") -> None:
    """Rounded once, but for the float32 sum's error."""
    assert ours.dtype == dtype and ours.shape == wanted.shape
    np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=1.01 * SPACING[dtype], atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([128, 256, 384, 640, 1024, 1408]), st.booleans())
def test_a_row_s_products_are_the_exact_ones_rounded(method, seed, inputs, with_norm):
    """Of inputs that chunks divide, and that they do not."""
    inputs = max(inputs, 256) if method == "int4" else inputs  # which has one scale otherwise
    x, norm, weight = draw(seed, inputs, 48, method)
    norm = norm if with_norm else None
    check(multiply_row(x, weight, norm=norm, eps=EPS, interpret=True), exact(x, weight, norm))


@pytest.mark.parametrize("tile", [Tile(2, 2, 8), Tile(4, 4, 2), Tile(8, 1, 1), Tile(1, 8, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_tiles_do_not_matter(tile, method):
    x, norm, weight = draw(1, 1408, 128, method)
    check(multiply_row(x, weight, norm=norm, eps=EPS, tile=tile, interpret=True), exact(x, weight, norm))


@pytest.mark.parametrize("method", METHODS)
def test_rows_longer_than_most_are_multiplied_with_tiles_of_their_own(method):
    x, _, weight = draw(2, 17 * 1024, 16, method)
    check(multiply_row(x, weight, interpret=True), exact(x, weight))


@pytest.mark.parametrize("tile", [None, Tile(2, 4, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_gated_products_are_multiplied_and_a_residual_is_added(method, tile):
    x, norm, weight = draw(3, 256, 128, method)
    gate, up = np.split(exact(x, weight, norm).astype(jnp.bfloat16).astype(np.float64), 2)
    residual = jnp.asarray(np.random.default_rng(4).normal(size=64), jnp.bfloat16)
    ours = multiply_row(x, weight, norm=norm, eps=EPS, gated=True, residual=residual, tile=tile, interpret=True)
    assert ours.shape == (64,) and ours.dtype == jnp.bfloat16
    wanted = gate / (1 + np.exp(-gate)) * up + np.asarray(residual, np.float64)
    np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=4 * SPACING["bfloat16"], atol=4 * SPACING["bfloat16"])


def test_float16_and_results_in_float32():
    x, norm, weight = draw(5, 384, 48, dtype="float16")
    check(multiply_row(x, weight, norm=norm, eps=EPS, interpret=True), exact(x, weight, norm), "float16")
    ours = multiply_row(x, weight, norm=norm, eps=EPS, dtype=jnp.float32, interpret=True)
    np.testing.assert_allclose(ours, exact(x, weight, norm), rtol=1e-5, atol=1e-6)


def test_what_it_cannot_read_is_told():
    x, _, weight = draw(6, 256, 64)
    assert supports(weight, x.dtype)
    assert not supports(weight, jnp.float32) and not supports(weight, jnp.float16)
    assert not supports(jnp.ones((64, 252), jnp.bfloat16), x.dtype)
    assert supports(jnp.ones((60, 256), jnp.bfloat16), x.dtype)
    assert not supports(jnp.ones((60, 256), jnp.bfloat16), x.dtype, gated=True)  # no tile divides its halves
    assert all(supports(quantize(weight, 1, method), x.dtype) for method in ("int8", "int4"))
    assert not any(supports(quantize(weight, 1, method), x.dtype) for method in ("w8a8", "fp8"))
    assert not supports(quantize(jnp.ones((64, 192), jnp.bfloat16), 1, "int4"), x.dtype)  # groups of 64
    assert not supports(quantize(jnp.ones((64, 128), jnp.bfloat16), 1, "int4"), x.dtype)  # a scale per output


def test_the_tiles_fit_the_models_people_run():
    """7B, 13B, 8B, 70B and 1B: a product's outputs, or half of them where they are gated; and those of long rows."""
    for short, long in TILES.values():
        assert all(size % short.height == 0 for size in (11008, 13824, 14336, 8192, 32000, 32016, 128256, 4096, 5120, 6144))
        assert all(size % long.height == 0 for size in (4096, 5120, 8192, 2048))
