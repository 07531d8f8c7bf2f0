"""The table from logical axis to mesh axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax import sharding
from llama_jax.config import PRESETS
from llama_jax.errors import LlamaError
from llama_jax.mesh import MeshShape
from llama_jax.model import param_axes
from llama_jax.ops.linear import project
from llama_jax.sharding import RULES, make_mesh, scatter_twice, spec

MESH_AXES = ("data", "fsdp", "tensor")


def as_tuple(row: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if row is None else (row,) if isinstance(row, str) else row


def test_every_row_names_axes_of_the_mesh():
    assert {axis for row in RULES.values() for axis in as_tuple(row)} == set(MESH_AXES)


def test_a_spec_has_an_entry_for_every_axis():
    assert spec("batch", "length", None) == PartitionSpec(("data", "fsdp"), None, None)
    assert spec("heads", "head_dim", "embed") == PartitionSpec("tensor", None, "fsdp")
    assert spec() == PartitionSpec()


@pytest.mark.parametrize("names", [("head",), ("batch", "seq"), ("Embed", None)])
def test_an_unknown_name_is_refused_with_the_known_ones(names):
    with pytest.raises(ValueError, match=rf"unknown logical axes \['{names[-1] or names[0]}'\].*known: \['act_embed', .*RULES"):
        spec(*names)


@pytest.mark.parametrize("preset", ["tiny", "llama2_70b", "llama3_2_1b"])
def test_no_parameter_uses_a_mesh_axis_twice(preset):
    for names in jax.tree.leaves(param_axes(PRESETS[preset]), is_leaf=lambda leaf: isinstance(leaf, tuple)):
        used = [axis for row in spec(*names) for axis in as_tuple(row)]
        assert len(used) == len(set(used)), names


def test_parameters_of_a_layer_lie_where_they_did():
    axes = param_axes(PRESETS["tiny"])
    tables = {name: spec(*names) for name, names in axes.items() if name != "layers"}
    assert tables == {
        "embedding": PartitionSpec("tensor", "fsdp"),
        "lm_head": PartitionSpec("tensor", "fsdp"),
        "final_norm": PartitionSpec(None),
    }
    assert {name: spec(*names) for name, names in axes["layers"][0].items()} == {
        "attn_norm": PartitionSpec(None),
        "q_proj": PartitionSpec("tensor", None, "fsdp"),
        "k_proj": PartitionSpec("tensor", None, "fsdp"),
        "v_proj": PartitionSpec("tensor", None, "fsdp"),
        "o_proj": PartitionSpec("fsdp", "tensor", None),
        "mlp_norm": PartitionSpec(None),
        "gate_proj": PartitionSpec("tensor", "fsdp"),
        "up_proj": PartitionSpec("tensor", "fsdp"),
        "down_proj": PartitionSpec("fsdp", "tensor"),
    }


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="two axes of one array on mesh axis 'tensor'"):
        spec("heads", "mlp")
    with pytest.raises(ValueError, match="'fsdp'"):
        spec("batch", "embed")


def test_scattering_in_two_steps_is_scattering():
    x = jax.random.normal(jax.random.key(0), (8, 3, 16))

    def both(x):
        once = jax.lax.psum_scatter(x[0], "fsdp", scatter_dimension=1, tiled=True)
        return once, scatter_twice(x[0], axis=1)

    with jax.set_mesh(make_mesh(MeshShape(fsdp=8))):
        parts = jax.shard_map(both, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(None, "fsdp"))(x)
    for part in parts:
        np.testing.assert_allclose(part, x.sum(0), rtol=0, atol=1e-5)


def test_gradients_over_a_wide_fsdp_are_those_of_one_device(monkeypatch):
    x, w = jax.random.normal(jax.random.key(0), (8, 4, 16)), jax.random.normal(jax.random.key(1), (24, 16))

    def loss(x, w):
        return jnp.sum(jnp.sin(project("BTD,FD->BTF", x, w)))

    expected = jax.grad(loss, argnums=(0, 1))(x, w)
    monkeypatch.setattr(sharding, "WIDE_FSDP", 4)
    with jax.set_mesh(make_mesh(MeshShape(fsdp=8))):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        found = step(x, w)
        assert "reduce_scatter" in step.lower(x, w).as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)


def test_devices_of_several_slices_ask_for_as_many(monkeypatch):
    class Device:
        platform = "tpu"

        def __init__(self, slice_index):
            self.slice_index = slice_index

    with pytest.raises(LlamaError, match=r"these devices are 2 slices, and mesh.dcn_data is 1: it must be 2"):
        make_mesh(MeshShape(fsdp=4), [Device(i // 2) for i in range(4)])
