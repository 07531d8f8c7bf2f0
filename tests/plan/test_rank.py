"""Order of meshes, the largest batch, and what to change when nothing fits."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape, legal_meshes
from llama_jax.plan.rank import cheapest_changes, largest_batch, plan_on, plans
from llama_jax.plan.request import make_request

TOPOLOGIES = st.sampled_from(["v5e-4", "v5e-16", "v5p-32", "v7x-16", "2xv6e-8", "h100-8", "a100-40-8x2", "t4"])


@given(
    preset=st.sampled_from(["llama2_7b", "llama2_13b", "llama2_70b", "llama3_2_1b"]),
    topology=TOPOLOGIES,
    task=st.sampled_from(["train", "decode", "prefill"]),
)
def test_every_legal_mesh_is_there_and_those_that_fit_come_first_by_time(preset, topology, task):
    request = make_request(preset, topology, task)
    found, where = plans(request), request.topology
    batch = request.batch if task == "train" else None
    legal = legal_meshes(request.config, where.num_devices, dcn_data=where.slices, batch_size=batch)
    assert {plan.mesh for plan in found} == set(legal) and len(found) == len({plan.mesh for plan in found})
    fitting = [plan for plan in found if plan.fits]
    assert found[: len(fitting)] == fitting
    assert fitting == sorted(fitting, key=lambda plan: plan.timing.step_seconds)
    missing = [-plan.spare_bytes for plan in found[len(fitting) :]]
    assert missing == sorted(missing)
    for plan in found:
        assert plan.fits == (plan.memory.total <= where.chip.hbm_bytes)


@given(preset=st.sampled_from(["llama2_7b", "llama2_70b"]), topology=TOPOLOGIES, task=st.sampled_from(["train", "decode"]))
def test_the_largest_batch_fits_and_the_next_does_not(preset, topology, task):
    request = make_request(preset, topology, task, length=1024)
    best = plans(request)[0]
    batch = largest_batch(request, best.mesh)
    step = best.mesh.batch_shards
    assert batch % step == 0 and (batch > 0 or not best.fits)
    if batch:
        assert plan_on(dataclasses.replace(request, batch=batch), best.mesh).fits
    assert not plan_on(dataclasses.replace(request, batch=batch + step), best.mesh).fits


def test_a_mesh_asked_for_is_the_only_one():
    request = make_request("llama2_7b", "v5e-8", "decode", mesh={"data": 2, "tensor": 4})
    assert [plan.mesh for plan in plans(request)] == [MeshShape(data=2, tensor=4)]


def test_a_batch_that_no_mesh_divides_is_refused():
    request = make_request("llama2_13b", "2xv5e-16", "train", batch=3)
    with pytest.raises(LlamaError, match="batch of 3: a multiple of 2") as caught:
        plans(request)
    assert caught.value.code == ExitCode.BAD_MESH


@given(
    preset=st.sampled_from(["llama2_7b", "llama2_13b", "llama2_70b"]),
    topology=st.sampled_from(["v5e-1", "v5e-8", "v4-8", "h100", "a100-40-2", "t4-4"]),
    task=st.sampled_from(["train", "decode", "prefill"]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_changes_fit_are_the_cheapest_first_and_change_something(preset, topology, task, dtype):
    request = make_request(preset, topology, task, dtype=dtype)
    changes = cheapest_changes(request)
    assert len(changes) <= 3 and [c.cost for c in changes] == sorted(c.cost for c in changes)
    for change in changes:
        assert change.best.fits and change.request != request and change.text.startswith("--")
        assert plans(change.request)[0] == change.best


def test_70b_on_one_h200_wants_int8_first():
    texts = [change.text for change in cheapest_changes(make_request("llama2_70b", "h200", "decode"))]
    assert texts == ["--quantize int8", "--topology h200-2"]


def test_the_mildest_degree_that_fits_is_proposed():
    """7B at 64 sequences of 4,096: 128 GiB of cache beside 12.55 of weights on an H200."""
    changes = {c.text: c for c in cheapest_changes(make_request("llama2_7b", "h200", "decode", batch=64, length=4096))}
    assert list(changes) == ["--cache_dtype int8", "--batch 32", "--length 2048"]
    request = changes["--batch 32"].request
    assert not plan_on(dataclasses.replace(request, batch=64), MeshShape()).fits


def test_training_on_more_devices_keeps_the_sequences_per_device():
    changes = cheapest_changes(make_request("llama2_13b", "v5e-8", "train"))
    (larger,) = (c for c in changes if c.request.topology.name == "v5e-16")
    assert larger.request.batch == 16 and larger.text == "--topology v5e-16 --batch 16"


def test_two_changes_at_once_where_one_is_not_enough():
    """7B in float32 on a T4: 25.1 GiB of weights and 16 of cache; int8 weights leave 2 of 8 sequences, 8 in int8."""
    changes = cheapest_changes(make_request("llama2_7b", "t4", "decode", dtype="float32"))
    assert [c.text for c in changes] == ["--quantize int8 --cache_dtype int8", "--quantize int8 --batch 2", "--topology t4-4"]
