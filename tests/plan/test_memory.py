"""Bytes per device, against numbers worked out by hand and against arrays that jax would make."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

from llama_jax import sharding
from llama_jax.config import PRESETS
from llama_jax.mesh import MeshShape, legal_meshes
from llama_jax.model.params import param_axes, param_shapes
from llama_jax.model.quantize import quantize_params
from llama_jax.ops import loss
from llama_jax.plan import memory
from llama_jax.plan.chips import GIB
from llama_jax.plan.memory import (
    cache_bytes,
    copied_bytes,
    gathered_bytes,
    gradient_bytes,
    has_flash_attention,
    head_bytes,
    layer_values,
    logits_bytes,
    optimizer_bytes,
    plan_memory,
    saved_bytes,
    score_bytes,
    weight_bytes,
    width,
)
from llama_jax.plan.request import OPTIMIZERS, make_request
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer

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
    rounded = dataclasses.replace(request, cache_dtype="int8")
    head_dim = request.config.head_dim
    assert cache_bytes(rounded, MeshShape(tensor=8)) == 4000 * per_token / 8 * (head_dim + 4) / (2 * head_dim)


def test_key_value_heads_are_repeated_where_tensor_is_larger():
    request = make_request("llama2_70b", "v5e-16", "decode", batch=1, length=1000)
    assert cache_bytes(request, MeshShape(tensor=16)) == cache_bytes(request, MeshShape(tensor=8))


def test_70b_in_training_over_64_devices():
    """fsdp 16 x tensor 4: 68,976,648,192 parameters at 12 bytes over 64, and whole norms: 12.06 GiB of arguments (compiled for
    v5p with libtpu 0.0.42.1); peak 18.9 GiB at 16 sequences of 4,096."""
    request = make_request("llama2_70b", "v5p-128", "train", batch=16, length=4096)
    memory = plan_memory(request, MeshShape(fsdp=16, tensor=4))
    norms = 161 * 8192
    assert memory.weights == 4 * ((68_976_648_192 - norms) / 64 + norms)
    layers = 80 * 4 * ((2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 64 + 2 * 8192)
    assert memory.optimizer == 2 * memory.weights
    assert memory.gradients == layers
    assert memory.arguments / GIB == pytest.approx(12.06, abs=0.01)
    assert memory.total / GIB == pytest.approx(18.9, rel=0.05)
    assert memory.activations == 80 * 1 * 4096 * 8192 * 2 / 4  # each layer's input, a quarter of the sequence


@pytest.mark.parametrize(
    ("optimizer", "first_moment"),
    [*((name, "float32") for name in OPTIMIZERS), ("adamw", "bfloat16"), ("lion", "bfloat16")],
)
@pytest.mark.parametrize("preset", ["tiny", "llama3_2_1b"])
def test_optimizer_state_is_what_training_allocates(optimizer, first_moment, preset):
    made = make_optimizer(OptimizerConfig(optimizer, moment_dtype=first_moment), param_axes(PRESETS[preset]))
    state = jax.eval_shape(made.init, param_shapes(PRESETS[preset]))
    request = make_request(preset, "h200", "train", optimizer=optimizer, first_moment=first_moment, batch=1)
    assert optimizer_bytes(request, ONE) == pytest.approx(tree_bytes(state), abs=16)  # counters


def test_a_bfloat16_first_moment_is_half_of_it():
    full, half = (make_request("llama2_7b", "h200", "train", first_moment=d) for d in ("float32", "bfloat16"))
    assert optimizer_bytes(full, ONE) - optimizer_bytes(half, ONE) == 2 * 6_738_415_616


def test_each_remat_policy_keeps_what_jax_says_it_saves():
    """One layer of llama2_7b at tensor=2, per token: half of D=4096, 16 heads of 128, 5504 of the MLP."""
    per_token = {
        "full": 2048 * 2,
        "projections": 2 * (2048 + 3 * 2048 + 2 * 2048 + 2 * 5504 + 2048) + 4 * 16,
        "none": 2048 * 16 + 2 * 5 * 2048 + 4 * 16 + 5504 * 18,
    }
    for remat, expected in per_token.items():
        request = make_request("llama2_7b", "v5p-8", "train", batch=2, length=1024, remat=remat)
        assert saved_bytes(request, MeshShape(fsdp=2, tensor=2)) == 32 * 1024 * expected, remat


def test_plain_attention_holds_scores_and_the_kernels_do_not():
    kernel, plain = (make_request("llama2_7b", "h200-4", "train", batch=4, length=T) for T in (4096, 4000))
    assert has_flash_attention(kernel) and not has_flash_attention(plain)
    assert layer_values(plain, ONE) - layer_values(kernel, ONE) == score_bytes(plain, ONE) == (4 + 2) * 4000 * 32
    for chip in ("v5p-8", "h200-4"):
        assert has_flash_attention(make_request("llama2_7b", chip, "train"))
        assert not has_flash_attention(make_request("llama2_7b", chip, "train", length=1000))
        assert not has_flash_attention(make_request("llama2_7b", chip, "train", dtype="float32"))
        assert not has_flash_attention(make_request("tiny", chip, "train", length=128))


def test_a_sequence_that_tensor_does_not_divide_is_whole_between_layers():
    request = make_request("llama2_7b", "v5p-8", "train", batch=2, length=1022)
    assert width(request, MeshShape(fsdp=2, tensor=2)) == 2048 and width(request, MeshShape(tensor=4)) == 4096


def test_gathered_weights_are_a_layers_over_tensor():
    attention, mlp, norms = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28672, 2 * 8192
    request = make_request("llama2_70b", "v5p-128", "train", batch=16)
    assert gathered_bytes(request, MeshShape(fsdp=16, tensor=4)) == 2 * ((attention + mlp * 2 / 3) / 4 + norms)
    decode = make_request("llama2_70b", "v5p-128", "decode", quantize="int8")
    assert gathered_bytes(decode, MeshShape(tensor=64)) == 0
    assert gathered_bytes(decode, MeshShape(fsdp=64)) == pytest.approx(2 * (attention + mlp), rel=1e-3)


def test_the_loss_leaves_its_logits_or_the_heads_gradient():
    """Llama 2 70B, 4,096 tokens a device: logits of 8,000 columns are one chunk of 125 MiB, of 32,000 two."""
    request = make_request("llama2_70b", "v5p-128", "train", batch=16, length=4096)
    states = 4096 * 8192 * 2
    assert head_bytes(request, MeshShape(fsdp=16, tensor=4)) == 4 * 4096 * 8000 + states + states / 4 + states
    assert head_bytes(request, MeshShape(fsdp=16)) == 4 * 32000 * 8192 + 2 * states
    decode = make_request("llama2_7b", "h200", "decode", batch=3)
    assert logits_bytes(decode, ONE) == 2 * 4 * 3 * 32000


def test_chunks_of_logits_are_the_losss():
    assert memory.LOGITS_BYTES == loss.LOGITS_BYTES


def test_a_loop_holds_gradients_and_activations_of_all_layers_and_unrolled_layers_do_not():
    tpu, gpu = (
        plan_memory(make_request("llama2_7b", name, "train", batch=8), MeshShape(fsdp=8)) for name in ("v5p-16", "h200-8")
    )
    assert tpu.temporary == tpu.copies + tpu.activations + tpu.gradients + tpu.head + tpu.layer
    assert gpu.temporary == max(gpu.activations, gpu.gradients) + gpu.head + gpu.layer


def test_gradients_of_the_mlp_fill_a_tpus_lanes_where_fsdp_is_the_whole_mesh():
    """70B on 256: 32 of embed on a device, of 128 lanes."""
    request = make_request("llama2_70b", "v6e-256", "train")
    attention, mlp, norms = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28672, 2 * 8192
    assert gradient_bytes(request, MeshShape(fsdp=256)) == 80 * 4 * (attention / 256 + 4 * mlp / 256 + norms)
    for mesh in (MeshShape(fsdp=64, tensor=4), MeshShape(fsdp=128, tensor=2)):
        assert gradient_bytes(request, mesh) == 80 * 4 * ((attention + mlp) / 256 + norms)
    assert memory.WIDE_FSDP == sharding.WIDE_FSDP


def test_tpus_keep_o_proj_in_another_layout():
    train = make_request("llama2_70b", "v5p-128", "train", batch=16)
    assert copied_bytes(train, MeshShape(fsdp=16, tensor=4)) == 80 * 4 * 8192 * 8192 / 64
    assert copied_bytes(make_request("llama2_70b", "v5p-16", "prefill"), MeshShape(tensor=8)) == 0
    bf16, int8 = (make_request("llama2_70b", "v5p-16", "decode", quantize=q) for q in (None, "int8"))
    assert copied_bytes(bf16, MeshShape(tensor=8)) == 80 * 2 * 8192 * 8192 / 8
    assert copied_bytes(int8, MeshShape(tensor=8)) == 80 * (8192 * 8192 / 8 + 4 * 8192)
    assert copied_bytes(make_request("llama2_70b", "h200-8", "decode"), MeshShape(tensor=8)) == 0


def test_a_v7x_keeps_bfloat16_weights_in_other_tiles_to_decode():
    """Llama 2 13B at tensor=4; 5.4 GiB by libtpu 0.0.42.1."""
    request = make_request("llama2_13b", "v7x-8", "decode")
    layer = (3 * 5120 * 5120 + 3 * 5120 * 13824) / 4
    assert copied_bytes(request, MeshShape(data=2, tensor=4)) == 2 * (40 * layer + 32000 * 5120 / 4)


SIZES = {field.name for field in dataclasses.fields(memory.Memory)}
STEADY = SIZES - {"head"}  # the loss leaves its logits or, when they are more than a chunk, the head's gradient


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
        assert all(getattr(there, name) >= getattr(here, name) for name in STEADY)
    if mesh.data % 2 == 0:  # copies become shards
        cut = dataclasses.replace(mesh, data=mesh.data // 2, fsdp=2 * mesh.fsdp)
        if request.config.embed_dim % cut.fsdp == 0:
            assert weight_bytes(request, cut) < weight_bytes(request, mesh)
            assert gradient_bytes(request, cut) <= gradient_bytes(request, mesh)


def test_a_tied_head_is_counted_once():
    cfg = PRESETS["llama3_2_1b"]
    assert weight_bytes(make_request("llama3_2_1b", "h200", "decode"), ONE) == 2 * cfg.num_params
