"""Cross-entropy against float64, whatever the chunks and the mesh; and the logits it never holds."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ops import loss
from llama_jax.ops.loss import cross_entropy
from tests.make_mesh import MESHES, mesh_of, on, products, without_rematerialisation

B, T, D, V, PADDED = 8, 7, 48, 321, 328  # 56 tokens


def draw(seed: int = 0, rows: int = V, dtype=np.float32) -> tuple[np.ndarray, ...]:
    """x, head (its padding large, to be noticed), targets and weights, of which a fifth are 0; logits of about 2."""
    rng = np.random.default_rng(seed)
    x, head = rng.normal(size=(B, T, D)), 2 * D**-0.5 * rng.normal(size=(rows, D))
    head[V:] *= 10
    weights = rng.uniform(0.5, 2, size=(B, T)) * (rng.random((B, T)) > 0.2) / (B * T)
    return x.astype(dtype), head.astype(np.float32), rng.integers(0, V, (B, T)).astype(np.int32), weights.astype(np.float32)


def expected(x, head, targets, weights, z_loss: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, and gradients of x and of head, in float64."""
    x, rows, weights = x.astype(np.float64), head[:V].astype(np.float64), weights.astype(np.float64)[..., None]
    logits = x @ rows.T
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    total = exps.sum(-1, keepdims=True)
    log_z = logits.max(-1, keepdims=True) + np.log(total)
    is_target = np.arange(V) == targets[..., None]
    target = (logits * is_target).sum(-1, keepdims=True)
    dlogits = weights * (exps / total * (1 + 2 * z_loss * log_z) - is_target)
    dhead = np.zeros(head.shape)
    dhead[:V] = np.einsum("btv,btd->vd", dlogits, x)
    return float((weights * (log_z - target + z_loss * log_z**2)).sum()), dlogits @ rows, dhead


def ours(x, head, targets, weights, z_loss: float = 0.0, mesh=None, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """Loss, and gradients of x and of head, of `scale` times the loss; traced anew on every call."""

    def scaled(x, head):
        return scale * cross_entropy(x, head, targets, weights, V, z_loss)[0]

    with on(mesh):
        value, gradients = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(x, head)
    return tuple(np.asarray(a) for a in (value, *gradients))


def assert_close(found: tuple, wanted: tuple, atol: float = 1e-6) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol)


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", tokens * rows * 4)


@pytest.mark.parametrize("tokens", [56, 10], ids=["one chunk", "six chunks, the last not full"])
@pytest.mark.parametrize("rows", [V, PADDED])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_the_loss_and_its_gradients_are_those_of_float64(monkeypatch, z_loss, rows, tokens):
    in_chunks(monkeypatch, tokens, rows)
    arrays = draw(rows=rows)
    wanted = expected(*arrays, z_loss)
    assert_close(ours(*arrays, z_loss), wanted)
    assert np.abs(wanted[1]).max() > 0.01 and np.abs(wanted[2]).max() > 0.01
    assert wanted[0] - expected(*arrays, 0.0)[0] >= 10 * z_loss  # it is no small part of the loss


def test_a_padded_row_of_the_head_has_no_gradient():
    arrays = draw(rows=PADDED)
    _, _, dhead = ours(*arrays, 0.05)
    np.testing.assert_array_equal(dhead[V:], 0)
    assert np.all(np.any(dhead[:V] != 0, axis=1))


compiled = jax.jit(lambda *arrays: cross_entropy(*arrays, V, 0.01))


@given(st.integers(0, 2**32))
def test_without_a_gradient_the_loss_is_the_same(seed):
    arrays = draw(seed)
    value, unpenalised = compiled(*arrays)
    assert value.dtype == unpenalised.dtype == jnp.float32 and value.shape == unpenalised.shape == ()
    np.testing.assert_allclose(value, expected(*arrays, 0.01)[0], rtol=1e-6)
    np.testing.assert_allclose(unpenalised, expected(*arrays, 0.0)[0], rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 28, 55, 1000])
def test_chunks_of_any_size_change_nothing(monkeypatch, tokens):
    arrays = draw()
    whole = ours(*arrays, 0.01)
    in_chunks(monkeypatch, tokens, V)
    assert_close(ours(*arrays, 0.01), whole)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_gradient_is_multiplied_by_the_loss_s_own(dtype):
    """By 4, which is exact in every dtype."""
    arrays = draw(dtype=dtype)
    once, scaled = ours(*arrays), ours(*arrays, scale=4.0)
    for a, b in zip(once, scaled, strict=True):
        np.testing.assert_array_equal(4 * a.astype(np.float32), b.astype(np.float32))


def test_a_target_of_weight_0_does_not_count():
    x, head, targets, weights = draw()
    loss_, dx, dhead = ours(x, head, targets, weights, 0.01)
    ignored = weights == 0
    assert 5 < ignored.sum() < 25
    np.testing.assert_array_equal(dx[ignored], 0)
    assert np.all(np.any(dx[~ignored] != 0, axis=-1))
    others = np.where(ignored, (targets + 1) % V, targets).astype(np.int32)
    moved = np.where(ignored[..., None], 3 * x + 1, x)
    again, _, dhead_again = ours(moved, head, others, weights, 0.01)
    np.testing.assert_allclose(again, loss_, rtol=1e-6)
    np.testing.assert_allclose(dhead_again, dhead, rtol=0, atol=1e-7)


def test_the_loss_of_all_weights_0_is_0_with_gradients_of_0():
    x, head, targets, weights = draw()
    for part in ours(x, head, targets, 0 * weights, 0.01):
        np.testing.assert_array_equal(part, 0)


def test_large_logits_do_not_overflow():
    x, head, targets, weights = draw()
    loss_, dx, dhead = ours(1e4 * x, head, targets, weights)
    np.testing.assert_allclose(loss_, expected(1e4 * x, head, targets, weights, 0.0)[0], rtol=1e-6)
    assert np.isfinite(dx).all() and np.isfinite(dhead).all()


def test_bfloat16_activations_are_multiplied_in_bfloat16_and_the_head_s_gradient_is_summed_in_float32():
    arrays = draw(dtype=ml_dtypes.bfloat16)
    x, head, targets, weights = arrays
    loss_, dx, dhead = ours(*arrays)
    assert (loss_.dtype, dx.dtype, dhead.dtype) == (np.float32, ml_dtypes.bfloat16, np.float32)
    rounded = (x, head.astype(ml_dtypes.bfloat16), targets, weights)
    wanted, wanted_dx, wanted_dhead = expected(*rounded, 0.0)
    np.testing.assert_allclose(loss_, wanted, rtol=1e-6)  # the product of rounded operands is exact
    assert np.linalg.norm(dx.astype(np.float64) - wanted_dx) < 2**-8 * np.linalg.norm(wanted_dx)
    assert np.linalg.norm(dhead - wanted_dhead) < 2**-8 * np.linalg.norm(wanted_dhead)
    assert np.mean(dhead == dhead.astype(ml_dtypes.bfloat16)) < 0.1


def test_every_product_of_bfloat16_activations_is_of_bfloat16_and_gives_float32():
    x, head, targets, weights = draw(dtype=ml_dtypes.bfloat16)
    gradient = jax.grad(lambda x, head: cross_entropy(x, head, targets, weights, V, 0.01)[0], argnums=(0, 1))
    bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert products(gradient, x, head) == [(bf16, bf16, f32)] * 6  # logits and two gradients, as a CPU does it and as others do


@pytest.mark.parametrize("tokens", [1000, 3], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("name", MESHES)
def test_the_loss_and_its_gradients_are_the_same_on_every_mesh(monkeypatch, name, tokens):
    x, head, targets, weights = draw(rows=PADDED)
    wanted = expected(x, head, targets, weights, 0.05)
    in_chunks(monkeypatch, tokens, PADDED)
    with without_rematerialisation():
        assert_close(ours(x, head, targets, weights, 0.05, mesh=mesh_of(name)), wanted)


@pytest.mark.parametrize("name", [None, "1x1x8", "2x2x2"])
def test_no_program_holds_the_logits_of_all_tokens(name):
    """[32, 1024] tokens of 32,000 logits are 3.9 GiB; here and on a mesh, where every device has its part."""
    mesh = None if name is None else mesh_of(name)
    devices = 1 if mesh is None else mesh.size
    B, T, V, D = 32 * devices, 1024, 32_000, 64
    shapes = [((B, T, D), "bfloat16"), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "float32")]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    gradient = jax.value_and_grad(lambda *arrays: cross_entropy(*arrays, V, 0.0)[0], argnums=(0, 1))
    with on(mesh):
        memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * loss.LOGITS_BYTES < B * T * V * 4 / devices / 3
