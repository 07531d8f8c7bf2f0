"""The model on meshes computes what it computes on one device, and the partitioner finds nothing in the wrong place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import PRESETS, ModelConfig
from llama_jax.mesh import cache_heads, padded_vocab
from llama_jax.model import Params, forward, hidden_states, logits, quantize_params
from llama_jax.model.cache import grow_cache
from llama_jax.ops.attention import MASKED
from tests.make_mesh import MESHES, mesh_of, place, without_rematerialisation
from tests.model.make import params_of, tokens_of

B, T = 8, 16
BASE = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_heads=16, head_dim=6)
CONFIGS: dict[str, ModelConfig] = {
    "one key head per query head, an odd vocabulary": dataclasses.replace(BASE, num_heads=8, num_kv_heads=8, vocab_size=321),
    "key heads for every device, tied": dataclasses.replace(BASE, num_kv_heads=8, tied_head=True),
    "fewer key heads than devices": dataclasses.replace(BASE, num_kv_heads=2, vocab_size=321),
}
SHARED_HEADS = CONFIGS["fewer key heads than devices"]

forward_jit = jax.jit(forward, static_argnums=0)


def decoded(cfg: ModelConfig, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of the last token, [B, V'], and the last layer's keys, [B, K', S, H], of a prefill and a step after it."""
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    _, cache = hidden_states(cfg, params, tokens[:, :-1], positions[:, :-1])
    x, cache = hidden_states(cfg, params, tokens[:, -1:], positions[:, -1:], grow_cache(cache, 32))
    return logits(cfg, params, x)[:, 0], cache[-1].k


decoded_jit = jax.jit(decoded, static_argnums=0)


@pytest.fixture(scope="module", params=list(CONFIGS))
def alone(request) -> tuple[ModelConfig, np.ndarray]:
    """A config, and its logits on one device."""
    cfg = CONFIGS[request.param]
    return cfg, np.asarray(forward_jit(cfg, params_of(cfg), tokens_of(cfg, B, T)))


@pytest.mark.parametrize("name", MESHES)
def test_logits_are_the_same_on_every_mesh(alone, name):
    cfg, expected = alone
    assert expected.std() > 0.5
    mesh = mesh_of(name)
    with jax.set_mesh(mesh), without_rematerialisation():
        ours = forward_jit(cfg, place(cfg, params_of(cfg), mesh, fill=100), tokens_of(cfg, B, T))
    assert ours.shape == (B, T, cfg.vocab_size) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_a_decoding_step_is_the_forward_pass_on_every_mesh(name):
    """With two key/value heads on eight devices, a device caches the one that its query heads read."""
    cfg, mesh = SHARED_HEADS, mesh_of(name)
    params, tokens = params_of(cfg), tokens_of(cfg, B, T)
    expected, keys = decoded_jit(cfg, params, tokens)
    np.testing.assert_allclose(expected, forward_jit(cfg, params, tokens)[:, -1], rtol=0, atol=1e-5)
    with jax.set_mesh(mesh), without_rematerialisation():
        ours, ours_keys = decoded_jit(cfg, place(cfg, params, mesh, fill=100), tokens)
    np.testing.assert_allclose(ours[:, : cfg.vocab_size], expected, rtol=0, atol=1e-5)
    assert ours.shape[1] == padded_vocab(cfg.vocab_size, mesh.shape["tensor"])
    np.testing.assert_array_equal(ours[:, cfg.vocab_size :], np.float32(MASKED))  # though the weights there are large
    copies = cache_heads(2, mesh.shape["tensor"]) // 2
    np.testing.assert_allclose(ours_keys, np.repeat(keys, copies, axis=1), rtol=0, atol=1e-5)
    assert {shard.data.shape[1] for shard in ours_keys.addressable_shards} == {2 * copies // mesh.shape["tensor"]}


@pytest.fixture(scope="module")
def rounded() -> tuple[Params, np.ndarray]:
    """Parameters in int8, and their logits on one device."""
    params = jax.jit(quantize_params)(params_of(SHARED_HEADS))
    return params, np.asarray(forward_jit(SHARED_HEADS, params, tokens_of(SHARED_HEADS, B, T)))


@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_int8_weights_give_the_same_logits_on_every_mesh(rounded, name):
    cfg, mesh = SHARED_HEADS, mesh_of(name)
    params, expected = rounded
    with jax.set_mesh(mesh), without_rematerialisation():
        ours = forward_jit(cfg, place(cfg, params, mesh), tokens_of(cfg, B, T))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_the_check_for_rematerialisation_finds_one():
    """A loop whose result lies along another axis than what it starts from."""
    spec, mesh = jax.sharding.PartitionSpec, mesh_of("2x2x2")

    def misplaced(x):
        x = jax.lax.with_sharding_constraint(2 * x, spec("data", None))
        x = jax.lax.fori_loop(0, 3, lambda i, x: x.at[i].set(1), x)
        return jax.lax.with_sharding_constraint(x, spec(None, ("data", "tensor")))

    with pytest.raises(AssertionError, match="rematerialization"), without_rematerialisation(), jax.set_mesh(mesh):
        jax.jit(misplaced).lower(jnp.ones((16, 8))).compile()
