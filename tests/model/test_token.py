"""A single token by the GPU's kernels, interpreted on the CPU, against the plain layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import grow_cache, hidden_states, init_params, logits, quantize_params, round_cache, token
from llama_jax.model.fused import fuse_layer
from tests.make_mesh import equations, mesh_of, on
from tests.model.make import SMALL

CFG = dataclasses.replace(SMALL, head_dim=64, embed_dim=256, mlp_dim=384)
LENGTH, SLOTS = 70, 128
POSITIONS = jnp.arange(LENGTH)[None]
TOKENS = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, CFG.vocab_size)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Takes the branch for CUDA where there is one, its kernels interpreted."""
    choose = jax.lax.platform_dependent

    def platform_dependent(*args, **branches):
        return branches["cuda"](*args) if "cuda" in branches else choose(*args, **branches)

    def turn_on():
        monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
        for name in ("multiply_row", "attend_new"):
            monkeypatch.setattr(token, name, functools.partial(getattr(token, name), interpret=True))

    return turn_on


def fused(params):
    return params | {"layers": [fuse_layer(layer) for layer in params["layers"]]}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def read(dtype: str, method: str, cache_dtype: str):
    """Parameters, and the cache of all tokens but the last."""
    params = init_params(CFG, jax.random.key(0), dtype)
    params = fused(quantize_params(params, method) if method else params)
    _, cache = hidden_states(CFG, params, TOKENS[:, :-1], POSITIONS[:, :-1])
    return params, grow_cache(round_cache(cache, cache_dtype), SLOTS)


def step(params, cache, *, kernels: bool):
    x, cache = hidden_states(CFG, params, TOKENS[:, -1:], POSITIONS[:, -1:], cache, kernels=kernels)
    return logits(CFG, params, x, kernels=kernels), cache


@pytest.mark.parametrize(
    ("dtype", "method", "cache_dtype"),
    [("bfloat16", "", "auto"), ("float16", "", "auto"), ("bfloat16", "int8", "int8"), ("bfloat16", "int4", "auto")],
)
def test_a_token_is_the_plain_layers_(dtype, method, cache_dtype, on_a_gpu):
    params, cache = read(dtype, method, cache_dtype)
    plain, plain_cache = jax.jit(functools.partial(step, kernels=False))(params, cache)
    on_a_gpu()
    ours, our_cache = jax.jit(functools.partial(step, kernels=True))(params, cache)
    assert ours.dtype == jnp.float32 and ours.shape == plain.shape
    scale = float(jnp.abs(plain).max())
    np.testing.assert_allclose(ours, plain, rtol=0, atol=(0.02 if dtype == "bfloat16" else 0.004) * scale)
    for a, b in zip(jax.tree.leaves(our_cache), jax.tree.leaves(plain_cache), strict=True):
        rest = np.arange(SLOTS) != LENGTH - 1
        np.testing.assert_array_equal(a[:, :, rest], b[:, :, rest])  # only its own slot is written
        a, b = (np.asarray(x[:, :, LENGTH - 1], np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=1 if a.dtype == np.int8 else 0.02 * np.abs(b).max() + 1e-6)


def calls(program, *args) -> int:
    """Of the kernel of a row's products."""
    found = (equation for equation in equations(program, *args) if equation.primitive.name == "pallas_call")
    return sum("multiply_row" in str(equation.params["name"]) for equation in found)


def shapes(dtype: str, method: str = "", batch: int = 1, is_fused: bool = True):
    def make():
        params = init_params(CFG, jax.random.key(0), dtype)
        _, cache = hidden_states(CFG, params, jnp.zeros((batch, 8), jnp.int32), jnp.zeros((batch, 8), jnp.int32))
        params = quantize_params(params, method) if method else params
        return fused(params) if is_fused else params, grow_cache(cache, SLOTS)

    return jax.eval_shape(make)


@pytest.mark.parametrize(
    ("dtype", "method", "batch", "expected"),
    [
        ("bfloat16", "", 1, 4),
        ("bfloat16", "int8", 1, 4),
        ("float32", "", 1, 0),
        ("bfloat16", "fp8", 1, 0),
        ("bfloat16", "w8a8", 1, 0),
        ("bfloat16", "", 2, 0),
    ],
)
def test_one_row_of_fused_weights_has_kernels(dtype, method, batch, expected):
    def program(params, cache):
        tokens = jnp.zeros((batch, 1), jnp.int32)
        x, _ = hidden_states(CFG, params, tokens, tokens, cache)
        return logits(CFG, params, x, kernels=True)

    assert calls(program, *shapes(dtype, method, batch)) == expected * CFG.num_layers + bool(expected)


def test_weights_that_are_not_fused_have_none_but_the_head_s():
    params, cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes("bfloat16", is_fused=False))
    x = jnp.zeros((1, 1, CFG.embed_dim), jnp.bfloat16)
    assert not token.supports_layer(params["layers"][0], x, cache[0])
    assert token.supports_head(CFG, params["lm_head"], x)


@pytest.mark.parametrize("name", [None, "1x1x8"])
def test_one_device_has_kernels(name):
    params, cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes("bfloat16"))
    x = jnp.zeros((1, 1, CFG.embed_dim), jnp.bfloat16)
    with on(name and mesh_of(name)):
        assert token.supports_layer(params["layers"][0], x, cache[0]) == (name is None)
        assert token.supports_head(CFG, params["lm_head"], x) == (name is None)
