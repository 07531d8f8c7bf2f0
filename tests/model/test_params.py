"""The tree of parameters: its shapes, the names of its axes, its first values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import PRESETS
from llama_jax.model import init_params, param_axes, param_shapes
from llama_jax.sharding import RULES
from tests.model.make import CONFIGS, TINY


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
    params = jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))
    matrices = [np.asarray(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    for matrix in matrices:
        assert matrix.std() == pytest.approx(0.02, rel=0.1)
        assert abs(matrix.mean()) < 0.002
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices) == 2 + 7 * TINY.num_layers
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, 1)
