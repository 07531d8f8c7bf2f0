"""What is decided by logical axes and names: matrices and their sides, which weights are frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import LoraConfig, adapter_axes, param_axes, param_shapes
from llama_jax.training.weights import as_matrix, combine, flat_shape, is_axes, matrices, per_weight, sides, without_frozen
from tests.training.make import CFG

NAMES = (
    "embedding, final_norm, layers.attn_norm, layers.down_proj, layers.gate_proj, layers.k_proj, layers.mlp_norm, "
    "layers.o_proj, layers.q_proj, layers.up_proj, layers.v_proj, lm_head"
)


def names_of(tree) -> set[str]:
    paths = [path for path, _ in jax.tree.leaves_with_path(tree, is_leaf=is_axes)]
    return {".".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)) for path in paths}


def test_outputs_come_first_and_a_head_s_width_is_the_heads():
    axes = param_axes(CFG)
    layer = axes["layers"][0]
    assert sides(layer["q_proj"]) == sides(layer["k_proj"]) == ((0, 1), (2,))
    assert sides(layer["o_proj"]) == ((0,), (1, 2))
    assert sides(layer["gate_proj"]) == sides(layer["down_proj"]) == sides(axes["embedding"]) == ((0,), (1,))
    assert sides(layer["attn_norm"]) is None
    shapes = param_shapes(CFG)["layers"][0]
    assert flat_shape(layer["o_proj"], shapes["o_proj"].shape) == (48, 16 * 6)
    assert flat_shape(layer["attn_norm"], (48,)) == (48,)


def test_the_sides_of_an_adapter_are_its_rank_and_those_of_its_weight():
    layer = adapter_axes(CFG, LoraConfig(rank=4, dora=True), scan=False)["layers"][0]
    assert sides(layer["q_proj"]["b"]) == ((0, 1), (2,)) and sides(layer["o_proj"]["a"]) == ((0,), (1, 2))
    assert sides(layer["q_proj"]["magnitude"]) is sides(layer["down_proj"]["magnitude"]) is None


@pytest.mark.parametrize("scan", [False, True])
def test_all_but_norms_are_matrices_stacked_or_not(scan):
    tree = matrices(param_axes(CFG, scan=scan))
    for path, is_matrix in jax.tree.leaves_with_path(tree):
        assert is_matrix != path[-1].key.endswith("norm")


def test_stacked_weights_are_transformed_one_by_one():
    """By the axes of one of them, with a state for each."""
    seen = []

    def choose(names):
        seen.append(names)
        return optax.scale_by_param_block_rms() if names == ("mlp", "embed") else optax.trace(0.5)

    axes = {"layers": {"up_proj": ("layers", "mlp", "embed")}, "final_norm": ("norm",)}
    weights = {"layers": {"up_proj": jnp.stack([jnp.full((3, 2), 2.0), jnp.full((3, 2), 5.0)])}, "final_norm": jnp.ones(2)}
    transformation = per_weight(axes, choose)
    state = transformation.init(weights)
    updates, state = transformation.update(jax.tree.map(jnp.ones_like, weights), state, weights)
    np.testing.assert_allclose(updates["layers"]["up_proj"][:, 0, 0], [2, 5])
    np.testing.assert_array_equal(state["final_norm"].trace, 1)
    assert set(seen) == {("mlp", "embed"), ("norm",)}


def test_a_matrix_is_seen_as_outputs_by_inputs():
    shapes = []
    transformation = as_matrix(
        ("embed", "heads", "head_dim"), optax.stateless(lambda g, w: shapes.append((g.shape, w.shape)) or g)
    )
    weight = jnp.arange(24.0).reshape(2, 3, 4)
    update, _ = transformation.update(weight, transformation.init(weight), weight)
    assert shapes == [((2, 12), (2, 12))]
    np.testing.assert_array_equal(update, weight)


@pytest.mark.parametrize("scan", [False, True])
def test_what_freezes_is_named_without_layer_numbers(scan):
    axes = param_axes(CFG, scan=scan)
    left = without_frozen(axes, ("embedding", "layers[.].*_norm", "layers.q_proj"))
    frozen = {"embedding", "layers.attn_norm", "layers.mlp_norm", "layers.q_proj"}
    assert names_of(left) == set(NAMES.split(", ")) - frozen
    assert combine(left, axes) == axes
    assert without_frozen(axes, ()) == axes


@pytest.mark.parametrize(
    "freeze, message",
    [
        (("embeddings",), f"freeze has 'embeddings', which matches no weight; their names: {NAMES}"),
        (("embedding", "layers[.]0[.].*"), r"freeze has 'layers\[.\]0\[.\].\*', which matches no weight"),
        ((".*_?norm", "layers.*", "embedding", "lm_head"), f"freeze matches every weight, and nothing would train: {NAMES}"),
        (("layers.(q",), r"freeze has 'layers.\(q', which is no regular expression"),
    ],
)
def test_freezing_nothing_or_everything_is_refused_with_the_names(freeze, message):
    with pytest.raises(LlamaError, match=message) as caught:
        without_frozen(param_axes(CFG), freeze)
    assert caught.value.code == ExitCode.BAD_CONFIG
