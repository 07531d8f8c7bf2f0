"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), pairs as halves: (x[i], x[i + H/2]).

Meta's weights have interleaved pairs (x[2i], x[2i+1]); their q and k rows are permuted once on import.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.config import ModelConfig
from llama_jax.sharding import is_partitioned

# Positions below 2**20 and frequencies in fixed point: 32 bits of a turn, and 12 more that only sum up far away.
_MAX_POSITION_BITS = 20


def rope_angles(cfg: ModelConfig, positions: Array, length: Array | int) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, in float32 and exact at every position.

    position * frequency in float32 is off by 0.004 at position 100,000, which moves logits by 1e-2. Counted in turns of the
    circle in fixed point, whole turns overflow out of the integer and the rest is exact to 4e-7. (`dynamic` frequencies are
    computed on the device, in float32: there the angle is off by 2e-4 at position 4,096.)

    Args:
        positions: [B, T] int32, below 2**20.
        length: tokens the sequence will have, [B] or a number; only `dynamic` scaling reads it: one sequence has one base, so
            that a key in the cache and a later query agree.

    Returns:
        cos, sin: [B, T, H/2] float32, times the attention factor of YaRN.
    """
    if cfg.rope_type == "dynamic":
        freqs = _dynamic_frequencies(cfg, length)
        angles = positions[:, :, None].astype(jnp.float32) * (freqs[:, None, :] if freqs.ndim == 2 else freqs)
        return _once(positions, jnp.cos(angles), jnp.sin(angles))
    turns = _frequencies(cfg) / (2 * math.pi) % 1
    scaled = np.floor(np.ldexp(turns, 32))
    extra_bits = 32 - _MAX_POSITION_BITS
    extra = np.floor(np.ldexp(np.ldexp(turns, 32) - scaled, extra_bits))
    p = positions[:, :, None].astype(jnp.uint32)
    angle = p * scaled.astype(np.uint32) + ((p * extra.astype(np.uint32)) >> extra_bits)
    angles = jax.lax.bitcast_convert_type(angle, jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
    scale = cfg.rope_attention_factor if cfg.rope_type == "yarn" else 1.0
    return _once(positions, jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def _once(positions: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """The same, computed once: XLA:CPU would take the cosines anew in every rotation, for every head of every layer. It keeps
    what leaves a loop; this one runs once, which it does not know. (On a mesh devices would tell each other how often.)"""
    if is_partitioned():
        return cos, sin

    def looped(positions: Array, *angles: Array) -> tuple[Array, ...]:
        rounds = jnp.where(positions[0, 0] < 0, 0, 1)
        return jax.lax.fori_loop(0, rounds, lambda *_: angles, jax.tree.map(jnp.zeros_like, angles))

    return jax.lax.platform_dependent(positions, cos, sin, cpu=looped, default=lambda _, *angles: angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each pair (x[i], x[i + H/2]) by its angle, in float32.

    Args:
        x: [B, T, heads, H].
        cos, sin: [B, T, H/2].

    Returns:
        [B, T, heads, H] in x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(cfg: ModelConfig) -> np.ndarray:
    """[H/2] float64, radians per position, for every type whose frequencies do not depend on the length."""
    freqs = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    if cfg.rope_type == "linear":  # Chen et al. 2023, arXiv:2306.15595
        return freqs / cfg.rope_factor
    if cfg.rope_type == "llama3":
        return _llama3_frequencies(cfg, freqs)
    if cfg.rope_type == "yarn":
        return _yarn_frequencies(cfg, freqs)
    return freqs


def _llama3_frequencies(cfg: ModelConfig, freqs: np.ndarray) -> np.ndarray:
    """Slow pairs are stretched, fast pairs kept, those between blended (meta-llama/llama-models llama3/model.py)."""
    low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
    turns = cfg.rope_original_length * freqs / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * freqs / cfg.rope_factor + keep * freqs


def _yarn_frequencies(cfg: ModelConfig, freqs: np.ndarray) -> np.ndarray:
    """Pairs that turn more than beta_fast times in the original context are kept, fewer than beta_slow times stretched
    (Peng et al. 2023, arXiv:2309.00071, section 3.2; the ramp runs over pairs, as in the published code)."""
    half = cfg.head_dim // 2

    def pair_turning(rotations: float) -> float:
        return half * math.log(cfg.rope_original_length / (rotations * 2 * math.pi)) / math.log(cfg.rope_theta)

    first, last = pair_turning(cfg.rope_beta_fast), pair_turning(cfg.rope_beta_slow)
    if cfg.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, cfg.head_dim - 1)
    stretch = np.clip((np.arange(half) - first) / (last - first if last != first else 0.001), 0, 1)
    return freqs / cfg.rope_factor * stretch + freqs * (1 - stretch)


def _dynamic_frequencies(cfg: ModelConfig, length: Array | int) -> Array:
    """[B, H/2] or [H/2] float32: the base grows with the sequence (NTK-aware scaling; transformers modeling_rope_utils.py)."""
    original, factor, H = cfg.rope_original_length, cfg.rope_factor, cfg.head_dim
    stretch = factor * jnp.maximum(jnp.asarray(length, jnp.float32), original) / original - (factor - 1)
    base = cfg.rope_theta * stretch ** (H / (H - 2))
    return 1.0 / base[..., None] ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
