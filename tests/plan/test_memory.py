"""Bytes per device, against numbers worked out by hand and against arrays that jax would make."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given

from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape, legal_meshes
from llama_jax.model.params import param_shapes
from llama_jax.model.quantize import quantize_params
from llama_jax.plan.chips import GIB
from llama_jax.plan.memory import (
    cache_bytes,
    gathered_bytes,
    gradient_bytes,
    has_flash_attention,
    head_bytes,
    layer_values,
    optimizer_bytes,
    plan_memory,
    saved_bytes,
    weight_bytes,
)
from llama_jax.plan.request import make_request

ONE = MeshShape()


def tree_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "dtype", "size"),
    [
        ("llama2_7b", "bfloat16", 13_476_831_232),
        ("llama2_7b", "float32", 26_953_662_464),
        ("llama2_70b", "bfloat16", 137_953_296_384),
    ],
)
def test_weights_are_parameters_times_bytes(model, dtype, size):
    assert weight_bytes(make_request(model, "h200", "decode", dtype=dtype), ONE) == size


@pytest.mark.parametrize("preset", ["tiny", "llama3_2_1b"])
def test_int8_weights_are_the_bytes_of_the_quantised_tree(preset):
    cfg = PRESETS[preset]
    tree = jax.eval_shape(quantize_params, param_shapes(cfg, jnp.bfloat16))
    assert weight_bytes(make_request(preset, "h200", "decode", length=64, quantize="int8"), ONE) == tree_bytes(tree)


@pytest.mark.parametrize(("model", "per_token"), [("llama2_7b", 524_288), ("llama2_70b", 327_680)])
def test_a_token_in_the_cache(model, per_token):
    request = make_request(model, "v5p-128", "decode", batch=4, length=1000)
    assert cache_bytes(request, ONE) == 4000 * per_token
    assert cache_bytes(request, MeshShape(tensor=8)) == 4000 * per_token / 8
    assert cache_bytes(request, MeshShape(fsdp=2, tensor=8)) == 2000 * per_token / 8
    assert cache_bytes(request, MeshShape(data=3)) == 2000 * per_token  # 4 rows over 3: filled up to 6


def test_key_value_heads_are_repeated_where_tensor_is_larger():
    request = make_request("llama2_70b", "v5e-16", "decode", batch=1, length=1000)
    assert cache_bytes(request, MeshShape(tensor=16)) == cache_bytes(request, MeshShape(tensor=8))


def test_70b_in_training_over_64_devices():
    """fsdp 16 x tensor 4: 68,976,648,192 parameters at 12 bytes over 64, and whole norms: 12.06 GiB of arguments (compiled for
    v5p with libtpu 0.0.42.1); peak 24.1 GiB at 16 sequences of 4,096."""
    request = make_request("llama2_70b", "v5p-128", "train", batch=16, length=4096)
    memory = plan_memory(request, MeshShape(fsdp=16, tensor=4))
    norms = 161 * 8192
    assert memory.weights == 4 * ((68_976_648_192 - norms) / 64 + norms)
    assert memory.optimizer == 2 * memory.weights and memory.gradients == memory.weights
    assert memory.arguments / GIB == pytest.approx(12.06, abs=0.01)
    assert memory.total / GIB == pytest.approx(24.1, rel=0.25)
    assert memory.activations == 80 * 1 * 4096 * 8192 * 2  # each layer's input


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize("preset", ["tiny", "llama3_2_1b"])
def test_optimizer_state_is_what_optax_allocates(optimizer, preset):
    made = {"adamw": optax.adamw, "lion": optax.lion, "adafactor": optax.adafactor, "sgd": optax.sgd}[optimizer](1e-3)
    state = jax.eval_shape(made.init, param_shapes(PRESETS[preset], scan=True))
    request = make_request(preset, "h200", "train", optimizer=optimizer, batch=1)
    assert optimizer_bytes(request, ONE) == pytest.approx(tree_bytes(state), rel=1e-5, abs=400)  # counters and (1,) dummies


def test_a_bfloat16_first_moment_is_half_of_it():
    full, half = (make_request("llama2_7b", "h200", "train", first_moment=d) for d in ("float32", "bfloat16"))
    assert optimizer_bytes(full, ONE) - optimizer_bytes(half, ONE) == 2 * 6_738_415_616


def test_each_remat_policy_keeps_what_jax_says_it_saves():
    """One layer of llama2_7b at tensor=2, per token: D=4096, 16 heads of 128 and 5504 of the MLP on this device."""
    per_token = {
        "full": 4096 * 2,
        "projections": 2 * (4096 + 3 * 2048 + 2 * 2048 + 2 * 5504 + 4096) + 4 * 16,
        "none": 4096 * 16 + 2 * 5 * 2048 + 4 * 16 + 5504 * 18,
    }
    for remat, expected in per_token.items():
        request = make_request("llama2_7b", "v5p-8", "train", batch=2, length=1024, remat=remat)
        assert saved_bytes(request, MeshShape(fsdp=2, tensor=2)) == 32 * 1024 * expected, remat


def test_plain_attention_holds_scores_and_splash_does_not():
    tpu, gpu = (make_request("llama2_7b", name, "train", batch=4) for name in ("v5p-8", "h200-4"))
    assert has_flash_attention(tpu) and not has_flash_attention(gpu)
    assert layer_values(gpu, ONE) - layer_values(tpu, ONE) == 11 * 4096 * 32
    assert not has_flash_attention(make_request("llama2_7b", "v5p-8", "train", length=1000))
    assert not has_flash_attention(make_request("tiny", "v5p-8", "train", length=128))


def test_gathered_weights_are_a_layers_over_tensor():
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    request = make_request("llama2_70b", "v5p-128", "train", batch=16)
    norms = 2 * 8192
    assert gathered_bytes(request, MeshShape(fsdp=16, tensor=4)) == (2 * 2 + 4) * (layer / 4 + norms)
    decode = make_request("llama2_70b", "v5p-128", "decode", quantize="int8")
    assert gathered_bytes(decode, MeshShape(tensor=64)) == 0
    assert gathered_bytes(decode, MeshShape(fsdp=64)) == pytest.approx(2 * layer, rel=1e-3)


def test_logits_of_training_come_in_chunks():
    """V'=32000 at tensor=4: 8000 columns of 1,024 tokens, twice, in float32, and the head in bfloat16 and float32."""
    request = make_request("llama2_70b", "v5p-128", "train", batch=16, length=4096)
    hidden = 4096 * 8192 * 6
    assert head_bytes(request, MeshShape(fsdp=16, tensor=4)) == 2 * 4 * 1024 * 8000 + 8000 * 8192 * 6 + hidden
    decode = make_request("llama2_7b", "h200", "decode", batch=3)
    assert head_bytes(decode, ONE) == 2 * 4 * 3 * 32000


SIZES = [f.name for f in dataclasses.fields(type(plan_memory(make_request("tiny", "h200", "decode", length=8), ONE)))]


@given(
    preset=st.sampled_from(["llama2_7b", "llama2_70b", "llama3_8b", "llama3_2_1b"]),
    devices=st.sampled_from([1, 4, 8, 16, 64]),
    task=st.sampled_from(["train", "decode", "prefill"]),
    data=st.data(),
)
def test_more_sequences_or_tokens_never_take_less_and_more_shards_never_more(preset, devices, task, data):
    request = make_request(preset, f"v5e-{devices}", task, length=512, batch=64)
    mesh = data.draw(st.sampled_from(list(legal_meshes(request.config, devices, batch_size=64))))
    here = plan_memory(request, mesh)
    assert all(getattr(here, name) >= 0 for name in SIZES)
    for larger in (dataclasses.replace(request, batch=128), dataclasses.replace(request, length=1024)):
        there = plan_memory(larger, mesh)
        assert all(getattr(there, name) >= getattr(here, name) for name in SIZES)
    if mesh.data % 2 == 0:  # copies become shards
        cut = dataclasses.replace(mesh, data=mesh.data // 2, fsdp=2 * mesh.fsdp)
        if request.config.embed_dim % cut.fsdp == 0:
            assert weight_bytes(request, cut) < weight_bytes(request, mesh)
            assert gradient_bytes(request, cut) < gradient_bytes(request, mesh)


def test_a_tied_head_is_counted_once():
    cfg = PRESETS["llama3_2_1b"]
    assert weight_bytes(make_request("llama3_2_1b", "h200", "decode"), ONE) == 2 * cfg.num_params
