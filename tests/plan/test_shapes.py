"""The planner's parameters are the model's."""

import jax
import pytest

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape
from llama_jax.model.params import param_axes, param_shapes
from llama_jax.model.quantize import NUM_INPUTS
from llama_jax.plan.shapes import MESH_AXIS, elements, weights
from llama_jax.sharding import RULES


def flat(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("preset", ["tiny", "llama2_70b", "llama3_2_1b"])
@pytest.mark.parametrize("tensor", [1, 3])
def test_names_shapes_and_axes_are_the_models(preset, tensor):
    cfg = PRESETS[preset]
    shapes, axes = flat(param_shapes(cfg, scan=True, tensor=tensor)), flat(param_axes(cfg, scan=True))
    ours = {w.name: w for w in weights(cfg, tensor)}
    assert set(ours) == set(shapes)
    for name, w in ours.items():
        stacked = (("layers", w.count), *w.axes) if name.startswith("layers.") else w.axes
        assert tuple(size for _, size in stacked) == shapes[name].shape
        assert tuple(axis for axis, _ in stacked) == axes[name]


def test_axes_lie_where_the_sharding_table_puts_them():
    for w in weights(PRESETS["tiny"]):
        for axis, _ in w.axes:
            assert MESH_AXIS.get(axis) == RULES[axis]


def test_int8_has_the_weights_that_quantize_takes():
    for w in weights(PRESETS["tiny"]):
        name = w.name.rpartition(".")[2]
        assert w.quantizable == (name in NUM_INPUTS)
        assert not w.quantizable or len(w.inputs) == NUM_INPUTS[name]


@pytest.mark.parametrize(("tensor", "heads"), [(1, 2), (2, 1), (3, 2), (6, 2)])
def test_key_value_heads_fewer_than_devices_are_whole_on_each(tensor, heads):
    """tiny: 2 key/value heads of 10, width 48; fsdp=2."""
    (k,) = (w for w in weights(PRESETS["tiny"]) if w.name == "layers.k_proj")
    assert elements(k.axes, MeshShape(fsdp=2, tensor=tensor)) == heads * 10 * 24


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_elements_add_up_to_the_published_count(preset):
    cfg = PRESETS[preset]
    assert sum(w.count * elements(w.axes, MeshShape()) for w in weights(cfg)) == cfg.num_params
