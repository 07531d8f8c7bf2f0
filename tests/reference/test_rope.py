"""Frequencies against published numbers, and what makes a rotary embedding one."""

from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.reference.rope import interleave, rope_frequencies, rotate

LLAMA3 = dict(rope_type="llama3", rope_original_length=8192, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_factor=16.0, rope_original_length=4096, rope_beta_fast=32.0, rope_beta_slow=1.0)
YARN |= dict(rope_truncate=True, rope_attention_factor=1.25)
DYNAMIC = dict(rope_type="dynamic", rope_factor=2.0, rope_original_length=4096)


def frequencies(head_dim: int, theta: float, length: int = 1, rope_type: str = "default", **fields) -> np.ndarray:
    cfg = SimpleNamespace(head_dim=head_dim, rope_theta=theta, rope_type=rope_type, **fields)
    return rope_frequencies(cfg, length)[0]


@pytest.mark.parametrize(
    "theta, published",
    [
        (1e4, {0: 1, 1: 0.865964, 2: 0.749894, 32: 1e-2, 63: 1.15478e-4}),
        (5e5, {0: 1, 1: 0.814617, 2: 0.663601, 32: 1.414213e-3, 63: 2.455141e-6}),
        (1e6, {0: 1, 1: 0.805842, 32: 1e-3, 63: 1.240938e-6}),
    ],
)
def test_default_frequencies(theta, published):
    np.testing.assert_allclose(frequencies(128, theta)[list(published)], list(published.values()), rtol=2e-6)


@pytest.mark.parametrize(
    "head_dim, factor, kept, interpolated",
    [
        (128, 8.0, 29, [2.166571e-3, 1.371894e-3, 8.567515e-4, 5.248460e-4, 3.126937e-4, 1.785078e-4]),
        (128, 32.0, 29, [2.118407e-3, 1.290548e-3, 7.625413e-4, 4.295567e-4, 2.227634e-4, 9.708286e-5]),
        (64, 32.0, 15, [1.290548e-3, 4.295567e-4, 9.708286e-5]),
    ],
)
def test_llama3_frequencies(head_dim, factor, kept, interpolated):
    scaled = frequencies(head_dim, 5e5, rope_factor=factor, **LLAMA3)
    plain = frequencies(head_dim, 5e5)
    last = kept + len(interpolated)
    np.testing.assert_array_equal(scaled[:kept], plain[:kept])
    np.testing.assert_allclose(scaled[kept:last], interpolated, rtol=1e-6)
    np.testing.assert_allclose(scaled[last:], plain[last:] / factor, rtol=1e-15)


@pytest.mark.parametrize(
    "truncate, published",  # transformers 5.23, _compute_yarn_parameters with torch.float bound to float64
    [
        (True, {20: 5.623413252e-02, 21: 4.694086000e-02, 33: 4.600435468e-03, 45: 1.517716047e-04, 46: 8.334508951e-05}),
        (False, {20: 5.623413252e-02, 21: 4.859150586e-02, 33: 4.595608542e-03, 45: 9.785687467e-05, 46: 8.334508951e-05}),
    ],
)
def test_yarn_frequencies(truncate, published):
    freqs = frequencies(128, 1e4, **YARN | dict(rope_truncate=truncate))
    np.testing.assert_allclose(freqs[list(published)], list(published.values()), rtol=1e-9)


@pytest.mark.parametrize(
    "theta, fields, published",  # as above, with a ramp that would start before the first pair, end late, or has no width
    [
        (1e4, dict(rope_original_length=64), [1, 5.3125e-02, 6.25e-04, 6.25e-05]),
        (100.0, dict(rope_original_length=65536, rope_beta_fast=3000.0), [1, 3.162277660e-01, 8.4375e-02, 2.174065891e-02]),
        (1e4, dict(rope_beta_fast=3.0, rope_beta_slow=3.0, rope_truncate=False), [1, 1e-1, 1e-2, 6.25e-05]),
    ],
)
def test_yarn_at_the_ends_of_its_ramp(theta, fields, published):
    np.testing.assert_allclose(frequencies(8, theta, **YARN | fields), published, rtol=1e-9)


def test_only_yarn_has_an_attention_factor():
    for fields, factor in (
        (YARN, 1.25),
        (DYNAMIC, 1.0),
        (LLAMA3 | dict(rope_factor=8.0), 1.0),
        (dict(rope_type="default"), 1.0),
    ):
        assert rope_frequencies(SimpleNamespace(head_dim=128, rope_theta=1e4, **fields), 1)[1] == factor


@pytest.mark.parametrize(
    "length, published",  # transformers 5.23, _compute_dynamic_ntk_parameters with torch.float bound to float64
    [
        (4096, {1: 8.659643234e-01, 32: 1e-2, 63: 1.154781985e-04}),
        (8192, {1: 8.509942913e-01, 32: 5.723381508e-03, 63: 3.849273282e-05}),
        (16384, {1: 8.396257426e-01, 32: 3.721721340e-03, 63: 1.649688550e-05}),
    ],
)
def test_dynamic_frequencies(length, published):
    np.testing.assert_allclose(frequencies(128, 1e4, length, **DYNAMIC)[list(published)], list(published.values()), rtol=1e-9)


def test_dynamic_leaves_short_sequences_alone():
    np.testing.assert_array_equal(frequencies(128, 1e4, 5, **DYNAMIC), frequencies(128, 1e4))


def test_linear_scaling_is_scaling_of_positions():
    x = np.random.default_rng(0).normal(size=(3, 2, 8))
    stretched = rotate(x, np.array([0, 4, 400]), frequencies(8, 1e4, rope_type="linear", rope_factor=4.0), 1.0)
    np.testing.assert_allclose(stretched, rotate(x, np.array([0, 1, 100]), frequencies(8, 1e4), 1.0), rtol=0, atol=1e-13)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="longrope"):
        frequencies(8, 1e4, rope_type="longrope")


def test_a_pair_of_neighbours_turns_by_its_angle():
    turned = rotate(np.array([[[1.0, 0.0, 0.0, 2.0]]]), np.array([3]), np.array([0.5, 0.1]), 1.25)
    expected = 1.25 * np.array([np.cos(1.5), np.sin(1.5), -2 * np.sin(0.3), 2 * np.cos(0.3)])
    np.testing.assert_allclose(turned[0, 0], expected, rtol=1e-15)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 3, 16))
    freqs = frequencies(16, 5e5, rope_factor=8.0, **LLAMA3)

    def score(q_position: int, k_position: int) -> np.ndarray:
        turned = (rotate(a, np.array([p]), freqs, 1.0) for a, p in ((q, q_position), (k, k_position)))
        return np.einsum("TNH,TNH->N", *turned)

    np.testing.assert_allclose(score(100_007, 99_000), score(1_007, 0), rtol=0, atol=1e-9)
    assert np.abs(score(1_007, 0) - score(1_008, 0)).max() > 1e-2


def test_rotation_keeps_lengths():
    x = np.random.default_rng(2).normal(size=(5, 3, 16))
    turned = rotate(x, np.arange(5) * 1000, frequencies(16, 1e4), 2.0)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), 2 * np.linalg.norm(x, axis=-1), rtol=1e-13)


def test_interleave_undoes_the_permutation_of_meta_to_huggingface():
    """The permutation: [heads, H/2, 2, D] with axes 1 and 2 swapped (convert_llama_weights_to_hf.py)."""
    heads, H, D = 3, 8, 5
    meta = np.random.default_rng(3).normal(size=(heads * H, D))
    hf = meta.reshape(heads, H // 2, 2, D).swapaxes(1, 2).reshape(heads * H, D)
    np.testing.assert_array_equal(interleave(hf, heads), meta)
    np.testing.assert_array_equal(interleave(np.arange(8), 1), [0, 4, 1, 5, 2, 6, 3, 7])


def test_both_conventions_give_the_same_scores():
    """Rows in halves, rotated as (i, i + H/2), against the same rows interleaved and rotated as (2i, 2i+1)."""
    rng = np.random.default_rng(4)
    H, D, positions, freqs = 12, 7, np.arange(6) * 31, frequencies(12, 1e4)
    x, wq, wk = rng.normal(size=(6, D)), rng.normal(size=(H, D)), rng.normal(size=(H, D))

    def rotate_halves(y: np.ndarray) -> np.ndarray:
        a, b, angles = y[:, : H // 2], y[:, H // 2 :], positions[:, None] * freqs
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=1)

    halves = [rotate_halves(x @ w.T) for w in (wq, wk)]
    pairs = [rotate((x @ interleave(w, 1).T)[:, None], positions, freqs, 1.0)[:, 0] for w in (wq, wk)]
    np.testing.assert_allclose(pairs[0] @ pairs[1].T, halves[0] @ halves[1].T, rtol=0, atol=1e-12)
