"""The whole model against the reference, and what must change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ModelConfig
from llama_jax.model import Params, forward, hidden_states
from llama_jax.reference.rope import interleave
from tests.model.make import CONFIGS, TINY, params_of, reference_of, tokens_of

B, T = 2, 20
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

forward_jit = jax.jit(forward, static_argnums=0)
states = jax.jit(hidden_states, static_argnums=0)


def logits_of(cfg: ModelConfig, params: Params, tokens: np.ndarray, positions: np.ndarray = POSITIONS) -> np.ndarray:
    """[B, T] -> [B, T, V]; one program a config."""
    ours = forward_jit(cfg, params, tokens, positions)
    assert ours.dtype == jnp.float32
    return np.asarray(ours)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_reference(name):
    cfg, params, tokens = CONFIGS[name], params_of(CONFIGS[name]), tokens_of(CONFIGS[name], B, T)
    ours = logits_of(cfg, params, tokens)
    assert ours.std() > 0.5
    for row, row_tokens in zip(ours, tokens, strict=True):
        np.testing.assert_allclose(row, reference_of(cfg, params, row_tokens), rtol=0, atol=1e-4)


def test_every_layer_is_that_of_the_reference():
    """Keys and values of each layer, which follow from what enters it, and what leaves the last."""
    params, tokens, trace = params_of(TINY), tokens_of(TINY, B, T), {}
    reference_of(TINY, params, tokens[0], trace=trace)
    x, caches = states(TINY, params, tokens, POSITIONS)
    for i, cache in enumerate(caches):
        k, v = (np.asarray(a)[0].swapaxes(0, 1) for a in cache)
        k = np.stack([interleave(token.reshape(-1), TINY.num_kv_heads).reshape(token.shape) for token in k])
        np.testing.assert_allclose(k, trace[f"layers.{i}.k_rotated"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(v, trace[f"layers.{i}.v"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(x[0], trace[f"layers.{TINY.num_layers - 1}.out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "yarn"])
def test_positions_given_are_the_positions_used(name):
    cfg, params, tokens = CONFIGS[name], params_of(CONFIGS[name]), tokens_of(CONFIGS[name], B, T)
    positions = np.stack([np.r_[0:10, 300_000:300_010], np.r_[77:97]]).astype(np.int32)
    ours = logits_of(cfg, params, tokens, positions)
    for row, row_tokens, row_positions in zip(ours, tokens, positions, strict=True):
        np.testing.assert_allclose(row, reference_of(cfg, params, row_tokens, row_positions), rtol=0, atol=1e-4)


def test_a_token_changes_nothing_before_it():
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    changed = tokens.copy()
    changed[:, 12] = (changed[:, 12] + 1) % TINY.vocab_size
    ours, other = logits_of(TINY, params, tokens), logits_of(TINY, params, changed)
    np.testing.assert_array_equal(ours[:, :12], other[:, :12])
    assert np.all(np.any(ours[:, 12:] != other[:, 12:], axis=-1))


def test_padding_on_the_right_changes_nothing():
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    padded = np.concatenate([tokens, tokens_of(TINY, B, 7, seed=2)], axis=1)
    ours = forward_jit(TINY, params, padded)[:, :T]  # positions from 0 unless given
    np.testing.assert_allclose(ours, logits_of(TINY, params, tokens), rtol=0, atol=1e-5)


def test_the_rest_of_the_batch_changes_nothing():
    params, tokens = params_of(TINY), tokens_of(TINY, B, T)
    ours = logits_of(TINY, params, tokens)
    np.testing.assert_allclose(logits_of(TINY, params, tokens[::-1]), ours[::-1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits_of(TINY, params, tokens[:1], POSITIONS[:1]), ours[:1], rtol=0, atol=1e-5)


def test_rows_of_different_lengths_scale_dynamic_rope_each_by_its_own():
    cfg, lengths = CONFIGS["dynamic"], np.array([20, 5])
    params, tokens = params_of(cfg), tokens_of(cfg, B, T)
    x, _ = states(cfg, params, tokens, POSITIONS, rope_length=lengths)
    for row, row_tokens, length in zip(x, tokens, lengths, strict=True):
        trace = {}
        reference_of(cfg, params, row_tokens, length=int(length), trace=trace)
        np.testing.assert_allclose(row, trace[f"layers.{cfg.num_layers - 1}.out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_is_the_reference_on_the_same_weights_but_for_rounding(rows):
    """About seven roundings of 2^-9 in each of three layers and the head: some 1% of the logits' size."""
    params, tokens = params_of(TINY, jnp.bfloat16), tokens_of(TINY, rows, T)
    with jax.default_matmul_precision("default"):  # as users run it
        ours = logits_of(TINY, params, tokens, POSITIONS[:rows])
    for row, row_tokens in zip(ours, tokens, strict=True):
        exact = reference_of(TINY, params, row_tokens)
        assert np.sqrt(np.mean((row - exact) ** 2) / np.mean(exact**2)) < 0.03
