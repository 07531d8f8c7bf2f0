"""Weights in fewer bits: how far rounding moves them, and that products are those of the rounded weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops.linear import project
from llama_jax.ops.qarray import METHODS, QArray, W8A8Array, dequantize, quantize, quantize_vectors
from llama_jax.sharding import sharding
from tests.make_mesh import mesh_of

FLOATS = [method for method in METHODS if method != "w8a8"]  # whose products are those of the dequantised weight
HALF_STEP = {
    "int8": 0.5 / 127,
    "w8a8": 0.5 / 127,
    "int4": 0.51 / 7,
    "fp8": 1 / 16,
}  # of the largest; int4's scale is rounded, too


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) / 8).astype(np.float32)


@given(
    st.integers(0, 2**32), st.sampled_from(list(METHODS)), st.sampled_from([((6, 4, 256), 1), ((5, 6, 64), 2), ((3, 48), 1)])
)
def test_no_weight_moves_by_more_than_half_a_step(seed, method, shape_and_inputs):
    (shape, num_inputs), weight = shape_and_inputs, draw(seed, shape_and_inputs[0])
    q = quantize(jnp.asarray(weight), num_inputs, method)
    assert q.value.shape == shape and q.value.dtype == METHODS[method][0]
    found = np.asarray(dequantize(q, jnp.float32))
    groups = q.scale.shape[-1]
    flat = weight.reshape(*shape[: len(shape) - num_inputs], groups, -1)
    largest = np.abs(flat).max(axis=-1, keepdims=True)
    error = np.abs(found.reshape(flat.shape) - flat)
    assert np.all(error <= HALF_STEP[method] * largest * (1 + 1e-5))


@given(st.integers(0, 2**32), st.sampled_from([(4, 10), (2, 3, 5, 8)]), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_no_vector_moves_by_more_than_half_a_step_of_its_own(seed, shape, dtype):
    """Vectors of very different lengths, one of them 0: none changes how another is rounded."""
    x = draw(seed, shape) * 10.0 ** np.random.default_rng(seed).integers(-6, 7, (*shape[:-1], 1))
    x.reshape(-1, shape[-1])[0] = 0
    x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
    rounded = quantize_vectors(jnp.asarray(x, dtype))
    assert rounded.value.dtype == jnp.int8 and rounded.scale.dtype == jnp.float32
    assert rounded.shape == shape and rounded.scale.shape == shape[:-1]
    value, scale = np.asarray(rounded.value, np.float32), np.asarray(rounded.scale)[..., None]
    assert np.all(np.abs(value * scale - x) <= 0.5 * scale * (1 + 1e-5))
    np.testing.assert_array_equal(np.abs(value).max(axis=-1), np.where(scale[..., 0] > 0, 127, 0))


@pytest.mark.parametrize(
    ("inputs", "groups"), [(256, 2), (128, 1), (192, 3), (48, 3), (5632, 44)], ids=["128 each", "one", "64", "16", "of 1.1B"]
)
def test_int4_has_a_scale_for_128_inputs_or_what_divides_them(inputs, groups):
    q = quantize(jnp.ones((4, inputs)), 1, "int4")
    assert q.scale.shape == (4, groups) and q.scale.dtype == jnp.bfloat16
    assert q.has_groups == (groups > 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_zeros_stays_zeros(method):
    q = quantize(jnp.zeros((3, 256)).at[1].set(1), 1, method)
    np.testing.assert_array_equal(np.asarray(dequantize(q, jnp.float32))[[0, 2]], 0)
    np.testing.assert_allclose(np.asarray(dequantize(q, jnp.float32))[1], 1, atol=5e-3)


@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (8, 1), (1, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("method", FLOATS)
@pytest.mark.parametrize(
    ("equation", "shape", "inputs"), [("BTD,NHD->BTNH", (6, 10, 256), 1), ("BTNH,DNH->BTD", (48, 4, 64), 2)]
)
def test_a_product_is_that_of_the_rounded_weight(equation, shape, inputs, method, rows):
    weight, x = draw(1, shape), 8 * draw(2, (*rows, *shape[len(shape) - inputs :]))
    q = quantize(jnp.asarray(weight), inputs, method)
    expected = np.einsum(equation, x.astype(np.float64), np.asarray(dequantize(q, jnp.float32), np.float64))
    np.testing.assert_allclose(jax.jit(project, static_argnums=0)(equation, x, q), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [(1, 1), (4, 1), (3, 7)], ids=str)
def test_w8a8_rounds_each_row_of_activations_to_its_own_scale(rows):
    weight, x = draw(3, (48, 256)), 8 * draw(4, (*rows, 256)) * np.logspace(-3, 3, rows[0] * rows[1]).reshape(*rows, 1)
    q = quantize(jnp.asarray(weight), 1, "w8a8")
    assert isinstance(q, W8A8Array)
    scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32) / 127
    whole = np.rint(x.astype(np.float32) / scale).astype(np.int64) @ np.asarray(q.value, np.int64).T
    expected = whole * scale * np.asarray(q.scale)[:, 0]
    found = np.asarray(jax.jit(project, static_argnums=0)("BTD,FD->BTF", jnp.asarray(x, jnp.float32), q))
    # A quotient may be rounded to the other side of a half: one step of one input.
    atol = scale * np.abs(np.asarray(dequantize(q, jnp.float32))).max() * 1.01 + 1e-6
    assert np.all(np.abs(found - expected) <= atol)
    assert np.mean(np.isclose(found, expected, rtol=1e-5, atol=1e-6)) > 0.9


def test_a_rounded_weight_is_a_leaf_pair_of_a_tree():
    for kind in (QArray, W8A8Array):
        mapped = jax.tree.map(lambda x: x, kind(jnp.zeros(2, jnp.int8), jnp.ones((2, 1))))
        assert type(mapped) is kind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_products_are_the_same_on_every_mesh(name, method):
    weight, x = jnp.asarray(draw(5, (48, 8, 64))), jnp.asarray(8 * draw(6, (8, 1, 8, 64)))
    q = quantize(weight, 2, method)
    expected = project("BTNH,DNH->BTD", x, q)
    mesh = mesh_of(name)
    axes = ("batch", "length", "heads", "head_dim"), ("embed", "heads", "head_dim"), ("embed", "group")
    with jax.set_mesh(mesh):
        placed = (jax.device_put(a, sharding(mesh, names, a.shape)) for a, names in zip((x, *q), axes, strict=True))
        x, value, scale = placed
        found = jax.jit(project, static_argnums=0)("BTNH,DNH->BTD", x, type(q)(value, scale))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("B", [1, 2])
def test_a_single_token_is_multiplied_as_in_a_row_of_several(dtype, B):
    """On a CPU it takes another form; the sums are the same to their last digits."""
    x, weight = (8 * draw(7, (B, 3, 4, 64))).astype(dtype), draw(8, (48, 4, 64)).astype(dtype)
    several = jax.jit(project, static_argnums=(0, 3))("BTNH,DNH->BTD", x, weight, jnp.float32)
    for t in range(3):
        one = jax.jit(project, static_argnums=(0, 3))("BTNH,DNH->BTD", x[:, t : t + 1], weight, jnp.float32)
        np.testing.assert_allclose(one, several[:, t : t + 1], rtol=0, atol=2e-5)
