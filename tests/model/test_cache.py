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
from llama_jax.model import KVCache, LayerCache, Params, empty_cache, grow_cache, hidden_states, logits, round_cache
from llama_jax.model.cache import write
from llama_jax.ops.qarray import QVectors, quantize_vectors
from tests.model.make import CONFIGS, TINY, params_of, tokens_of

B, T, S = 3, 16, 24
LENGTHS = np.array([5, 9, 1], np.int32)  # of the prompts; every row then goes on to T
ROPE_LENGTHS = np.array([16, 30, 20], np.int32)  # read by dynamic only: what each sequence will have
K, H = 2, 10


def grid(B: int, T: int, start: Array | int = 0) -> Array:
    return jnp.reshape(jnp.asarray(start), (-1, 1)) + jnp.broadcast_to(jnp.arange(T), (B, T))


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
    cfg: ModelConfig, params: Params, tokens: Array, rope_length: Array, cache_dtype: str = "auto"
) -> tuple[Array, KVCache]:
    x, cache = hidden_states(cfg, params, tokens, grid(*tokens.shape), rope_length=rope_length)
    return logits(cfg, params, x), grow_cache(round_cache(cache, cache_dtype), S)


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


def decode_all(cfg: ModelConfig, params: Params, tokens: np.ndarray, cache_dtype: str = "auto") -> tuple[np.ndarray, KVCache]:
    """Logits [B, T, V] and cache of tokens [B, T]: prompts in one padded pass, then token by token from each one's end."""
    first, cache = prefill(cfg, params, prompts(cfg, tokens), ROPE_LENGTHS, cache_dtype)
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


# int8


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_a_cache_in_int8_is_close_to_the_forward_pass(name):
    """Prompts are read before they are rounded: their logits are those of the forward pass."""
    cfg, params, tokens = CONFIGS[name], params_of(CONFIGS[name]), tokens_of(CONFIGS[name], B, T)
    whole, _ = prefill(cfg, params, tokens, ROPE_LENGTHS)
    out, cache = decode_all(cfg, params, tokens, "int8")
    in_prompt = np.arange(T) < LENGTHS[:, None]
    np.testing.assert_allclose(out[in_prompt], np.asarray(whole)[in_prompt], rtol=0, atol=1e-5)
    assert 1e-4 < rms((out - whole)[~in_prompt]) / rms(whole) < 0.02
    for layer in cache:
        for half in layer:
            assert half.shape == (B, cfg.num_kv_heads, S, cfg.head_dim) and half.scale.shape == half.shape[:-1]
            assert half.value.dtype == jnp.int8 and half.scale.dtype == jnp.float32


def test_a_token_reads_its_own_key_and_value_rounded():
    """One token with an empty cache attends to itself alone: the last layer gives it its value, which has 255 levels."""
    cfg = dataclasses.replace(TINY, num_layers=1)
    params, start = params_of(cfg), np.zeros(B, np.int32)
    x = params["embedding"][tokens_of(cfg, B, 1)]

    def attended(cache: KVCache | None) -> np.ndarray:
        """What attention gives to o_proj, had there been no MLP and no residual."""
        only = {**params["layers"][0], "down_proj": jnp.zeros_like(params["layers"][0]["down_proj"])}
        out, _ = hidden_states(cfg, params | {"layers": [only]}, tokens_of(cfg, B, 1), grid(B, 1, start), cache)
        return np.asarray(out - x)[:, 0]

    _, (layer,) = hidden_states(cfg, params, tokens_of(cfg, B, 1), grid(B, 1, start))
    value = quantize_vectors(layer.v[:, :, 0])
    heads = jnp.repeat(value.value * value.scale[..., None], cfg.num_heads // cfg.num_kv_heads, axis=1)
    wanted = jnp.einsum("BNH,DNH->BD", heads, params["layers"][0]["o_proj"], precision="highest")
    found = attended(empty_cache(cfg, (B, 4), jnp.float32, "int8"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(found - attended(None)).max() > 1e-4


def test_an_empty_cache_is_read_as_none_was():
    """A whole pass into an empty cache is the pass without one."""
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    whole, expected = prefill(TINY, params, tokens, ROPE_LENGTHS)
    out, cache = extend(
        TINY, params, tokens, np.zeros(B, np.int32), empty_cache(TINY, (B, S), jnp.float32, "auto"), ROPE_LENGTHS
    )
    np.testing.assert_allclose(out, whole, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), cache, expected)


# write


def layer_cache(rows: int, dtype: DTypeLike) -> LayerCache:
    rng = np.random.default_rng(0)
    halves = (jnp.asarray(rng.normal(size=(rows, K, S, H)), jnp.float32 if dtype == jnp.int8 else dtype) for _ in range(2))
    (cache,) = round_cache([LayerCache(*halves)], "int8" if dtype == jnp.int8 else "auto")
    return cache


def stored(x: np.ndarray, dtype: DTypeLike) -> Array | QVectors:
    """[T, K, H] of one row as a cache of this dtype holds it: [K, T, ...]."""
    x = jnp.asarray(x).swapaxes(0, 1)
    return quantize_vectors(x) if dtype == jnp.int8 else x.astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("starts", [[0], [7], [20], [3, 0, 20]], ids=str)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_row_is_written_at_its_own_start_and_nowhere_else(platform, starts, length, dtype, monkeypatch):
    def choose(*args, default, **branches):
        return branches.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    cache, rng = layer_cache(len(starts), dtype), np.random.default_rng(1)
    new = [rng.normal(size=(len(starts), length, K, H)).astype(np.float32) for _ in range(2)]
    written = jax.jit(lambda *args: write(*args))(cache, *(jnp.asarray(a) for a in new), jnp.asarray(starts))
    expected = jax.tree.map(np.array, cache)
    for half, values in zip(expected, new, strict=True):
        for b, start in enumerate(starts):
            for slots, own in zip(jax.tree.leaves(half), jax.tree.leaves(stored(values[b], dtype)), strict=True):
                slots[b, :, start : start + length] = own
    jax.tree.map(np.testing.assert_array_equal, written, expected)
    assert jax.tree.map(lambda x: x.dtype, written) == jax.tree.map(lambda x: x.dtype, cache)
    assert jax.tree.leaves(written)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_donated_cache_is_written_in_place(rows, dtype):
    half = jax.ShapeDtypeStruct((rows, K, 4096, 64), dtype)
    half = QVectors(half, jax.ShapeDtypeStruct(half.shape[:-1], jnp.float32)) if dtype == jnp.int8 else half
    cache = LayerCache(half, half)
    new = jax.ShapeDtypeStruct((rows, 1, K, 64), jnp.float32 if dtype == jnp.int8 else dtype)
    starts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    memory = jax.jit(write, donate_argnums=0).lower(cache, new, new, starts).compile().memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 20  # no copy of either half


# grow_cache


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_a_grown_cache_keeps_what_it_held_and_has_room(dtype):
    cache = [layer_cache(2, dtype), layer_cache(2, dtype)]
    grown = grow_cache(cache, S + 5)
    assert jax.tree.structure(grown) == jax.tree.structure(cache)
    for slots, old in zip(jax.tree.leaves(grown), jax.tree.leaves(cache), strict=True):
        assert slots.shape == (2, K, S + 5, H)[: old.ndim] and slots.dtype == old.dtype
        np.testing.assert_array_equal(slots[:, :, :S], old)
    assert jax.tree.map(jnp.shape, grow_cache(cache, S)) == jax.tree.map(jnp.shape, cache)


def test_growing_in_the_middle_of_a_sequence_changes_nothing():
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    whole, _ = prefill(TINY, params, tokens, ROPE_LENGTHS)
    _, cache = prefill(TINY, params, prompts(TINY, tokens, np.full(B, 9)), ROPE_LENGTHS)
    out, _ = extend(TINY, params, tokens[:, 9:10], np.full(B, 9), grow_cache(cache, S + 11), ROPE_LENGTHS)
    np.testing.assert_allclose(out[:, 0], whole[:, 9], rtol=0, atol=1e-5)
