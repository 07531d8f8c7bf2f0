"""Models in int8: which weights are rounded, how their scales lie, and how far the logits move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import forward, param_axes, quantize_axes, quantize_params, stack_layers
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.ops.qarray import QArray
from llama_jax.sharding import spec
from tests.model.make import CONFIGS, TINY, params_of, tokens_of

rounded = jax.jit(quantize_params)
forward_jit = jax.jit(forward, static_argnums=0)
TIED = CONFIGS["one key head, tied"]


def is_names(leaf: object) -> bool:
    return type(leaf) is tuple


def is_quantised(leaf: object) -> bool:
    return isinstance(leaf, QArray)


@pytest.mark.parametrize("cfg", [TINY, TIED], ids=["its own head", "tied"])
def test_projections_and_head_are_rounded_and_nothing_else(cfg):
    params = rounded(params_of(cfg))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantised):
        assert is_quantised(leaf) == path[-1].key.endswith(("_proj", "lm_head")), path
    for name in ("embedding", "final_norm"):
        np.testing.assert_array_equal(params[name], params_of(cfg)[name])
    assert len(params["layers"]) == cfg.num_layers


def test_a_rounded_model_is_one_with_the_rounded_weights():
    """Were each of its weights replaced by what value and scale say, the logits would be the same."""
    params = rounded(params_of(TINY))

    def whole(path, leaf):
        if not is_quantised(leaf):
            return leaf
        ones = (1,) * (NUM_INPUTS[path[-1].key] - 1)
        return leaf.value * leaf.scale.reshape(*leaf.scale.shape, *ones)

    floats = jax.tree_util.tree_map_with_path(whole, params, is_leaf=is_quantised)
    tokens = tokens_of(TINY, 2, 12)
    ours = forward_jit(TINY, params, tokens)
    np.testing.assert_allclose(ours, forward_jit(TINY, floats, tokens), rtol=0, atol=1e-5)
    exact = np.asarray(forward_jit(TINY, params_of(TINY), tokens))
    error = np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 0.05  # half a step is some 0.5% of such a weight, and 22 products follow each other


@pytest.mark.parametrize("scan", [False, True])
def test_every_part_of_a_rounded_weight_has_axes_in_the_table(scan):
    params = stack_layers(params_of(TINY)) if scan else params_of(TINY)
    shapes, axes = jax.eval_shape(quantize_params, params), quantize_axes(param_axes(TINY, scan=scan))
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
    for shape, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True):
        assert len(spec(*names)) == shape.ndim


def test_layers_are_rounded_stacked_as_they_are_one_by_one():
    stacked, one_by_one = rounded(stack_layers(params_of(TINY))), stack_layers(rounded(params_of(TINY)))
    jax.tree.map(np.testing.assert_array_equal, stacked, one_by_one)


def test_scales_lie_beside_the_outputs_they_belong_to():
    axes = quantize_axes(param_axes(TINY))
    layer = axes["layers"][0]
    assert layer["q_proj"] == QArray(("heads", "head_dim", "embed"), ("heads", "head_dim", "group"))
    assert layer["o_proj"] == QArray(("embed", "heads", "head_dim"), ("embed", "group"))
    assert layer["down_proj"] == QArray(("embed", "mlp"), ("embed", "group"))
    assert axes["lm_head"] == QArray(("vocab", "embed"), ("vocab", "group"))
    assert axes["embedding"] == ("vocab", "embed") and layer["attn_norm"] == ("norm",)


def test_rounded_bfloat16_weights_compute_in_bfloat16():
    params = rounded(params_of(TINY, jnp.bfloat16))
    assert params["layers"][0]["q_proj"].scale.dtype == jnp.float32
    ours = forward_jit(TINY, params, tokens_of(TINY, 1, 5))
    assert ours.dtype == jnp.float32 and np.isfinite(ours).all()
