"""GPTQ: the paper's algorithm, and a product that changes less."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.gptq import DAMPING, METHODS_FOR, quantize_for
from llama_jax.ops.qarray import GROUP, METHODS, dequantize, quantize


def correlated(inputs: int, rows: int, seed: int = 0) -> np.ndarray:
    """Activations [rows, inputs] some of whose directions are much larger than others, as those of models are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, inputs)) * np.logspace(0, -2, inputs)
    return (mixed @ np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]).astype(np.float32)


def by_the_paper(w: np.ndarray, gram: np.ndarray, group: int, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Columns one by one with the whole inverse, which loses a row and a column each time (equations 2 and 3), float64."""
    w, damped = w.astype(np.float64).copy(), gram.astype(np.float64)
    inverse = np.linalg.inv(damped + DAMPING * np.mean(np.diag(damped)) * np.eye(len(gram)))
    value, scales = np.zeros_like(w), []
    for i in range(w.shape[1]):
        if i % group == 0:
            scale = np.abs(w[:, i : i + group]).max(axis=1) / largest
            scales.append(np.asarray(jnp.asarray(scale, jnp.bfloat16 if largest == 7 else jnp.float32), np.float64))
        value[:, i] = np.clip(np.round(w[:, i] / scales[-1]), -largest, largest)
        error = (w[:, i] - value[:, i] * scales[-1]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return value, np.stack(scales, axis=1)


@pytest.mark.parametrize(("method", "inputs"), [("int4", 384), ("int4", 96), ("int8", 384), ("int8", 45)])
def test_it_is_the_papers_algorithm(method, inputs):
    x = correlated(inputs, 2 * inputs)
    w = np.random.default_rng(1).normal(size=(24, inputs)).astype(np.float32)
    found = quantize_for(jnp.asarray(w), jnp.asarray(x.T @ x), 1, method)
    group = math.gcd(inputs, GROUP) if method == "int4" else inputs
    value, scale = by_the_paper(w, x.T @ x, group, METHODS[method][1])
    np.testing.assert_allclose(np.asarray(found.scale, np.float64), scale, rtol=2**-8 if method == "int4" else 1e-6)
    off = np.abs(np.asarray(found.value, np.float64) - value)
    assert (
        off.max() <= (1 if method == "int4" else 2) and np.mean(off > 0) < 0.02
    )  # ties fall either way, and move what follows


@pytest.mark.parametrize("method", METHODS_FOR)
@pytest.mark.parametrize("shape", [(24, 256), (6, 4, 256), (24, 4, 64)], ids=str)
def test_products_with_such_activations_change_less_and_forms_are_the_same(method, shape):
    num_inputs = 2 if shape == (24, 4, 64) else 1
    x, other = np.split(correlated(256, 640), [512])
    w = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)
    nearest, found = quantize(w, num_inputs, method), quantize_for(w, jnp.asarray(x.T @ x), num_inputs, method)
    assert type(found) is type(nearest)
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in nearest]

    def error(rounded) -> float:
        exact = np.asarray(w, np.float64).reshape(24, 256)
        return float(np.mean(np.square(other @ (np.asarray(dequantize(rounded, jnp.float32)).reshape(24, 256) - exact).T)))

    assert error(found) < 0.5 * error(nearest)


@pytest.mark.parametrize("method", METHODS_FOR)
def test_without_correlation_each_input_is_rounded_by_itself(method):
    w = jnp.asarray(np.random.default_rng(1).normal(size=(5, 256)), jnp.float32)
    for gram in (jnp.eye(256), jnp.zeros((256, 256))):
        found, nearest = quantize_for(w, gram, 1, method), quantize(w, 1, method)
        np.testing.assert_array_equal(np.asarray(found.value), np.asarray(nearest.value))
        np.testing.assert_array_equal(np.asarray(found.scale), np.asarray(nearest.scale))
