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


def draw(seed: int, inputs: int, outputs: list[int], method: str = "", dtype: str = "bfloat16") -> tuple:
    """x [I], a norm's weight [I], and weights [O, I]."""
    rng = np.random.default_rng(seed)
    x, norm = rng.normal(size=inputs) * 2, rng.uniform(0.5, 1.5, inputs)
    weights = [jnp.asarray(rng.normal(size=(rows, inputs)) / inputs**0.5, dtype) for rows in outputs]
    return jnp.asarray(x, dtype), jnp.asarray(norm, dtype), [quantize(w, 1, method) if method else w for w in weights]


def exact(x: jax.Array, weights: list, norm: jax.Array | None = None) -> list[np.ndarray]:
    """In float64."""
    x = np.asarray(x, np.float64)
    if norm is not None:
        x = x / np.sqrt(np.mean(x**2) + EPS) * np.asarray(norm, np.float64)
    floats = (dequantize(w, jnp.float32) if isinstance(w, QArray) else w.astype(jnp.float32) for w in weights)
    return [np.asarray(w, np.float64) @ x for w in floats]


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
    x, norm, weights = draw(seed, inputs, [32, 16], method)
    norm = norm if with_norm else None
    ours = multiply_row(x, weights, norm=norm, eps=EPS, interpret=True)
    check(ours, np.concatenate(exact(x, weights, norm))[None])


@pytest.mark.parametrize("tile", [Tile(2, 2, 8), Tile(4, 4, 2), Tile(8, 1, 1), Tile(1, 8, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_tiles_do_not_matter(tile, method):
    x, norm, weights = draw(1, 1408, [64, 32, 32], method)
    ours = multiply_row(x, weights, groups=2, norm=norm, eps=EPS, tile=tile, interpret=True)
    parts = [y.reshape(2, -1) for y in exact(x, weights, norm)]
    check(ours, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("method", METHODS)
def test_rows_longer_than_most_are_multiplied_with_tiles_of_their_own(method):
    x, _, weights = draw(2, 17 * 1024, [16], method)
    check(multiply_row(x, weights, interpret=True), exact(x, weights)[0][None])


@pytest.mark.parametrize("method", METHODS)
def test_gated_products_are_multiplied_and_a_residual_is_added(method):
    x, _, weights = draw(3, 256, [64, 64], method)
    gate, up = (y.astype(jnp.bfloat16).astype(np.float64) for y in exact(x, weights))
    residual = jnp.asarray(np.random.default_rng(4).normal(size=64), jnp.bfloat16)
    ours = np.asarray(multiply_row(x, weights, gated=True, residual=residual, interpret=True)[0], np.float64)
    wanted = gate / (1 + np.exp(-gate)) * up + np.asarray(residual, np.float64)
    np.testing.assert_allclose(ours, wanted, rtol=4 * SPACING["bfloat16"], atol=4 * SPACING["bfloat16"])


def test_float16_and_results_in_float32():
    x, norm, weights = draw(5, 384, [48], dtype="float16")
    check(multiply_row(x, weights, norm=norm, eps=EPS, interpret=True), exact(x, weights, norm)[0][None], "float16")
    ours = multiply_row(x, weights, norm=norm, eps=EPS, dtype=jnp.float32, interpret=True)
    np.testing.assert_allclose(ours[0], exact(x, weights, norm)[0], rtol=1e-5, atol=1e-6)


def test_what_it_cannot_read_is_told():
    x, _, weights = draw(6, 256, [64, 64])
    assert supports(weights, x.dtype) and supports(weights, x.dtype, groups=4)
    assert not supports(weights, x.dtype, groups=64)  # an output each
    assert not supports(weights, jnp.float32) and not supports(weights, jnp.float16)
    assert not supports([jnp.ones((64, 252), jnp.bfloat16)], x.dtype)
    assert not supports([jnp.ones((63, 256), jnp.bfloat16)], x.dtype)
    eight, four = (quantize(weights[0], 1, method) for method in ("int8", "int4"))
    assert supports([eight], x.dtype) and supports([four], x.dtype)
    assert not supports([weights[0], eight], x.dtype)
    assert not any(supports([quantize(weights[0], 1, method)], x.dtype) for method in ("w8a8", "fp8"))
    assert not supports([quantize(jnp.ones((64, 192), jnp.bfloat16), 1, "int4")], x.dtype)  # groups of 64
    assert not supports([quantize(jnp.ones((64, 128), jnp.bfloat16), 1, "int4")], x.dtype)  # a scale per output


def test_the_tiles_fit_the_models_people_run():
    """7B, 13B, 8B, 70B and 1B: outputs of a group, of a matrix."""
    for short, long in TILES.values():
        assert all(size % short.height == 0 for size in (128, 64, 11008, 13824, 14336, 8192, 32000, 32016, 128256, 4096, 5120))
        assert all(size % long.height == 0 for size in (4096, 5120, 8192, 2048))
