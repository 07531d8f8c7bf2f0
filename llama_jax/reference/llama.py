"""Llama in NumPy float64, one sequence at a time: the equations of Touvron et al. 2023 (arXiv:2302.13971, section 2.2).

Weights carry Meta's names, shapes and RoPE convention (pairs of neighbours), in any float type; every number computed is
float64. `cfg` is any object with the field names of `llama_jax.config.ModelConfig`. Letters: T tokens, D width, N query heads,
K key/value heads, H head width, F feed-forward width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llama_jax.reference.rope import rope_frequencies, rotate


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [T, in], weight [out, in] -> x W^T [T, out]; 4,096 rows are float64 at a time (a head of 405B would be 17 GB)."""
    return np.concatenate([x @ weight[i : i + 4096].astype(np.float64).T for i in range(0, len(weight), 4096)], axis=1)


def embed(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Rows of table [V, D] for tokens [T] -> [T, D]."""
    return table[np.asarray(tokens)].astype(np.float64)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

    x: [T, D]; weight: [D].
    """
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1), grouped over K heads.

    Query head n reads key/value head n // (N/K) (Ainslie et al. 2023, arXiv:2305.13245). A token sees itself and what
    stands before it in the sequence, whatever the position numbers.

    Args:
        q: [T, N, H], rotated.
        k, v: [T, K, H], k rotated.

    Returns:
        [T, N, H]
    """
    T, N, H = q.shape
    k, v = (np.repeat(a, N // k.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("TNH,SNH->NTS", q, k) / np.sqrt(H)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("NTS,SNH->TNH", weights, v)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up with silu(z) = z / (1 + exp(-z)) (Shazeer 2020, arXiv:2002.05202, equation 6 without w2); [T, F]."""
    return gate * np.exp(-np.logaddexp(0, -gate)) * up  # log(1 + exp(-z)) as logaddexp: nothing overflows


def block(
    cfg: Any,
    x: np.ndarray,
    weights: Mapping[str, np.ndarray],
    positions: np.ndarray,
    freqs: np.ndarray,
    factor: float,
    trace: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """One pre-norm decoder layer: h = x + Attention(norm(x)); h + MLP(norm(h)).

    Args:
        x: [T, D].
        weights: attention_norm [D], wq [N*H, D], wk and wv [K*H, D], wo [D, N*H], ffn_norm [D], w1 (gate) and w3 (up) [F, D],
            w2 (down) [D, F].
        positions: [T].
        freqs, factor: from `rope_frequencies`.
        trace: when given, gets every intermediate in the order of computation: attn_norm, mlp_norm, attn_out, after_attn,
            mlp_out, out [T, D]; q, q_rotated, attended [T, N, H]; k, k_rotated, v [T, K, H]; gate, up, swiglu [T, F].

    Returns:
        [T, D]
    """

    def keep(name: str, value: np.ndarray) -> np.ndarray:
        if trace is not None:
            trace[name] = value
        return value

    T, N, K, H = len(x), cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    y = keep("attn_norm", rms_norm(x, weights["attention_norm"], cfg.norm_eps))
    q = keep("q", linear(y, weights["wq"]).reshape(T, N, H))
    k = keep("k", linear(y, weights["wk"]).reshape(T, K, H))
    v = keep("v", linear(y, weights["wv"]).reshape(T, K, H))
    q = keep("q_rotated", rotate(q, positions, freqs, factor))
    k = keep("k_rotated", rotate(k, positions, freqs, factor))
    attended = keep("attended", attention(q, k, v))
    x = keep("after_attn", x + keep("attn_out", linear(attended.reshape(T, N * H), weights["wo"])))

    y = keep("mlp_norm", rms_norm(x, weights["ffn_norm"], cfg.norm_eps))
    gate, up = keep("gate", linear(y, weights["w1"])), keep("up", linear(y, weights["w3"]))
    return keep("out", x + keep("mlp_out", linear(keep("swiglu", swiglu(gate, up)), weights["w2"])))


def head(x: np.ndarray, final_norm: np.ndarray, output: np.ndarray, eps: float) -> np.ndarray:
    """x [T, D], final_norm [D], output [V, D] -> logits [T, V]."""
    return linear(rms_norm(x, final_norm, eps), output)


def forward(
    cfg: Any,
    tokens: np.ndarray,
    layer_weights: Callable[[int], Mapping[str, np.ndarray]],
    embedding: np.ndarray,
    final_norm: np.ndarray,
    output: np.ndarray,
    positions: np.ndarray | None = None,
    length: int | None = None,
    trace: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Logits of one sequence.

    Args:
        tokens: [T] ids.
        layer_weights: called once with each layer's index, so that one layer is in memory at a time; see `block`.
        embedding: [V, D].
        final_norm: [D].
        output: [V, D]; the embedding again when the head is tied.
        positions: [T]; 0, 1, 2, ... when None.
        length: tokens of the whole sequence, for dynamic RoPE; the last position + 1 when None.
        trace: when given, gets `embedded`, every intermediate of layer i as `layers.i.NAME`, and `logits`.

    Returns:
        [T, V]
    """
    positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    freqs, factor = rope_frequencies(cfg, int(positions.max()) + 1 if length is None else length)
    x = embed(embedding, tokens)
    if trace is not None:
        trace["embedded"] = x
    for i in range(cfg.num_layers):
        steps: dict[str, np.ndarray] | None = None if trace is None else {}
        x = block(cfg, x, layer_weights(i), positions, freqs, factor, steps)
        if trace is not None:
            trace.update({f"layers.{i}.{name}": value for name, value in steps.items()})
    logits = head(x, final_norm, output, cfg.norm_eps)
    if trace is not None:
        trace["logits"] = logits
    return logits
