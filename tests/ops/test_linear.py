"""Products with weights: what they are summed in, and what they come out as."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops.linear import project

EQUATIONS = {  # shapes of x and weight, [out..., in...]; B 2, T 3, D 48, N 6, H 10, K 2, F 80, V 32
    "BTD,NHD->BTNH": ((2, 3, 48), (6, 10, 48)),
    "BTD,KHD->BTKH": ((2, 3, 48), (2, 10, 48)),
    "BTNH,DNH->BTD": ((2, 3, 6, 10), (48, 6, 10)),
    "BTD,FD->BTF": ((2, 3, 48), (80, 48)),
    "BTF,DF->BTD": ((2, 3, 80), (48, 80)),
    "BTD,VD->BTV": ((2, 3, 48), (32, 48)),
}


def draw(seed: int, equation: str, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, weight = (rng.normal(size=shape) for shape in EQUATIONS[equation])
    return x.astype(dtype), (weight / 8).astype(dtype)


@given(st.integers(0, 2**32), st.sampled_from(list(EQUATIONS)))
def test_a_product_is_the_einsum_in_float64(seed, equation):
    x, weight = draw(seed, equation)
    expected = np.einsum(equation, x.astype(np.float64), weight.astype(np.float64))
    np.testing.assert_allclose(project(equation, jnp.asarray(x), jnp.asarray(weight)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "default"])  # the tests' own, and what users run
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_bfloat16_product_is_rounded_once(equation, jit, precision):
    x, weight = draw(1, equation, ml_dtypes.bfloat16)
    expected = np.einsum(equation, x.astype(np.float64), weight.astype(np.float64))
    compute = jax.jit(project, static_argnums=(0, 3)) if jit else project
    with jax.default_matmul_precision(precision):
        wide = compute(equation, jnp.asarray(x), jnp.asarray(weight), jnp.float32)
        narrow = compute(equation, jnp.asarray(x), jnp.asarray(weight))
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(narrow, np.asarray(wide).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("precision", ["highest", "default"])
@pytest.mark.parametrize("T", [1, 2])
def test_the_sum_of_a_bfloat16_product_is_float32(T, precision):
    x, weight = jnp.ones((1, T, 4097), jnp.bfloat16), jnp.ones((3, 4097), jnp.bfloat16)
    with jax.default_matmul_precision(precision):
        np.testing.assert_array_equal(project("BTD,FD->BTF", x, weight, jnp.float32), 4097)  # in bfloat16 it stops at 256
        np.testing.assert_array_equal(project("BTD,FD->BTF", x, weight), 4096)


def test_a_float32_weight_is_rounded_to_the_dtype_of_x():
    x, weight = draw(2, "BTD,FD->BTF")
    x, weight = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight)
    np.testing.assert_array_equal(project("BTD,FD->BTF", x, weight), project("BTD,FD->BTF", x, weight.astype(jnp.bfloat16)))
