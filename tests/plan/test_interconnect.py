"""Bandwidth of mesh axes on the wires of slices and nodes."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape, legal_meshes
from llama_jax.plan.interconnect import wires
from llama_jax.plan.topology import parse_topology


def gather(topology: str, axis: str, nbytes: float, **sizes: int) -> float:
    return wires(parse_topology(topology), MeshShape(**sizes))[axis].gather_seconds(nbytes)


def test_a_ring_has_two_wires_and_a_line_one():
    """v5p links are 90 GB/s one way; rings only where the slice is a whole cube."""
    assert gather("v5p-128", "tensor", 1e9, fsdp=16, tensor=4) == pytest.approx(0.75 * 1e9 / 180e9)
    assert gather("v5p-128", "fsdp", 1e9, fsdp=16, tensor=4) == pytest.approx(15 / 16 * 1e9 / 360e9)
    assert gather("v5p-128", "fsdp", 1e9, fsdp=64) == pytest.approx(63 / 64 * 1e9 / 540e9)
    assert gather("v5e-16", "tensor", 1e9, fsdp=4, tensor=4) == pytest.approx(0.75 * 1e9 / 45e9)
    assert gather("v5e-16", "tensor", 1e9, tensor=16) == pytest.approx(15 / 16 * 1e9 / 90e9)


def test_a_part_of_a_ring_is_a_line():
    assert gather("v5e-256", "tensor", 1e9, fsdp=64, tensor=4) == pytest.approx(0.75 * 1e9 / 45e9)


def test_the_devices_of_a_v7x_chip_are_nearest_on_tensor():
    two, four = (gather("v7x-128", "tensor", 1e9, fsdp=128 // n, tensor=n) for n in (2, 8))
    assert two == pytest.approx(0.5e9 / 540e9) and four == pytest.approx(0.75 * 1e9 / 180e9)


def test_gpus_share_nvlink_in_a_node_and_ports_between_nodes():
    """H100: 450 GB/s into the node, 50 GB/s a GPU out of it."""
    assert gather("h100-8x4", "tensor", 1e9, fsdp=4, tensor=8) == pytest.approx(7 / 8 * 1e9 / 450e9)
    assert gather("h100-8x4", "fsdp", 1e9, fsdp=4, tensor=8) == pytest.approx(0.75 * 1e9 / 50e9)
    assert gather("h100-4x8", "fsdp", 1e9, fsdp=32) == pytest.approx(7 / 8 * 1e9 / 200e9)  # 4 ports carry what a node lacks
    assert gather("h100-8x4", "fsdp", 1e9, fsdp=32) == pytest.approx(7 / 8 * 1e9 / 450e9)  # NVLink is the slower part
    found = wires(parse_topology("h100-8x4"), MeshShape(fsdp=4, tensor=8))
    assert found["fsdp"].network and not found["tensor"].network


def test_slices_are_joined_by_the_network():
    """v6e: 100 Gbit/s a chip."""
    wire = wires(parse_topology("2xv6e-16"), MeshShape(fsdp=16, dcn_data=2))["dcn_data"]
    assert wire.network and wire.reduce_seconds(1e9) == pytest.approx(2 * 0.5 * 1e9 / 12.5e9)


def test_small_arrays_take_the_hops():
    assert gather("v5e-16", "tensor", 1, fsdp=4, tensor=4) == pytest.approx(3e-6)
    assert gather("v5p-128", "tensor", 1, fsdp=16, tensor=4) == pytest.approx(2e-6)
    assert gather("v5p-128", "data", 1e9, fsdp=16, tensor=4) == 0


@given(name=st.sampled_from(["v4-64", "v5e-64", "v5p-256", "v7x-32", "v6e-256", "h200-8x4", "t4-4"]), data=st.data())
def test_every_legal_mesh_has_wires_for_its_axes(name, data):
    topology = parse_topology(name)
    mesh = data.draw(st.sampled_from(list(legal_meshes(PRESETS["llama2_70b"], topology.num_devices))))
    for axis, wire in wires(topology, mesh).items():
        size = getattr(mesh, axis)
        assert wire.size == size and (wire.seconds_per_byte > 0) == (size > 1)
        assert wire.reduce_seconds(1e9) == 2 * wire.gather_seconds(1e9) >= 0
