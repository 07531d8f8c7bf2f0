"""Where cuDNN is asked for: with which arguments, of which rows; XLA's form of the same function stands for it on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.attention import attend_causal
from llama_jax.ops.kernels import cudnn

T, N, K, H = 128, 4, 2, 64
attention = jax.nn.dot_product_attention


def draw(*heads: int, H: int = H, dtype=jnp.bfloat16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, T, n, H)), dtype) for n in heads]


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Takes the branch for CUDA, where there is one, and notes which implementation is asked for."""
    choose, implementations = jax.lax.platform_dependent, []

    def platform_dependent(*args, **branches):
        return branches["cuda"](*args) if "cuda" in branches else choose(*args, **branches)

    def by_xla(*args, implementation, **options):
        implementations.append(implementation)
        return attention(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return implementations


@pytest.mark.parametrize("width", [64, 80, 128])  # 80 is a width that flash has not
def test_it_is_attention_of_whole_sequences(asked, width):
    q, k, v = draw(N, K, K, H=width)
    ours = attend_causal(q, k, v, kernels="cudnn")
    assert asked == ["cudnn"] and ours.dtype == jnp.bfloat16
    wanted = attend_causal(*(x.astype(jnp.float32) for x in (q, k, v)), kernels=False)
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("kernels", "length", "dtype"), [(False, T, "bfloat16"), ("cudnn", T, "float32"), ("cudnn", T - 1, "bfloat16")]
)
def test_what_it_does_not_take_is_attended_to_without_it(asked, kernels, length, dtype):
    q, k, v = (x[:, :length] for x in draw(N, K, K, dtype=dtype))
    attend_causal(q, k, v, kernels=kernels)
    assert asked == []


def test_rows_of_segments_and_programs_that_did_not_try_it_have_flash(asked, monkeypatch):
    flashes = []

    def flash(q, k, v, segment_ids):
        flashes.append(segment_ids is not None)
        return q

    monkeypatch.setattr("llama_jax.ops.kernels.flash.attend_flash", flash)
    q, k, v = draw(N, K, K)
    attend_causal(q, k, v, jnp.ones((2, T), jnp.int32), kernels="cudnn")
    attend_causal(q, k, v, kernels=True)
    assert flashes == [True, False] and asked == []


def test_its_shapes_are_cudnn_s():
    """At most 128 wide before Hopper, a multiple of 8."""
    assert cudnn.supports(T, 64) and cudnn.supports(2 * T, 128) and cudnn.supports(T, 80)
    assert not cudnn.supports(T, 256) and not cudnn.supports(T, 60) and not cudnn.supports(T + 64, 64)
