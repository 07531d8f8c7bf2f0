"""Layers of fused weights are the plain ones: the same numbers, in fewer products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import grow_cache, hidden_states, logits, param_axes, param_shapes, quantize_axes, quantize_params
from llama_jax.model.fused import AXES, can_fuse, fuse_layer, fused_axes
from llama_jax.ops.linear import project
from llama_jax.ops.qarray import QArray, quantize
from llama_jax.sharding import sharding
from tests.make_mesh import mesh_of, on, place
from tests.model.make import CONFIGS, SMALL, params_of, tokens_of

EIGHT = dataclasses.replace(SMALL, num_heads=16, num_kv_heads=8)


def fused(params):
    return {**params, "layers": [fuse_layer(layer) for layer in params["layers"]]}


@functools.partial(jax.jit, static_argnums=0)
def answer(cfg, params, tokens):
    """The logits of a prompt, and of a token that follows it by the cache."""
    T = tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(T + 1), tokens.shape)
    x, cache = hidden_states(cfg, params, tokens[:, :T], positions[:, :T])
    y, _ = hidden_states(cfg, params, tokens[:, T:], positions[:, T:], grow_cache(cache, 32))
    return logits(cfg, params, jnp.concatenate([x, y], axis=1))


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_compute_the_same(name):
    cfg = CONFIGS[name]
    params, tokens = params_of(cfg), tokens_of(cfg, 2, 17)
    np.testing.assert_allclose(answer(cfg, fused(params), tokens), answer(cfg, params, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "w8a8"])
def test_quantised_weights_compute_the_same(method):
    params, tokens = quantize_params(params_of(SMALL), method), tokens_of(SMALL, 2, 17)
    ours, plain = answer(SMALL, fused(params), tokens), answer(SMALL, params, tokens)
    # An activation that a sum's last bit moves to the next of w8a8's levels differs by more.
    np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-2 if method == "w8a8" else 2e-5)


def test_a_layer_has_four_products_instead_of_seven():
    def products(params):
        T = 8
        program = functools.partial(hidden_states, SMALL, kernels=False)
        text = jax.jit(program).lower(params, np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)).as_text()
        return text.count("stablehlo.dot_general")

    params = param_shapes(SMALL)
    assert products(params) - products(jax.eval_shape(fused, params)) == 3 * SMALL.num_layers


@pytest.mark.parametrize("method", ["", "int8", "int4", "w8a8"])
def test_axes_are_those_of_the_arrays(method):
    shapes, axes = param_shapes(SMALL), param_axes(SMALL)
    if method:
        shapes = jax.eval_shape(functools.partial(quantize_params, method=method), shapes)
        axes = quantize_axes(axes, method)
    fused_shapes = jax.eval_shape(fused, shapes)
    assert jax.tree.all(jax.tree.map(lambda x, names: len(names) == x.ndim, fused_shapes, fused_axes(axes)))
    assert sum(x.size for x in jax.tree.leaves(fused_shapes)) == sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("method", ["", "int8", "int4"])
@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_a_mesh_keeps_the_parts_where_they_were(name, method):
    """Fused by the devices that hold them, cut along the same axes; and what they then compute is the same."""
    params, tokens, mesh = params_of(EIGHT), tokens_of(EIGHT, 8, 9), mesh_of(name)
    params = quantize_params(params, method) if method else params
    alone = answer(EIGHT, params, tokens)
    placed = place(EIGHT, params, mesh)
    assert can_fuse(placed["layers"][0], mesh)
    with on(mesh):
        layers = [jax.jit(fuse_layer)(layer) for layer in placed["layers"]]
        together = answer(EIGHT, {**placed, "layers": layers}, tokens)
    tensor = mesh.shape["tensor"]
    qkv = layers[0]["qkv_proj"].value if method else layers[0]["qkv_proj"]
    assert qkv.addressable_shards[0].data.shape[0] == EIGHT.num_kv_heads // tensor
    np.testing.assert_allclose(together[..., : EIGHT.vocab_size], alone[..., : EIGHT.vocab_size], rtol=0, atol=5e-5)


def test_devices_that_share_a_weight_with_scales_of_groups_gather_none_of_it_for_a_token():
    """Gate and up, whose first axis is not the one that is divided."""
    mesh, weight = mesh_of("1x1x8"), quantize(jnp.ones((2, 128, 256), jnp.float16), 1, "int4")
    axes = QArray(AXES["gate_up_proj"], (*AXES["gate_up_proj"][:-1], "group"))
    weight = jax.tree.map(lambda x, names: jax.device_put(x, sharding(mesh, names, x.shape)), weight, axes)
    with on(mesh):
        program = jax.jit(lambda x, w: project("BTD,CFD->BTCF", x, w))
        text = program.lower(jnp.ones((1, 2, 256), jnp.float16), weight).compile().as_text()
    assert "all-gather" not in text


def test_heads_that_several_devices_copy_are_left_apart():
    cfg = dataclasses.replace(SMALL, num_heads=8, num_kv_heads=2)
    layer = param_shapes(cfg)["layers"][0]
    assert can_fuse(layer, None) and not can_fuse(layer, mesh_of("1x1x8"))


def test_fused_layers_are_not_fused_again():
    assert not can_fuse(jax.eval_shape(fuse_layer, param_shapes(SMALL)["layers"][0]), None)
