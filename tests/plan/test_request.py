"""Defaults, and what is refused."""

import pytest

from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape
from llama_jax.plan.request import OPTIMIZERS, REMAT, make_request


def refused(code: ExitCode, *request, **more) -> str:
    with pytest.raises(LlamaError) as caught:
        make_request(*request, **more)
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "task", "batch", "length"),
    [
        ("llama2_70b", "train", 64, 4096),  # one sequence per device
        ("llama1_7b", "train", 64, 2048),
        ("llama3_1_8b", "train", 64, 4096),
        ("llama2_70b", "decode", 8, 2048),
        ("tiny", "decode", 8, 256),
        ("llama2_70b", "prefill", 1, 2048),
    ],
)
def test_defaults(model, task, batch, length):
    request = make_request(model, "v5p-128", task)
    assert (request.batch, request.length) == (batch, length)
    assert (request.dtype, request.optimizer, request.remat, request.quantize) == ("bfloat16", "adamw", "full", "")
    assert request.mesh is None and request.config == PRESETS[model]


@pytest.mark.parametrize(
    ("task", "given", "mesh"),
    [
        ("train", {"tensor": 4}, MeshShape(fsdp=16, tensor=4)),
        ("train", {"data": 2, "fsdp": 8, "tensor": 4}, MeshShape(2, 8, 4)),
        ("train", {"data": -1, "fsdp": 8}, MeshShape(8, 8)),
        ("decode", {"data": 8}, MeshShape(8, 1, 8)),
        ("decode", {"fsdp": -1}, MeshShape(fsdp=64)),
        ("decode", {"tensor": 64}, MeshShape(tensor=64)),
    ],
)
def test_what_is_left_of_the_devices_goes_where_the_programs_put_it(task, given, mesh):
    assert make_request("llama2_70b", "v5p-128", task, mesh=given).mesh == mesh


def test_a_mesh_of_two_slices_has_two_copies():
    assert make_request("llama2_7b", "2xv5e-16", "train", mesh={"tensor": 2}).mesh == MeshShape(1, 8, 2, 2)


def test_a_model_nobody_knows_is_refused_with_the_nearest():
    assert "nearest presets: llama2_7b" in refused(ExitCode.BAD_REQUEST, "llama-2-7b", "v5e-1", "decode")


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    assert str(tmp_path) in refused(ExitCode.NOT_A_CHECKPOINT, str(tmp_path), "v5e-1", "decode")


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("decode", {"remat": "full"}, "--remat full is of training, and the task is decode"),
        ("prefill", {"optimizer": "lion"}, "--optimizer lion is of training"),
        ("decode", {"first_moment": "bfloat16"}, "--first_moment bfloat16 is of training"),
        ("train", {"quantize": "int8"}, "--quantize int8 is of inference"),
        ("train", {"cache_dtype": "int8"}, "--cache_dtype int8 is of inference"),
        ("decode", {"cache_dtype": "int4"}, "--cache_dtype is 'int4', expected one of auto, int8"),
        ("decode", {"quantize": "int4"}, "--quantize is 'int4', expected one of int8"),
        ("train", {"optimizer": "sgd", "first_moment": "bfloat16"}, "--first_moment is of adamw and lion"),
        ("train", {"remat": "some"}, "--remat is 'some', expected one of none, projections, full"),
        ("serve", {}, "--task is 'serve', expected one of train, decode, prefill"),
        ("train", {"dtype": "float16"}, "--dtype is 'float16', expected one of bfloat16, float32"),
        ("train", {"batch": 0}, "--batch is 0, expected 1 or more"),
        ("decode", {"length": -1}, "--length is -1, expected 1 or more"),
        ("decode", {"length": 4097}, "--length is 4,097, and llama2_7b is made for 4,096 tokens"),
    ],
)
def test_what_means_nothing_is_refused(task, more, said):
    assert said in refused(ExitCode.BAD_REQUEST, "llama2_7b", "v5e-8", task, **more)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({"fsdp": -1, "data": -1}, "mesh.data and mesh.fsdp are both -1"),
        ({"data": 3, "fsdp": 1, "tensor": 1}, "is 3 devices, and there are 8"),
        ({"fsdp": 3}, "is 3 devices times tensor=-1, and there are 8"),
        ({"tensor": 0}, "mesh.tensor is 0"),
        ({"dcn_data": 2}, "--dcn_data is 2, and v5e-8 has 1 slice: they must be equal"),
    ],
)
def test_a_mesh_that_is_none_is_refused(mesh, said):
    assert said in refused(ExitCode.BAD_MESH, "llama2_7b", "v5e-8", "decode", mesh=mesh)


def test_a_training_batch_must_divide_over_the_mesh():
    assert "a batch of 12 is not divisible" in refused(
        ExitCode.BAD_MESH, "llama2_7b", "v5e-8", "train", batch=12, mesh={"fsdp": 8}
    )


def test_remat_policies_are_the_models():
    from llama_jax.model.stack import REMAT_POLICIES

    assert set(REMAT) == set(REMAT_POLICIES) - {"offload"}


def test_optimizers_are_trainings():
    from llama_jax.training import optimizer

    assert set(OPTIMIZERS) == set(optimizer.OPTIMIZERS) - {"adafactor", "muon", "schedule_free"}
