"""What must hold of any Llama, on the reference."""

import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from llama_jax.reference.llama import attention, block, embed, forward, head, linear, rms_norm, swiglu

CFG = SimpleNamespace(
    embed_dim=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, norm_eps=1e-5, rope_theta=1e4, rope_type="default"
)  # fmt: skip
F, V = 80, 32


def layer(i: int, cfg=CFG, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    shapes = dict(wq=(N * H, D), wk=(K * H, D), wv=(K * H, D), wo=(D, N * H), w1=(F, D), w3=(F, D), w2=(D, F))
    weights = {name: rng.normal(size=shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
    weights |= {name: rng.uniform(0.8, 1.2, size=D) for name in ("attention_norm", "ffn_norm")}
    return {name: value.astype(dtype) for name, value in weights.items()}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


TABLE, OUTPUT, FINAL_NORM = normal(100, V, 48), normal(101, V, 48), 1 + 0.1 * normal(102, 48)
TOKENS = np.random.default_rng(103).integers(0, V, size=9)


def logits_of(tokens: np.ndarray, layer_weights=layer, **kwargs) -> np.ndarray:
    return forward(CFG, tokens, layer_weights, TABLE, FINAL_NORM, OUTPUT, **kwargs)


def test_the_norm_ignores_scale():
    x, weight = normal(1, 4, 48), np.ones(48)
    np.testing.assert_allclose(rms_norm(1000 * x, weight, 0.0), rms_norm(x, weight, 0.0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.mean(rms_norm(x, weight, 0.0) ** 2, axis=-1), 1, rtol=1e-14)


def test_epsilon_is_inside_the_root_and_weight_outside():
    np.testing.assert_allclose(rms_norm(np.array([[3.0, 4.0]]), np.array([1.0, 10.0]), 3.5), [[3 / 4, 40 / 4]], rtol=1e-15)


def test_swiglu_is_silu_of_the_gate_times_up():
    gate = np.array([-1000.0, -2.0, 0.0, 3.0, 1000.0])
    expected = 2 * np.array([0, -2 / (1 + np.exp(2)), 0, 3 / (1 + np.exp(-3)), 1000])
    np.testing.assert_allclose(swiglu(gate, np.full(5, 2.0)), expected, rtol=1e-15)


def test_linear_is_the_same_in_pieces():
    x, weight = normal(2, 2, 3), normal(3, 9001, 3)
    np.testing.assert_allclose(linear(x, weight), x @ weight.T, rtol=0, atol=1e-14)


def test_grouped_attention_is_attention_with_shared_keys():
    q, k, v = normal(4, 5, 6, 4), normal(5, 5, 2, 4), normal(6, 5, 2, 4)
    shared = [0, 0, 0, 1, 1, 1]  # query head -> key/value head
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k[:, shared], v[:, shared]))


def test_attention_of_one_query_by_hand():
    q, k, v = normal(7, 3, 1, 4), normal(8, 3, 1, 4), normal(9, 3, 1, 4)
    weights = np.array([np.exp(q[2, 0] @ k[s, 0] / 2) for s in range(3)])
    out = attention(q, k, v)
    np.testing.assert_allclose(out[2, 0], weights @ v[:, 0] / weights.sum(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(out[0], v[0], rtol=1e-15)  # the first token sees itself only


def test_large_scores_do_not_overflow():
    q = np.full((2, 1, 4), 1e4)
    assert np.isfinite(attention(q, q, q)).all()


def test_a_token_changes_nothing_before_it():
    changed = TOKENS.copy()
    changed[5] = (changed[5] + 1) % V
    before, after = logits_of(TOKENS), logits_of(changed)
    np.testing.assert_allclose(after[:5], before[:5], rtol=0, atol=1e-12)
    assert (np.abs(after[5:] - before[5:]).max(axis=1) > 1e-3).all()


def test_order_matters_and_offset_does_not():
    last = logits_of(TOKENS)[-1]
    assert np.abs(logits_of(np.r_[TOKENS[1::-1], TOKENS[2:]])[-1] - last).max() > 1e-3
    np.testing.assert_allclose(logits_of(TOKENS, positions=np.arange(9) + 5000)[-1], last, rtol=0, atol=1e-9)


def test_float64_whatever_the_weights():
    """bfloat16 weights give exactly what the same values give in float64."""

    def rounded(i):
        return layer(i, dtype=ml_dtypes.bfloat16)

    logits = logits_of(TOKENS, rounded)
    assert logits.dtype == np.float64
    wide = logits_of(TOKENS, lambda i: {name: value.astype(np.float64) for name, value in rounded(i).items()})
    np.testing.assert_array_equal(logits, wide)
    assert embed(TABLE.astype(np.float16), TOKENS).dtype == np.float64
    assert head(np.ones((1, 48)), FINAL_NORM.astype(np.float16), OUTPUT.astype(np.float16), 1e-5).dtype == np.float64


def test_forward_is_the_blocks_in_order_and_asks_for_each_layer_once():
    asked = []

    def weights(i):
        asked.append(i)
        return layer(i)

    logits = logits_of(TOKENS, weights)
    assert asked == [0, 1, 2]
    x, freqs = embed(TABLE, TOKENS), CFG.rope_theta ** (-np.arange(5) / 5)
    for i in range(3):
        x = block(CFG, x, layer(i), np.arange(9), freqs, 1.0)
    np.testing.assert_allclose(head(x, FINAL_NORM, OUTPUT, CFG.norm_eps), logits, rtol=0, atol=1e-12)


def test_the_trace_holds_every_step_in_order_and_changes_no_result():
    trace = {}
    np.testing.assert_array_equal(logits_of(TOKENS, trace=trace), logits_of(TOKENS))
    names = "attn_norm q k v q_rotated k_rotated attended attn_out after_attn mlp_norm gate up swiglu mlp_out out".split()
    assert list(trace) == ["embedded", *(f"layers.{i}.{name}" for i in range(3) for name in names), "logits"]
    assert trace["layers.1.q_rotated"].shape == (9, 6, 10) and trace["layers.1.k"].shape == (9, 2, 10)
    np.testing.assert_array_equal(trace["layers.2.out"], trace["layers.2.after_attn"] + trace["layers.2.mlp_out"])


def test_dynamic_rope_takes_the_length_from_the_last_position_or_the_caller():
    cfg = SimpleNamespace(**vars(CFG) | dict(rope_type="dynamic", rope_factor=2.0, rope_original_length=8))
    alone, within, longer = (forward(cfg, TOKENS, layer, TABLE, FINAL_NORM, OUTPUT, length=n) for n in (None, 9, 20))
    np.testing.assert_array_equal(alone, within)
    assert np.abs(longer - alone).max() > 1e-3


@pytest.mark.parametrize("module", ["llama_jax.reference.llama", "llama_jax.reference.rope"])
def test_the_reference_needs_numpy_only(module):
    code = f"import sys, {module}; print([m for m in ('jax', 'flax', 'torch', 'llama_jax.config') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
