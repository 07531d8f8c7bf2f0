"""The table from logical axis to mesh axis."""

import jax
import pytest
from jax.sharding import PartitionSpec

from llama_jax.config import PRESETS
from llama_jax.model import param_axes
from llama_jax.sharding import RULES, spec

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
