"""Predicted seconds against floors worked out by hand."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama_jax.mesh import MeshShape, legal_meshes
from llama_jax.plan.request import make_request
from llama_jax.plan.timing import linear_params, plan_timing, recomputed_flops, step_flops

ONE = MeshShape()


@pytest.mark.parametrize(
    ("topology", "quantize", "tokens_per_second"),
    [
        ("v5e-1", None, 61), ("v5e-1", "int8", 119), ("v6e-1", None, 121), ("v6e-1", "int8", 238),
        ("h100", None, 248), ("h100", "int8", 487), ("h200", None, 356),
    ],
)  # fmt: skip
def test_decode_is_at_the_floor_of_hbm(topology, quantize, tokens_per_second):
    """Llama 2 7B, one sequence, 512 tokens in the cache: (13.21 GB or 6.61 GB + 512 x 524,288 B) / bandwidth."""
    timing = plan_timing(make_request("llama2_7b", topology, "decode", batch=1, length=512, quantize=quantize), ONE)
    assert timing.tokens_per_second == pytest.approx(tokens_per_second, rel=0.01)
    assert timing.bound == "HBM" and timing.ici_seconds == timing.dcn_seconds == 0


@pytest.mark.parametrize(
    ("batch", "length", "quantize", "milliseconds"),
    [(8, 2048, None, 4.54), (64, 4096, None, 31.4), (8, 4096, "int8", 4.96), (32, 2048, "int8", 8.54)],
)
def test_decode_on_h200_reads_weights_and_cache(batch, length, quantize, milliseconds):
    timing = plan_timing(make_request("llama2_7b", "h200", "decode", batch=batch, length=length, quantize=quantize), ONE)
    assert timing.step_seconds * 1e3 == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize(("length", "milliseconds"), [(2048, 35.0), (4096, 72.7)])
def test_prefill_on_h200_is_bound_by_flops(length, milliseconds):
    """At 790 TFLOP/s; logits of the last token only."""
    timing = plan_timing(make_request("llama2_7b", "h200", "prefill", length=length), ONE)
    assert timing.compute_seconds * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_flops_of_training():
    """Llama 2 7B at 4,096 tokens: 42.9 GFLOP a token; remat full adds a forward pass, projections only the head's."""
    request = make_request("llama2_7b", "h200", "train", batch=1, length=4096)
    assert linear_params(request.config) == (6_476_005_376, 131_072_000)
    assert step_flops(request) / 4096 == pytest.approx(42.9e9, rel=2e-3)
    assert recomputed_flops(request) == pytest.approx(step_flops(request) / 3)
    kept = dataclasses.replace(request, remat="projections")
    assert recomputed_flops(kept) == 2 * 32000 * 4096 * 4096
    assert plan_timing(kept, ONE).compute_seconds < plan_timing(request, ONE).compute_seconds


def test_a_share_of_the_peak_leaves_out_what_is_computed_twice():
    timing = plan_timing(make_request("llama2_7b", "v5p-128", "train", batch=64), MeshShape(fsdp=64))
    assert timing.bound == "FLOPs"
    assert timing.flops_share == pytest.approx(0.8 * 3 / 4, rel=1e-3)
    assert timing.tokens_per_second * timing.step_seconds == pytest.approx(64 * 4096)


def test_fsdp_across_slow_wires_is_what_bounds_a_small_batch():
    """70B on v5e, one sequence of 512 a device: gathers cannot hide."""
    request = make_request("llama2_70b", "v5e-256", "train", batch=256, length=512)
    timing = plan_timing(request, MeshShape(fsdp=256))
    assert timing.bound == "ICI" and timing.step_seconds == pytest.approx(timing.ici_seconds)


def test_slices_reduce_gradients_over_the_network():
    request = make_request("llama2_7b", "2xv5e-16", "train")
    timing = plan_timing(request, MeshShape(fsdp=16, dcn_data=2))
    own = 4 * 6_738_415_616 / 16
    assert timing.dcn_seconds == pytest.approx(own / (25e9 / 8), rel=1e-3)  # 2 x half of it, 25 Gbit/s a chip
    assert plan_timing(make_request("llama2_7b", "v5e-16", "train"), MeshShape(fsdp=16)).dcn_seconds == 0


def test_collectives_of_tensor_are_added_five_and_a_half_all_reduces_a_layer():
    request = make_request("llama2_7b", "v5p-8", "train", batch=4, length=2048)
    timing = plan_timing(request, MeshShape(tensor=4))
    nbytes = 4 * 2048 * 4096 * 2
    assert timing.ici_seconds == pytest.approx((5.5 * 32 + 3) * 2 * 0.75 * nbytes / (2 * 90e9))
    assert timing.step_seconds == pytest.approx(max(timing.compute_seconds, timing.hbm_seconds) + timing.ici_seconds)
    kept = plan_timing(dataclasses.replace(request, remat="none"), MeshShape(tensor=4))
    assert kept.ici_seconds / timing.ici_seconds == pytest.approx((5 * 32 + 3) / (5.5 * 32 + 3))


def test_rows_that_only_fill_up_a_batch_cost_time():
    request = make_request("llama2_7b", "v5e-8", "prefill", batch=1)
    filled = plan_timing(request, MeshShape(data=8))
    assert filled.compute_seconds == pytest.approx(plan_timing(request, ONE).compute_seconds)


@given(
    preset=st.sampled_from(["llama2_7b", "llama2_70b", "llama3_8b"]),
    topology=st.sampled_from(["v5e-16", "v5p-32", "v7x-16", "2xv6e-8", "h100-8x2", "t4-4"]),
    task=st.sampled_from(["train", "decode", "prefill"]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    data=st.data(),
)
def test_a_step_takes_at_least_its_largest_term(preset, topology, task, dtype, data):
    request = make_request(preset, topology, task, batch=32, length=512, dtype=dtype)
    where = request.topology
    legal = list(legal_meshes(request.config, where.num_devices, dcn_data=where.slices, batch_size=32))
    timing = plan_timing(request, data.draw(st.sampled_from(legal)))
    terms = {"FLOPs": timing.compute_seconds, "HBM": timing.hbm_seconds, "ICI": timing.ici_seconds, "DCN": timing.dcn_seconds}
    assert all(term >= 0 for term in terms.values())
    assert max(terms.values()) * (1 - 1e-9) <= timing.step_seconds <= sum(terms.values()) * (1 + 1e-9)
    assert timing.bound == max(terms, key=terms.__getitem__)
    assert 0 < timing.flops_share <= 0.8 + 1e-9


def test_inference_all_reduces_twice_a_layer_and_gathers_the_logits():
    timing = plan_timing(make_request("llama2_7b", "v5p-8", "prefill", batch=4, length=2048), MeshShape(tensor=4))
    reduced, logits = (2 * 32 + 1) * 2 * 4 * 2048 * 4096 * 2, 4 * 32000 * 4
    assert timing.ici_seconds == pytest.approx(0.75 * (reduced + logits) / (2 * 90e9))


def test_decode_with_fsdp_writes_gathered_weights_before_it_reads_them():
    request = make_request("llama2_7b", "v5p-8", "decode", batch=4, length=512)
    read = 2 * (6_738_415_616 - 32000 * 4096)
    timing = plan_timing(request, MeshShape(fsdp=4))
    assert timing.hbm_seconds == pytest.approx((2 * read + 512 * 524_288) / 2765e9)
    assert timing.bound == "ICI" and timing.ici_seconds == pytest.approx(0.75 * 2 * 6_738_415_616 / 180e9, rel=1e-3)
