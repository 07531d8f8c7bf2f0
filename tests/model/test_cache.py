"""The cache: what is written where, and that a model which reads it computes what it computed without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.typing import DTypeLike

from llama_jax.config import ModelConfig
from llama_jax.model import KVCache, LayerCache, Params, grow_cache, hidden_states, logits
from llama_jax.model.cache import write
from tests.model.make import CONFIGS, TINY, params_of, tokens_of

B, T, S = 3, 16, 24
LENGTHS = np.array([5, 9, 1], np.int32)  # of the prompts; every row then goes on to T
ROPE_LENGTHS = np.array([16, 30, 20], np.int32)  # read by dynamic only: what each sequence will have
K, H = 2, 10


def grid(B: int, T: int, start: Array | int = 0) -> Array:
    return jnp.reshape(jnp.asarray(start), (-1, 1)) + jnp.broadcast_to(jnp.arange(T), (B, T))


@functools.partial(jax.jit, static_argnums=0)
def prefill(cfg: ModelConfig, params: Params, tokens: Array, rope_length: Array) -> tuple[Array, KVCache]:
    x, cache = hidden_states(cfg, params, tokens, grid(*tokens.shape), rope_length=rope_length)
    return logits(cfg, params, x), grow_cache(cache, S)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def extend(
    cfg: ModelConfig, params: Params, tokens: Array, start: Array, cache: KVCache, rope_length: Array
) -> tuple[Array, KVCache]:
    positions = grid(*tokens.shape, start)
    x, cache = hidden_states(cfg, params, tokens, positions, cache, rope_length)
    return logits(cfg, params, x), cache


def prompts(cfg: ModelConfig, tokens: np.ndarray, lengths: np.ndarray = LENGTHS) -> np.ndarray:
    """The first `lengths` tokens of each row, then others in the place of the rest: padding, which nobody may see."""
    return np.where(np.arange(T) < lengths[:, None], tokens, tokens_of(cfg, *tokens.shape, seed=9))


def decode_all(cfg: ModelConfig, params: Params, tokens: np.ndarray) -> tuple[np.ndarray, KVCache]:
    """Logits [B, T, V] and cache of tokens [B, T]: prompts in one padded pass, then token by token from each one's end."""
    first, cache = prefill(cfg, params, prompts(cfg, tokens), ROPE_LENGTHS)
    result = np.zeros((*tokens.shape, cfg.vocab_size), np.float32)
    for b, length in enumerate(LENGTHS):
        result[b, :length] = first[b, :length]
    for step in range(T - LENGTHS.min()):
        at = np.minimum(LENGTHS + step, T - 1)  # a row at its end says its last token again
        now = np.take_along_axis(tokens, at[:, None], axis=1)
        out, cache = extend(cfg, params, now, at, cache, ROPE_LENGTHS)
        result[np.arange(B), at] = out[:, 0]
    return result, cache


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_the_cache_is_the_forward_pass(name):
    cfg, params, tokens = CONFIGS[name], params_of(CONFIGS[name]), tokens_of(CONFIGS[name], B, T)
    whole, whole_cache = prefill(cfg, params, tokens, ROPE_LENGTHS)
    out, cache = decode_all(cfg, params, tokens)
    np.testing.assert_allclose(out, whole, rtol=0, atol=1e-5)
    assert len(cache) == cfg.num_layers
    for ours, other in zip(jax.tree.leaves(cache), jax.tree.leaves(whole_cache), strict=True):
        assert ours.shape == (B, cfg.num_kv_heads, S, cfg.head_dim)
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5)  # each token in its slot


def test_several_tokens_at_once_after_a_prompt_are_the_forward_pass():
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    whole, _ = prefill(TINY, params, tokens, ROPE_LENGTHS)
    _, cache = prefill(TINY, params, prompts(TINY, tokens), ROPE_LENGTHS)
    index = LENGTHS[:, None] + np.arange(4)
    out, _ = extend(TINY, params, np.take_along_axis(tokens, index, axis=1), LENGTHS, cache, ROPE_LENGTHS)
    np.testing.assert_allclose(out, np.take_along_axis(whole, index[:, :, None], axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows, precision", [(1, "default"), (3, "default"), (1, "highest")])  # default is what users run
def test_decoding_in_bfloat16_is_close_to_the_forward_pass(rows, precision):
    cfg = dataclasses.replace(CONFIGS["yarn"], num_layers=1)
    params, tokens, lengths = params_of(cfg, jnp.bfloat16), tokens_of(cfg, rows, T), LENGTHS[:rows]
    with jax.default_matmul_precision(precision):
        whole, _ = prefill(cfg, params, tokens, T)
        _, cache = prefill(cfg, params, prompts(cfg, tokens, lengths), T)
        now = np.take_along_axis(tokens, lengths[:, None], axis=1)
        out, cache = extend(cfg, params, now, lengths, cache, T)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache))
    exact = np.asarray(whole)[np.arange(rows), lengths]
    assert np.sqrt(np.mean((out[:, 0] - exact) ** 2) / np.mean(exact**2)) < 0.03


# write


def layer_cache(rows: int, dtype: DTypeLike) -> LayerCache:
    rng = np.random.default_rng(0)
    return LayerCache(*(jnp.asarray(rng.normal(size=(rows, K, S, H)), dtype) for _ in range(2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("starts", [[0], [7], [20], [3, 0, 20]], ids=str)
def test_a_row_is_written_at_its_own_start_and_nowhere_else(starts, length, dtype):
    cache, rng = layer_cache(len(starts), dtype), np.random.default_rng(1)
    new = [rng.normal(size=(len(starts), length, K, H)).astype(np.float32) for _ in range(2)]
    written = jax.jit(write)(cache, *(jnp.asarray(a) for a in new), jnp.asarray(starts))
    for slots, before, values in zip(written, cache, new, strict=True):
        expected = np.array(before)
        for b, start in enumerate(starts):
            expected[b, :, start : start + length] = np.asarray(jnp.asarray(values[b], dtype)).swapaxes(0, 1)
        assert slots.dtype == dtype
        np.testing.assert_array_equal(slots, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_donated_cache_is_written_in_place(rows, dtype):
    cache = LayerCache(*[jax.ShapeDtypeStruct((rows, K, 4096, H), dtype)] * 2)
    new = jax.ShapeDtypeStruct((rows, 1, K, H), dtype)
    starts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    memory = jax.jit(write, donate_argnums=0).lower(cache, new, new, starts).compile().memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 20  # no copy of either half


# grow_cache


def test_a_grown_cache_keeps_what_it_held_and_has_room():
    cache = [layer_cache(2, jnp.bfloat16), layer_cache(2, jnp.bfloat16)]
    grown = grow_cache(cache, S + 5)
    assert len(grown) == 2
    for layer, before in zip(grown, cache, strict=True):
        for slots, old in zip(layer, before, strict=True):
            assert slots.shape == (2, K, S + 5, H) and slots.dtype == jnp.bfloat16
            np.testing.assert_array_equal(slots[:, :, :S], old)
    assert jax.tree.map(jnp.shape, grow_cache(cache, S)) == jax.tree.map(jnp.shape, cache)


def test_growing_in_the_middle_of_a_sequence_changes_nothing():
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    whole, _ = prefill(TINY, params, tokens, ROPE_LENGTHS)
    _, cache = prefill(TINY, params, prompts(TINY, tokens, np.full(B, 9)), ROPE_LENGTHS)
    out, _ = extend(TINY, params, tokens[:, 9:10], np.full(B, 9), grow_cache(cache, S + 11), ROPE_LENGTHS)
    np.testing.assert_allclose(out[:, 0], whole[:, 9], rtol=0, atol=1e-5)
