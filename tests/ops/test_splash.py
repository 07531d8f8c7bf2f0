"""The TPU's attention kernel, interpreted on the CPU, against attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels.splash import attend_splash, supports
from tests.make_mesh import equations

SHAPES = {  # T, N, K, H
    "one block": (128, 4, 2, 64),
    "wide heads, one for all": (256, 2, 1, 128),
    "three blocks": (384, 3, 3, 64),
}
interpreted = functools.partial(attend_splash, interpret=True)
kernel, plain = jax.jit(interpreted), jax.jit(attend_causal)


def draw(T: int, N: int, K: int, H: int, dtype=np.float32) -> tuple[np.ndarray, ...]:
    """q, k, v with scores of about 2, and segments whose borders lie inside blocks."""
    rng = np.random.default_rng(0)
    size = (2.0 / H**0.5) ** 0.5 * H**0.25  # of q and k, for scores q k / sqrt(H)
    q, k, v = (s * rng.normal(size=(2, T, heads, H)) for s, heads in ((size, N), (size, K), (1.0, K)))
    segments = np.stack([np.repeat([1, 2, 3], [50, 1, T - 51]), np.repeat([7, 0], [T - 7, 7])]).astype(np.int32)
    return *(a.astype(dtype) for a in (q, k, v)), segments


@pytest.mark.parametrize(
    "shape, packed",
    [("one block", False), ("wide heads, one for all", True), ("three blocks", False), ("three blocks", True)],
)
def test_the_kernel_is_attention(shape, packed):
    q, k, v, segments = draw(*SHAPES[shape])
    segments = segments if packed else None
    np.testing.assert_allclose(kernel(q, k, v, segments), plain(q, k, v, segments), rtol=0, atol=1e-5)


def test_the_kernel_s_gradients_are_those_of_attention():
    q, k, v, segments = draw(*SHAPES["one block"])
    dy = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a, segments) * dy), argnums=(0, 1, 2)))(q, k, v)

    for ours, wanted in zip(gradients(interpreted), gradients(attend_causal), strict=True):
        assert np.abs(wanted).max() > 1
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


def test_the_kernel_takes_bfloat16_and_gives_it_back():
    q, k, v, segments = draw(*SHAPES["one block"], dtype=ml_dtypes.bfloat16)
    out = kernel(q, k, v, segments)
    assert out.dtype == jnp.bfloat16
    exact = plain(*(a.astype(np.float32) for a in (q, k, v)), segments)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0, atol=0.03)


def test_what_the_kernel_keeps_for_the_backward_pass_has_a_name():
    """By which a rematerialised layer may save it: the kernel then does not run again."""
    q, k, v, _ = draw(*SHAPES["one block"])

    def kernels(policy) -> int:
        layer = jax.checkpoint(lambda q: jnp.tanh(interpreted(jnp.sin(q), k, v, None)), policy=policy)
        gradient = jax.grad(lambda q: jnp.sum(layer(q)))
        return sum(equation.primitive.name == "pallas_call" for equation in equations(gradient, q))

    assert kernels(jax.checkpoint_policies.nothing_saveable) == 4  # forward, again, and two gradients
    assert kernels(jax.checkpoint_policies.save_only_these_names("attention")) == 3


@pytest.mark.parametrize(
    "length, head_dim, does",
    [(128, 64, True), (4096, 128, True), (384, 192, True), (64, 128, False), (200, 128, False), (128, 48, False)],
)
def test_the_kernel_takes_whole_blocks_only(length, head_dim, does):
    assert supports(length, head_dim) == does


def test_the_kernel_multiplies_at_the_precision_that_tpus_have_whatever_the_user_set():
    """XLA:TPU refuses to compile it for bfloat16 at another, its gradients, too."""
    q, k, v, segments = draw(*SHAPES["one block"], dtype=ml_dtypes.bfloat16)
    gradients = jax.grad(lambda *a: jnp.sum(interpreted(*a, segments).astype(jnp.float32)), argnums=(0, 1, 2))
    with jax.default_matmul_precision("highest"):
        program = str(jax.make_jaxpr(gradients)(q, k, v))
    assert program.count("pallas_call[") == 3 and program.count("dot_general[") >= 9
    assert "HIGHEST" not in program
