"""The tree of parameters: its shapes, the names of its axes, its first values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import PRESETS
from llama_jax.model import init_params, param_axes, param_shapes, stack_layers, unstack_layers
from llama_jax.sharding import RULES, tree_shardings
from tests.make_mesh import MESHES, mesh_of
from tests.model.make import CONFIGS, TINY, params_of

initialised = jax.jit(init_params, static_argnums=0, static_argnames=("scan", "tensor"))


def is_names(leaf: object) -> bool:
    return isinstance(leaf, tuple)


@pytest.mark.parametrize("cfg", [*CONFIGS.values(), PRESETS["llama3_1_405b"]], ids=[*CONFIGS, "405b"])
def test_every_axis_of_every_parameter_has_a_name_in_the_table(cfg):
    shapes, axes = param_shapes(cfg), param_axes(cfg)
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
    for shape, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True):
        assert len(names) == len(shape.shape)
        assert set(names) <= set(RULES)


def test_one_name_has_one_size_in_the_whole_tree():
    sizes: dict[str, set[int]] = {}
    leaves = zip(jax.tree.leaves(param_shapes(TINY)), jax.tree.leaves(param_axes(TINY), is_leaf=is_names), strict=True)
    for shape, names in leaves:
        for name, size in zip(names, shape.shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    assert sizes == dict(vocab={320}, embed={48}, norm={48}, heads={6}, kv_heads={2}, head_dim={10}, mlp={80})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied_head", [False, True])
def test_initial_parameters_have_the_shapes_announced(tied_head, dtype):
    cfg = dataclasses.replace(TINY, tied_head=tied_head)
    drawn = jax.eval_shape(lambda key: init_params(cfg, key, dtype), jax.random.key(0))
    assert drawn == param_shapes(cfg, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype(dtype)}
    assert ("lm_head" in drawn) != tied_head


def test_initial_parameters_are_normal_and_no_two_alike():
    params = initialised(TINY, jax.random.key(0))
    matrices = [np.asarray(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    for matrix in matrices:
        assert matrix.std() == pytest.approx(0.02, rel=0.1)
        assert abs(matrix.mean()) < 0.002
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices) == 2 + 7 * TINY.num_layers
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, 1)


# Two forms, and meshes

ODD = dataclasses.replace(TINY, num_heads=16, vocab_size=321)


def test_stacking_layers_and_taking_them_apart_are_inverse():
    params = params_of(TINY)
    stacked = stack_layers(params)
    assert jax.tree.map(lambda a: a.shape, stacked) == jax.tree.map(lambda a: a.shape, param_shapes(TINY, scan=True))
    again = unstack_layers(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert isinstance(params["layers"], list)  # what was given is as it was


def test_scanned_parameters_have_a_layers_axis_before_their_own():
    scanned, axes = param_axes(TINY, scan=True)["layers"], param_axes(TINY)["layers"][0]
    assert scanned == {name: ("layers", *names) for name, names in axes.items()}
    shapes, layer = param_shapes(TINY, scan=True)["layers"], param_shapes(TINY)["layers"][0]
    assert {k: v.shape for k, v in shapes.items()} == {k: (TINY.num_layers, *v.shape) for k, v in layer.items()}


def test_neither_stacking_nor_a_padded_vocabulary_changes_an_initial_value():
    """Up to the last bits: the inverse error function is part of two programs, and a compiler may round it in either way."""

    def assert_same(ours, wanted):
        np.testing.assert_allclose(ours, wanted, rtol=5e-7, atol=0)

    key = jax.random.key(0)
    alone, padded = initialised(TINY, key), initialised(TINY, key, scan=True, tensor=7)
    assert jax.tree.map(lambda a: a.shape, padded) == jax.tree.map(lambda a: a.shape, param_shapes(TINY, scan=True, tensor=7))
    for name in ("embedding", "lm_head"):
        assert padded[name].shape == (322, TINY.embed_dim)
        np.testing.assert_array_equal(padded[name][320:], 0)
        assert_same(padded[name][:320], alone[name])
    jax.tree.map(assert_same, padded["layers"], stack_layers(alone)["layers"])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_every_device_holds_an_equal_part_of_every_parameter(name, scan):
    mesh = mesh_of(name)
    shapes = param_shapes(ODD, scan=scan, tensor=mesh.shape["tensor"])
    places = tree_shardings(mesh, param_axes(ODD, scan=scan), shapes)
    for (path, shape), place in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(places), strict=True):
        parts = shape.size // np.prod(place.shard_shape(shape.shape))
        leaf = path[-1].key
        tensor = 1 if leaf in ("k_proj", "v_proj") and 2 % mesh.shape["tensor"] else mesh.shape["tensor"]  # two heads
        assert parts == (1 if leaf.endswith("norm") else mesh.shape["fsdp"] * tensor), path
