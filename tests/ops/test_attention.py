"""Attention against the reference, and against its own other forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops.attention import attend, attend_causal, multiplies_cache
from llama_jax.ops.kernels import flash, splash
from llama_jax.ops.qarray import QVectors, quantize_vectors
from llama_jax.reference.llama import attention as reference
from tests.make_mesh import equations, mesh_of, without_rematerialisation

compiled = jax.jit(attend)
compiled_causal = jax.jit(attend_causal)
HEADS = {"grouped": (6, 2), "one per head": (4, 4), "one for all": (4, 1)}  # N, K


def draw(seed: int, B: int, T: int, N: int, K: int, H: int = 10, dtype=np.float32):
    """q [B, T, N, H] and k, v [B, T, K, H], as the reference takes them; scores of about 2."""
    rng = np.random.default_rng(seed)
    return tuple((scale * rng.normal(size=(B, T, heads, H))).astype(dtype) for heads, scale in ((N, 1.5), (K, 1.5), (K, 1)))


def causal(B: int, T: int) -> np.ndarray:
    return np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.stack([reference(*row) for row in zip(*(a.astype(np.float64) for a in (q, k, v)), strict=True)])


def ours(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, compute=compiled) -> np.ndarray:
    return np.asarray(compute(*(jnp.asarray(a) for a in (q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask))))


@given(st.integers(0, 2**32), st.sampled_from(list(HEADS)))
def test_causal_attention_is_the_reference(seed, heads):
    q, k, v = draw(seed, 2, 7, *HEADS[heads])
    np.testing.assert_allclose(ours(q, k, v, causal(2, 7)), expected(q, k, v), rtol=0, atol=1e-5)


@given(st.integers(0, 2**32), st.sampled_from(list(HEADS)), st.lists(st.integers(0, 9), min_size=2, max_size=2))
def test_queries_of_a_cache_see_their_own_past_only(seed, heads, starts):
    """The last T = 3 tokens of each row as queries over S = 16 slots, of which the rest holds leftovers of another sequence."""
    q, k, v = draw(seed, 2, 16, *HEADS[heads])
    positions = np.asarray(starts)[:, None] + np.arange(3)
    k, v = k.copy(), v.copy()
    for b, start in enumerate(starts):
        k[b, start + 3 :], v[b, start + 3 :] = 50.0, 1e6
    queries = np.take_along_axis(q, positions[:, :, None, None], axis=1)
    out = ours(queries, k, v, np.arange(16) <= positions[:, :, None])
    wanted = np.take_along_axis(expected(q, k, v), positions[:, :, None, None], axis=1)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


def test_query_heads_share_keys_in_consecutive_groups():
    q, k, v = draw(1, 1, 5, 6, 2)
    shared = [0, 0, 0, 1, 1, 1]
    whole = ours(q, k[:, :, shared], v[:, :, shared], causal(1, 5))
    np.testing.assert_allclose(ours(q, k, v, causal(1, 5)), whole, rtol=0, atol=1e-6)


def test_a_row_that_may_look_nowhere_is_finite_and_the_others_do_not_notice():
    q, k, v = draw(2, 2, 5, 6, 2)
    mask = causal(2, 5).copy()
    mask[0, 2] = False
    out, whole = ours(q, k, v, mask), ours(q, k, v, causal(2, 5))
    np.testing.assert_allclose(out[0, 2], v[0].mean(axis=0).repeat(3, axis=0), rtol=0, atol=1e-6)
    others = np.arange(10).reshape(2, 5) != 2
    np.testing.assert_array_equal(out[others], whole[others])


def test_the_gradient_of_a_row_that_may_look_nowhere_is_finite():
    q, k, v = (jnp.asarray(a) for a in draw(3, 1, 4, 2, 1))
    mask = jnp.zeros((1, 4, 4), bool)
    grad = jax.jit(jax.grad(lambda *a: attend(*a, mask).sum(), argnums=(0, 1, 2)))
    grads = grad(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    assert all(np.isfinite(grad).all() for grad in grads)


def test_large_scores_do_not_overflow():
    q, k, v = draw(4, 1, 4, 2, 1)
    assert np.isfinite(ours(1e4 * q, 1e4 * k, v, causal(1, 4))).all()


def rounded(x: np.ndarray) -> tuple[QVectors, np.ndarray]:
    """Keys or values [B, S, K, H] in int8, [B, K, S, H], and the float64 numbers, [B, S, K, H], that they stand for."""
    found = quantize_vectors(jnp.asarray(x.swapaxes(1, 2)))
    return found, (np.asarray(found.value, np.float64) * np.asarray(found.scale, np.float64)[..., None]).swapaxes(1, 2)


@given(st.integers(0, 2**32), st.sampled_from(list(HEADS)))
def test_keys_and_values_in_int8_are_the_floats_they_stand_for(seed, heads):
    q, k, v = draw(seed, 2, 7, *HEADS[heads])
    v *= 10.0 ** np.random.default_rng(seed).integers(-3, 1, (2, 7, v.shape[2], 1))  # no two scales alike
    (k8, k), (v8, v) = rounded(k), rounded(v)
    np.testing.assert_allclose(compiled(q, k8, v8, causal(2, 7)), expected(q, k, v), rtol=0, atol=1e-5)


@given(st.integers(0, 2**32), st.sampled_from(list(HEADS)))
def test_rounding_keys_and_values_moves_attention_no_further_than_it_may(seed, heads):
    """A score moves by e <= |q|_1 s / 2 sqrt(H), s the largest scale; so a probability by a factor of at most exp(2 e)."""
    q, k, v = draw(seed, 2, 9, *HEADS[heads])
    (k8, _), (v8, _) = rounded(k), rounded(v)
    moved = np.abs(ours(q, k, v, causal(2, 9)) - np.asarray(compiled(q, k8, v8, causal(2, 9)))).max(axis=-1)
    e = np.abs(q).sum(axis=-1) * float(k8.scale.max()) / 2 * q.shape[-1] ** -0.5
    assert np.all(moved <= np.expm1(2 * e) * np.abs(v).max() + float(v8.scale.max()) / 2 + 1e-5)
    assert moved.max() > 1e-4


@pytest.mark.parametrize("precision", ["highest", "default"])
@pytest.mark.parametrize("B, T, G", list(itertools.product((1, 2), repeat=3)))
def test_int8_in_bfloat16_runs_and_is_close_at_every_small_shape(B, T, G, precision):
    q, k, v = draw(5, B, T, 2 * G, 2, dtype=ml_dtypes.bfloat16)
    (k8, k), (v8, v) = rounded(k), rounded(v)
    with jax.default_matmul_precision(precision):
        out = jax.jit(attend)(q, k8, v8, causal(B, T))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), expected(q, k, v), rtol=0, atol=0.03)


def test_float16_keeps_small_values_in_int8():
    """4,096 values of about 0.01, none of which weighs much: a probability times a scale would be less than float16 holds."""
    q, k, v = draw(6, 1, 4096, 2, 1)
    q, k, v = (0.1 * q[:, -1:]).astype(np.float16), k.astype(np.float16), (0.01 + 0.001 * v).astype(np.float16)
    (k8, k), (v8, v) = rounded(k), rounded(v)
    out = np.asarray(compiled(q, k8, v8, np.ones((1, 1, 4096), bool)), np.float64)
    scores = np.einsum("nh,sh->ns", q[0, 0].astype(np.float64), k[0, :, 0]) * 10**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(out[0, 0], weights @ v[0, :, 0] / weights.sum(axis=-1, keepdims=True), rtol=3e-3)


def test_scales_never_multiply_keys_or_values_in_memory():
    q, k, v = draw(7, 2, 16, 6, 2)
    (k8, _), (v8, _) = rounded(k), rounded(v)
    made = equations(attend, jnp.asarray(q, jnp.bfloat16), k8, v8, causal(2, 16))
    large = [e.primitive.name for e in made if any(x.aval.size == k8.value.size for x in e.outvars)]
    assert set(large) <= {"convert_element_type", "platform_index"} and len(large) == 2


def check_bfloat16(B: int, T: int, G: int, compute) -> None:
    q, k, v = draw(5, B, T, 2 * G, 2, dtype=ml_dtypes.bfloat16)
    out = ours(q, k, v, causal(B, T), compute)
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), expected(q, k, v), rtol=0, atol=0.03)


@pytest.mark.parametrize("precision", ["highest", "default"])  # the tests' own, and what users run
@pytest.mark.parametrize("B, T, G", list(itertools.product((1, 2), repeat=3)))
def test_bfloat16_runs_and_is_close_at_every_small_shape(B, T, G, precision):
    """XLA:CPU lacks bfloat16 kernels for some layouts of small products, and says so only when it runs them."""
    with jax.default_matmul_precision(precision):
        check_bfloat16(B, T, G, jax.jit(attend))


@pytest.mark.parametrize("B, T, G", [(1, 1, 2), (2, 2, 2)])
def test_bfloat16_runs_op_by_op(B, T, G):
    with jax.default_matmul_precision("default"):
        check_bfloat16(B, T, G, attend)


def test_scores_of_bfloat16_are_float32():
    """Two keys whose scores, 64 and 64.25, are one number in bfloat16."""
    q = jnp.full((1, 1, 1, 4), 8.0, jnp.bfloat16)
    k = jnp.asarray([[[[4.0, 4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0625]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0] * 4, [1.0] * 4]]], jnp.bfloat16)
    weight = 1 / (1 + np.exp(-0.25))
    np.testing.assert_allclose(compiled(q, k, v, jnp.ones((1, 1, 2), bool)).astype(jnp.float32), weight, rtol=0, atol=0.003)


@pytest.mark.parametrize("shape", [(2, 16, 2, 2, 6), (1, 16, 4, 2, 64)])
def test_bfloat16_gradients_run_in_a_scan(shape):
    """As in a layer of a training step that keeps everything: keys and values come out of stacked arrays."""
    B, T, N, K, H = shape
    q, k, v = (jnp.asarray(a) for a in draw(5, B, T, N, K, H, dtype=ml_dtypes.bfloat16))

    def layer(k, v, q, _):
        scale = q[:, :, :1]
        return attend_causal(q, k * scale, v * scale), None

    def total(q, k, v):
        return jnp.sum(jax.lax.scan(functools.partial(layer, k, v), q, None, length=2)[0].astype(jnp.float32))

    for grad in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v):
        assert np.isfinite(grad.astype(jnp.float32)).all()


# attend_causal

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [5, 5, 4, 4, 4, 4, 4, 4, 4]], np.int32)  # numbers in any order; 0 is one, too


@given(st.integers(0, 2**32), st.sampled_from(list(HEADS)))
def test_attention_of_whole_sequences_is_the_reference(seed, heads):
    q, k, v = draw(seed, 2, 9, *HEADS[heads])
    np.testing.assert_allclose(compiled_causal(q, k, v), expected(q, k, v), rtol=0, atol=1e-5)


@given(st.integers(0, 2**32), st.sampled_from(list(HEADS)))
def test_a_segment_of_a_row_is_what_it_is_alone(seed, heads):
    q, k, v = draw(seed, 2, 9, *HEADS[heads])
    out = np.asarray(compiled_causal(q, k, v, SEGMENTS))
    for b, row in enumerate(SEGMENTS):
        for segment in set(row.tolist()):
            own = np.flatnonzero(row == segment)
            alone = expected(*(a[b : b + 1, own] for a in (q, k, v)))[0]
            np.testing.assert_allclose(out[b, own], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("T", [128, 129, 300, 1100], ids=["one block", "one more", "three", "as many as there may be"])
def test_blocks_of_queries_are_one_sequence(T):
    """Its gradients, too; segments that begin and end inside blocks."""
    q, k, v = draw(8, 2, T, 6, 2)
    np.testing.assert_allclose(compiled_causal(q, k, v), expected(q, k, v), rtol=0, atol=1e-5)
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, T)), axis=1)
    mask = np.tri(T, dtype=bool) & (ids[:, :, None] == ids[:, None])

    def whole(q, k, v):
        return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))(q, k, v)

    np.testing.assert_allclose(compiled_causal(q, k, v, ids), jax.jit(whole)(q, k, v), rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(lambda *a: attend_causal(*a, ids)), gradients(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_scores_that_no_query_may_see_are_not_made():
    T = 1024
    q, k, v = draw(9, 1, T, 4, 4)
    whole = jax.jit(lambda q, k, v: attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), causal(1, T)))
    ours, theirs = (f.lower(q, k, v).compile().memory_analysis() for f in (compiled_causal, whole))
    assert ours.temp_size_in_bytes < 0.6 * theirs.temp_size_in_bytes


def test_one_segment_is_a_whole_sequence():
    q, k, v = draw(6, 2, 9, 6, 2)
    one = np.full((2, 9), 3, np.int32)
    np.testing.assert_allclose(compiled_causal(q, k, v, one), compiled_causal(q, k, v), rtol=0, atol=1e-6)


def test_no_gradient_crosses_segments_or_comes_from_what_is_later():
    """That of one query's output: 0 for every key and value but those of its segment up to it."""
    q, k, v = draw(7, 2, 9, 6, 2)
    grad = jax.jit(jax.grad(lambda *a: jnp.sum(attend_causal(*a, SEGMENTS)[0, 5] ** 2), argnums=(1, 2)))
    for gradient in grad(q, k, v):
        reached = np.any(np.asarray(gradient) != 0, axis=(2, 3))
        assert np.flatnonzero(reached[0]).tolist() == [3, 4, 5]
        assert not reached[1].any()


@pytest.mark.parametrize("T, H", [(9, 10), (128, 64)], ids=["of any shape", "that TPUs have a kernel for"])
@pytest.mark.parametrize("name", ["8x1x1", "1x1x8", "2x2x2"])
def test_attention_of_whole_sequences_is_the_same_on_every_mesh(name, T, H):
    """Its gradients, too; a kernel for TPUs (which takes bfloat16) does not run here, but it is in what is partitioned."""
    exact = not splash.supports(T, H)
    q, k, v = draw(8, 8, T, 16, 8, H, dtype=np.float32 if exact else ml_dtypes.bfloat16)
    segments = np.sort(np.random.default_rng(9).integers(0, 3, (8, T))).astype(np.int32)

    def both(q, k, v):
        out, pull = jax.vjp(lambda *a: attend_causal(*a, segments), q, k, v)
        return out, *pull(out)

    alone = jax.jit(both)(q, k, v)
    with jax.set_mesh(mesh_of(name)), without_rematerialisation():
        spread = jax.jit(both)(q, k, v)
    for ours, wanted in zip(spread, alone, strict=True):
        ours, wanted = (np.asarray(a, np.float32) for a in (ours, wanted))
        np.testing.assert_allclose(ours, wanted, rtol=0 if exact else 2**-7, atol=1e-5 if exact else 0.03)


def test_a_kernel_for_another_platform_costs_no_memory_here(monkeypatch):
    """What it keeps for the backward pass of a rematerialised layer would be zeros on a CPU, in every step of a scan."""
    x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    def layer(q, k, v):
        return attend_causal(jnp.sin(q), k, v)

    def layers(q, k, v):
        return jnp.sum(jax.lax.scan(lambda q, _: (layer(q, k, v), None), q, None, length=4)[0].astype(jnp.float32))

    def temporary_bytes() -> int:
        program = jax.jit(lambda *a: jax.grad(layers, argnums=(0, 1, 2))(*a))
        return program.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    chosen = temporary_bytes()
    for kernel in (splash, flash):
        assert kernel.supports(*x.shape[1::2])
        monkeypatch.setattr(kernel, "supports", lambda *_: False)
    assert chosen <= temporary_bytes()


def test_kernels_multiply_no_int8_cache_in_float16():
    """A probability times a small scale is nothing in float16."""
    q, cache = jnp.ones((1, 1, 2, 64)), quantize_vectors(jnp.ones((1, 2, 128, 64)))
    assert multiplies_cache(q.astype(jnp.bfloat16), cache) and not multiplies_cache(q.astype(jnp.float16), cache)
    assert multiplies_cache(q.astype(jnp.float16), cache.value.astype(jnp.float16))
    assert not multiplies_cache(q, cache) and not multiplies_cache(q, cache.value.astype(jnp.float32))
