"""Which meshes a model can be spread over."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape, cache_heads, legal_meshes, padded_vocab, resolve_mesh, why_illegal

INFER = MeshShape(tensor=-1)
TRAIN = MeshShape(fsdp=-1)


def refused(cfg, wanted, num_devices, **more) -> str:
    with pytest.raises(LlamaError) as caught:
        resolve_mesh(PRESETS[cfg], wanted, num_devices, **more)
    assert caught.value.code == ExitCode.BAD_MESH
    return str(caught.value)


@pytest.mark.parametrize(
    ("preset", "wanted", "devices", "mesh"),
    [
        ("llama2_7b", INFER, 1, MeshShape()),
        ("llama2_7b", INFER, 8, MeshShape(tensor=8)),
        ("llama2_70b", INFER, 16, MeshShape(tensor=16)),  # two copies of each of 8 key/value heads
        ("llama2_13b", INFER, 16, MeshShape(data=2, tensor=8)),  # 40 heads: 8 is the largest, two copies
        ("llama3_2_3b", INFER, 16, MeshShape(data=2, tensor=8)),  # 24 heads
        ("llama2_70b", TRAIN, 64, MeshShape(fsdp=64)),
        ("llama2_70b", MeshShape(data=2, fsdp=-1, tensor=4, dcn_data=2), 64, MeshShape(2, 4, 4, 2)),
        ("llama2_7b", MeshShape(data=-1), 8, MeshShape(data=8)),
    ],
)
def test_what_is_left_of_the_devices(preset, wanted, devices, mesh):
    assert resolve_mesh(PRESETS[preset], wanted, devices) == mesh
    assert mesh.num_devices == devices


def test_13b_on_tensor_16_is_refused_with_the_nearest_that_work():
    message = refused("llama2_13b", MeshShape(tensor=16), 16)
    assert "40 heads are not divisible by tensor=16" in message
    assert "data=1 fsdp=2 tensor=8" in message and "data=2 fsdp=1 tensor=8" in message


def test_a_mesh_of_another_size_than_the_devices_is_refused():
    message = refused("llama2_7b", MeshShape(data=2, tensor=2), 8)
    assert "data=2 x fsdp=1 x tensor=2 is 4 devices, and there are 8" in message and "tensor=4" in message
    assert "is 3 devices times fsdp=-1, and there are 8" in refused("llama2_7b", MeshShape(data=3, fsdp=-1), 8)


def test_two_open_axes_are_refused():
    assert "mesh.fsdp and mesh.tensor are both -1" in refused("llama2_7b", MeshShape(fsdp=-1, tensor=-1), 8)


@pytest.mark.parametrize("field", ["data", "fsdp", "tensor", "dcn_data"])
def test_a_size_that_is_none_is_refused(field):
    assert f"mesh.{field} is 0" in refused("llama2_7b", MeshShape(**{field: 0}), 8)


def test_a_training_batch_that_does_not_divide_is_refused():
    message = refused("llama2_7b", TRAIN, 8, batch_size=12)
    assert "a batch of 12 is not divisible by data * fsdp = 8" in message and "fsdp=4 tensor=2" in message
    assert "no mesh of 7 devices with a batch of 12 can" in refused("llama2_7b", TRAIN, 7, batch_size=12)


@given(preset=st.sampled_from(sorted(PRESETS)), devices=st.integers(1, 96), slices=st.integers(1, 3), batch=st.integers(1, 256))
def test_legal_meshes_are_all_those_that_nothing_speaks_against(preset, devices, slices, batch):
    cfg = PRESETS[preset]
    found = list(legal_meshes(cfg, devices, dcn_data=slices, batch_size=batch))
    assert len(found) == len(set(found))
    every = [
        MeshShape(data, fsdp, devices // slices // data // fsdp, slices)
        for data in range(1, devices + 1)
        for fsdp in range(1, devices + 1)
        if devices % slices == 0 and devices // slices % (data * fsdp) == 0
    ]
    assert set(found) == {mesh for mesh in every if not why_illegal(cfg, mesh, batch)}
    for mesh in found:
        assert mesh.num_devices == devices and batch % mesh.batch_shards == 0
        heads = cache_heads(cfg.num_kv_heads, mesh.tensor)
        assert heads % mesh.tensor == 0 and heads % cfg.num_kv_heads == 0 and cfg.num_heads % heads == 0
        rows = padded_vocab(cfg.vocab_size, mesh.tensor)
        assert rows % mesh.tensor == 0 and cfg.vocab_size <= rows < cfg.vocab_size + mesh.tensor
        assert resolve_mesh(cfg, mesh, devices, batch_size=batch) == mesh


@given(
    preset=st.sampled_from(sorted(PRESETS)), devices=st.integers(1, 64), open_axis=st.sampled_from(["data", "fsdp", "tensor"])
)
def test_a_resolved_mesh_uses_every_device_or_the_refusal_names_one_that_would(preset, devices, open_axis):
    cfg = PRESETS[preset]
    try:
        mesh = resolve_mesh(cfg, MeshShape(**{open_axis: -1}), devices)
    except LlamaError as error:
        legal = list(legal_meshes(cfg, devices))
        assert legal and any(str(mesh) in str(error) for mesh in legal)
    else:
        assert mesh.num_devices == devices and not why_illegal(cfg, mesh)
        assert math.prod([mesh.data, mesh.fsdp, mesh.tensor]) == devices
