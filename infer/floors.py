"""What this machine can do at most, measured in the process that is being judged.

A share of a floor that was measured beside it holds on a noisy machine and compares across machines. Rates are the best of
several runs: what slows a product down here is somebody else's doing.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.ops.linear import precision

RUNS = 5
SET_BYTES = 2**29  # of weights multiplied in one run: more than any cache holds
MOST_LAYERS = 128  # that it is made of; a small model stays in the cache, as it does when it generates
GEMV_ROWS = (1, 2, 4, 8)  # that one row is padded to: a kernel for a single one is often the slower
OPERANDS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "int8": jnp.int8}


@dataclasses.dataclass(frozen=True)
class Floors:
    """Rates of one device.

    Attributes:
        copy_bytes_per_second: bytes read and bytes written of an array copied.
        matmul_flops_per_second: of products with many rows, by the dtype of both operands.
        gemv_bytes_per_second: bytes of the weights that one row is multiplied with, by dtype, in the best of several forms.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: dict[str, float]
    gemv_bytes_per_second: dict[str, float]


def measure_floors(matrices: Sequence[tuple[int, int]], rows: int, dtypes: Sequence[str], device: jax.Device) -> Floors:
    """Times products of a model's shapes, each dtype multiplied with its own and summed in float32 (int8: int32).

    Args:
        matrices: (outputs, inputs) of the weights of a layer.
        rows: of the activations in a product with many.
        dtypes: keys of OPERANDS.
    """
    with jax.default_device(device):
        big = jnp.ones(SET_BYTES // 8, jnp.float32)
        copied = best_seconds(jax.jit(lambda x: x + 1), big)
        matmul, gemv = {}, {}
        for dtype in dtypes:
            weights = _weights(matrices, OPERANDS[dtype])
            size, nbytes = sum(w.size for w in weights), sum(w.nbytes for w in weights)
            forms = (_products_seconds(weights, m) for m in GEMV_ROWS)
            gemv[dtype] = nbytes / min(forms)
            matmul[dtype] = 2 * rows * size / _products_seconds(weights, rows)
    return Floors(2 * big.nbytes / copied, matmul, gemv)


def best_seconds(run: Callable[..., Any], *args: Any) -> float:
    """The least of several runs, after one that compiles."""
    jax.block_until_ready(run(*args))
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        found.append(time.perf_counter() - start)
    return min(found)


def _weights(matrices: Sequence[tuple[int, int]], dtype: Any) -> list[Array]:
    """As many layers of random weights as make SET_BYTES, at least one."""
    layer = sum(outputs * inputs for outputs, inputs in matrices) * jnp.dtype(dtype).itemsize
    make = jax.jit(_random, static_argnames=("shape", "dtype"))
    layers = min(max(1, round(SET_BYTES / layer)), MOST_LAYERS)
    return [make(jax.random.key(i), shape=shape, dtype=dtype) for i in range(layers) for shape in matrices]


def _random(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, dtype)


def _products_seconds(weights: Sequence[Array], rows: int) -> float:
    """Of x W^T with every weight, in one program."""
    dtype = weights[0].dtype
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def product(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision(dtype), preferred_element_type=sums)

    inputs = {n: _random(jax.random.key(n), (rows, n), dtype) for n in {w.shape[1] for w in weights}}
    run = jax.jit(lambda inputs, weights: [product(inputs[w.shape[1]], w) for w in weights])
    return best_seconds(run, inputs, weights)
