"""Rotary embedding: angles against float64, rotation against the reference's other convention."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import PRESETS, ModelConfig
from llama_jax.ops.rope import rope_angles, rotate
from llama_jax.reference.rope import interleave, rope_frequencies
from llama_jax.reference.rope import rotate as rotate_reference

TINY, LLAMA2, LLAMA3 = PRESETS["tiny"], PRESETS["llama2_7b"], PRESETS["llama3_1_8b"]
YARN = dict(rope_type="yarn", rope_factor=16.0, rope_original_length=4096, rope_attention_factor=1.2772588722239781)
CONFIGS = {
    "tiny": TINY,
    "llama2": LLAMA2,
    "codellama": PRESETS["codellama_7b"],
    "llama3": PRESETS["llama3_8b"],
    "llama3_1": LLAMA3,
    "llama3_2_1b": PRESETS["llama3_2_1b"],
    "linear": dataclasses.replace(LLAMA2, rope_type="linear", rope_factor=4.0),
    "yarn": dataclasses.replace(LLAMA2, **YARN),
    "yarn, exact range": dataclasses.replace(TINY, **YARN | dict(rope_truncate=False, rope_beta_fast=4.0, rope_beta_slow=0.5)),
}
DYNAMIC = dataclasses.replace(LLAMA2, rope_type="dynamic", rope_factor=2.0, rope_original_length=64)
LAST = 2**20 - 1

angles_of = jax.jit(rope_angles, static_argnums=0)


def float64_angles(cfg: ModelConfig, positions: np.ndarray, length: int = 1) -> tuple[np.ndarray, np.ndarray]:
    freqs, factor = rope_frequencies(cfg, length)
    angles = positions.astype(np.float64)[..., None] * freqs
    return factor * np.cos(angles), factor * np.sin(angles)


def check_angles(cfg: ModelConfig, positions: np.ndarray, atol: float, length: int = 1) -> None:
    for ours, exact in zip(angles_of(cfg, positions, length), float64_angles(cfg, positions, length), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
def test_angles_are_exact_at_every_position(name):
    rng = np.random.default_rng(0)
    positions = np.concatenate([np.arange(256), 2 ** np.arange(20), [LAST - 1, LAST], rng.integers(0, LAST, size=1000)])
    check_angles(CONFIGS[name], positions[None].astype(np.int32), atol=1e-6 * CONFIGS[name].rope_attention_factor)


@given(st.lists(st.integers(0, LAST), min_size=8, max_size=8), st.sampled_from(list(CONFIGS)))
def test_angles_are_exact_at_any_position(positions, name):
    positions = np.asarray(positions, np.int32).reshape(2, 4)
    check_angles(CONFIGS[name], positions, atol=1e-6 * CONFIGS[name].rope_attention_factor)


@pytest.mark.parametrize("factor", [0.5, 0.2, 0.1])
def test_angles_are_exact_where_a_factor_below_1_makes_a_pair_turn_faster(factor):
    cfg = dataclasses.replace(LLAMA2, rope_type="linear", rope_factor=factor)
    check_angles(cfg, np.arange(100, dtype=np.int32)[None], atol=1e-6)


def test_the_scaled_frequencies_of_llama_3_1_and_3_2_are_the_published_ones():
    def frequencies(name: str) -> np.ndarray:  # from the angle of one position
        cos, sin = angles_of(PRESETS[name], np.ones((1, 1), np.int32), 1)
        return np.arctan2(np.asarray(sin, np.float64), cos)[0, 0]

    eight = [2.166571e-3, 1.371894e-3, 8.567515e-4, 5.248460e-4, 3.126937e-4, 1.785078e-4]
    np.testing.assert_allclose(frequencies("llama3_1_8b")[29:35], eight, rtol=1e-5)
    np.testing.assert_allclose(frequencies("llama3_2_1b")[15:18], [1.290548e-3, 4.295567e-4, 9.708286e-5], rtol=2e-5)


@pytest.mark.parametrize("length", [1, 64, 65, 100, 1000])
def test_angles_of_dynamic_scaling_follow_the_length_of_the_sequence(length):
    check_angles(DYNAMIC, np.arange(min(length, 128), dtype=np.int32)[None], atol=1e-4, length=length)


def test_every_row_of_dynamic_scaling_has_its_own_length():
    positions = np.broadcast_to(np.arange(60, dtype=np.int32), (3, 60))
    together = angles_of(DYNAMIC, positions, jnp.asarray([60, 200, 130]))
    for b, length in enumerate([60, 200, 130]):
        alone = angles_of(DYNAMIC, positions[:1], length)
        for a, b_alone in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[b], b_alone[0], rtol=0, atol=1e-6)


def test_dynamic_scaling_changes_nothing_up_to_the_old_context():
    positions = np.arange(64, dtype=np.int32)[None]
    plain = dataclasses.replace(DYNAMIC, rope_type="default")
    for length in (1, 64):
        for ours, exact in zip(angles_of(DYNAMIC, positions, length), float64_angles(plain, positions), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


def draw(seed: int, T: int = 6, heads: int = 3, H: int = 10) -> np.ndarray:
    """[1, T, heads, H], pairs as halves."""
    return np.random.default_rng(seed).normal(size=(1, T, heads, H)).astype(np.float32)


def as_pairs(x: np.ndarray) -> np.ndarray:
    """[T, heads, H] in halves -> in Meta's order, through the permutation that weights go through."""
    return np.stack([interleave(row.reshape(-1), row.shape[0]).reshape(row.shape) for row in x])


@given(st.integers(0, 2**32), st.integers(0, LAST - 6), st.sampled_from(["tiny", "yarn, exact range"]))
def test_rotating_halves_is_rotating_pairs_of_neighbours(seed, start, name):
    cfg, x, positions = CONFIGS[name], draw(seed), start + np.arange(6, dtype=np.int32)
    ours = rotate(x, *angles_of(cfg, positions[None], 1))
    exact = rotate_reference(as_pairs(x[0].astype(np.float64)), positions, *rope_frequencies(cfg, 1))
    np.testing.assert_allclose(as_pairs(np.asarray(ours)[0]), exact, rtol=0, atol=1e-5)


@given(st.integers(0, 2**32), st.integers(0, 2**19), st.integers(0, 2**18), st.integers(0, 2**18))
def test_scores_depend_on_the_distance_only(seed, near, distance, shift):
    q, k = draw(seed, 1, 1), draw(seed + 1, 1, 1)

    def score(at_q: int, at_k: int) -> float:
        places = [angles_of(TINY, np.full((1, 1), at, np.int32), 1) for at in (at_q, at_k)]
        return float(jnp.sum(rotate(q, *places[0]) * rotate(k, *places[1])))

    assert score(near + distance + shift, near + shift) == pytest.approx(score(near + distance, near), rel=0, abs=2e-5)


def test_position_0_rotates_nothing():
    x = draw(1)
    np.testing.assert_array_equal(rotate(x, *angles_of(TINY, np.zeros((1, 6), np.int32), 1)), x)


@pytest.mark.parametrize("start", [0, 8000, 131000])
def test_bfloat16_is_rotated_in_float32_and_rounded_once(start):
    """Above 256 a bfloat16 cannot hold the position, and a bfloat16 cosine has two digits."""
    x, positions = draw(2).astype(ml_dtypes.bfloat16), start + np.arange(6, dtype=np.int32)
    ours = rotate(jnp.asarray(x), *angles_of(TINY, positions[None], 1))
    assert ours.dtype == jnp.bfloat16
    exact = rotate_reference(as_pairs(x[0].astype(np.float64)), positions, *rope_frequencies(TINY, 1))
    rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float64)
    ours = as_pairs(np.asarray(ours)[0].astype(np.float64))
    np.testing.assert_allclose(ours, rounded, rtol=2**-7, atol=1e-5)
    assert np.mean(ours != rounded) < 0.02
