"""Rotary position embedding in float64, in Meta's convention: pairs of neighbours (2i, 2i+1).

Su et al. 2021, arXiv:2104.09864, section 3.2.2. Hugging Face checkpoints pair (i, i + H/2) instead; the rows of their q and k
weights pass through `interleave` first. `cfg` is any object with the field names of `llama_jax.config.ModelConfig`.
"""

from typing import Any

import numpy as np


def rope_frequencies(cfg: Any, length: int) -> tuple[np.ndarray, float]:
    """Radians per position of every pair, f_i = theta^(-2i/H), then scaled as cfg.rope_type says.

    - linear: f / factor (Chen et al. 2023, arXiv:2306.15595).
    - dynamic: a base that grows with the sequence (NTK-aware; Peng et al. 2023, arXiv:2309.00071, section 3.3).
    - yarn: interpolated where a pair turns rarely, untouched where it turns often (the same paper, section 3.2).
    - llama3: the same idea with other bounds (meta-llama/llama-models models/llama3/model.py, apply_scaling).

    Args:
        cfg: head_dim H, rope_theta, and what its rope_type reads of rope_*.
        length: tokens of the whole sequence, last position + 1; only dynamic reads it.

    Returns:
        freqs [H/2] and the factor on cos and sin (1 but for yarn).
    """
    H, theta = cfg.head_dim, float(cfg.rope_theta)
    if cfg.rope_type == "dynamic":
        theta = _ntk_base(theta, H, cfg.rope_factor, cfg.rope_original_length, length)
    freqs = theta ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    match cfg.rope_type:
        case "default" | "dynamic":
            return freqs, 1.0
        case "linear":
            return freqs / cfg.rope_factor, 1.0
        case "yarn":
            kept = 1 - _yarn_ramp(cfg, H, theta)
            return kept * freqs + (1 - kept) * freqs / cfg.rope_factor, float(cfg.rope_attention_factor)
        case "llama3":
            turns = cfg.rope_original_length * freqs / (2 * np.pi)  # of each pair within the original context
            low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return kept * freqs + (1 - kept) * freqs / cfg.rope_factor, 1.0
    raise ValueError(f"rope_type {cfg.rope_type!r} is unknown to the reference")


def _ntk_base(theta: float, head_dim: int, factor: float, original: int, length: int) -> float:
    """theta * (s L'/L - (s - 1))^(H/(H-2)), s = factor, L = original, L' = max(length, L); at L' = L it is theta."""
    stretch = factor * max(length, original) / original - (factor - 1)
    return theta * stretch ** (head_dim / (head_dim - 2))


def _yarn_ramp(cfg: Any, head_dim: int, theta: float) -> np.ndarray:
    """[H/2]: 0 for pairs that turn more than beta_fast times in the original context, 1 for fewer than beta_slow.

    The paper's ramp is linear in the number of turns; its code, and so every YaRN model, is linear in the index of the pair
    (jquesnelle/yarn; transformers modeling_rope_utils.py). With rope_truncate the ramp starts and ends at whole pairs.
    """

    def pair(turns: float) -> float:  # the i at which original * theta^(-2i/H) / 2 pi = turns
        return head_dim * np.log(cfg.rope_original_length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    first, last = pair(cfg.rope_beta_fast), pair(cfg.rope_beta_slow)
    if cfg.rope_truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, head_dim - 1.0)  # H - 1, though pairs end at H/2 - 1: as published
    if first == last:
        last += 0.001
    return np.clip((np.arange(head_dim // 2) - first) / (last - first), 0, 1)


def rotate(x: np.ndarray, positions: np.ndarray, freqs: np.ndarray, factor: float) -> np.ndarray:
    """Turns every pair by its angle: (x_2i + j x_2i+1) * factor * exp(j p f_i).

    Args:
        x: [T, N, H], q or k, pairs (2i, 2i+1).
        positions: [T] integers.
        freqs, factor: from `rope_frequencies`.

    Returns:
        [T, N, H], pairs as they were.
    """
    angles = np.asarray(positions, np.float64)[:, None] * freqs  # [T, H/2]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (factor * np.exp(1j * angles))[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q or k rows (first members of all pairs, then second ones) -> Meta's (pair after pair), head by head.

    Args:
        weight: [heads*H, ...]: the weight, a bias, or a LoRA B; heads is N for q and K for k.

    Returns:
        The same shape and dtype: Meta row 2i is HF row i, Meta row 2i+1 is HF row H/2 + i.
    """
    H = weight.shape[0] // heads
    rows = np.arange(heads * H).reshape(heads, H)
    meta = np.empty_like(rows)
    meta[:, 0::2] = rows[:, : H // 2]
    meta[:, 1::2] = rows[:, H // 2 :]
    return weight[meta.reshape(-1)]
