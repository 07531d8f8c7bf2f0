"""Attention to the cache by the kernels of other platforms, interpreted on the CPU, against what the CPU computes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax.mesh import cache_heads
from llama_jax.model.attention import attend_and_write
from llama_jax.model.cache import LayerCache
from llama_jax.ops.kernels import decode, flash, ragged, ragged_chunk
from llama_jax.ops.qarray import quantize_vectors
from tests.make_mesh import equations, mesh_of, on

ROWS, HEADS, KV_HEADS, SLOTS, HEAD_DIM = 8, 8, 2, 128, 128
POSITIONS = np.array([0, 1, 5, 63, 64, 100, 126, 127], np.int32)[:, None]


def draw(K: int, T: int = 1, dtype=ml_dtypes.bfloat16, slots: int = SLOTS) -> tuple:
    """Arguments of attend_and_write, of a cache of K heads."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(ROWS, T, heads, HEAD_DIM)).astype(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    angles = rng.uniform(0, 6, (ROWS, T, HEAD_DIM // 2))
    cache = LayerCache(*(jnp.asarray(rng.normal(size=(ROWS, K, slots, HEAD_DIM)), dtype) for _ in range(2)))
    return q, k, v, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), cache, POSITIONS


@pytest.fixture(params=["cuda", "tpu"])
def elsewhere(request, monkeypatch):
    """Programs are traced as for another platform, whose kernels are interpreted; returns their calls."""
    called = []

    def choose(*args, default=None, **branches):
        return branches.get(request.param, branches.get("cpu", default))(*args)

    for module, name in ((decode, "rotate_append_attend"), (ragged, "attend_ragged")):
        kernel = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, lambda *args, name=name, kernel=kernel: called.append(name) or kernel(*args))
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    yield called
    assert called == [{"cuda": "rotate_append_attend", "tpu": "attend_ragged"}[request.param]]


@pytest.mark.parametrize("name", [None, "8x1x1", "1x1x8", "2x2x2"])
def test_a_kernel_computes_what_a_cpu_computes(elsewhere, name):
    """On a mesh, too; where it has more devices on tensor than key/value heads, these are repeated."""
    mesh = None if name is None else mesh_of(name)
    args = draw(cache_heads(KV_HEADS, 1 if mesh is None else mesh.shape["tensor"]))
    with on(mesh):
        out, cache = jax.jit(lambda *args: attend_and_write(*args))(*args)
        alone = jax.jit(lambda *args: attend_and_write(*args, kernels=False))(*args)
    np.testing.assert_allclose(out.astype(np.float32), alone[0].astype(np.float32), rtol=0, atol=0.02)
    for ours, wanted in zip(cache, alone[1], strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("name", [None, "2x2x2"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_tokens_that_follow_others_are_attended_to_by_a_kernel(monkeypatch, platform, name, in_int8):
    """Rows of 128 tokens that begin at different places."""
    mesh, calls = None if name is None else mesh_of(name), []
    module, function = {"cuda": (flash, "attend_flash_cached"), "tpu": (ragged_chunk, "attend_ragged_chunk")}[platform]
    choose, right = jax.lax.platform_dependent, getattr(module, function)

    def elsewhere(*args, default=None, **branches):
        return branches[platform](*args) if platform in branches else choose(*args, default=default, **branches)

    def kernel(*args):
        calls.append(args[0].shape)
        return right(*args, interpret=True)

    q, k, v, _, _, cache, _ = draw(cache_heads(KV_HEADS, 1 if mesh is None else mesh.shape["tensor"]), T=128, slots=256)
    cache = LayerCache(*map(quantize_vectors, cache)) if in_int8 else cache
    starts = np.array([0, 1, 5, 63, 64, 128, 12, 127])[:, None]
    positions = starts + np.arange(128)
    angles = positions[..., None] * 0.01 * np.arange(1, HEAD_DIM // 2 + 1)
    args = (q, k, v, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), cache, positions.astype(np.int32))
    with on(mesh):
        alone, there = jax.jit(functools.partial(attend_and_write, kernels=False))(*args)
        monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
        monkeypatch.setattr(module, function, kernel)
        out, here = jax.jit(lambda *args: attend_and_write(*args))(*args)
    assert len(calls) == 1
    np.testing.assert_allclose(out.astype(np.float32), alone.astype(np.float32), rtol=0, atol=0.02)
    for ours, wanted in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def rounded(args: tuple) -> tuple:
    *inputs, cache, positions = args
    return *inputs, LayerCache(*map(quantize_vectors, cache)), positions


@pytest.mark.parametrize("name", [None, "1x1x8"])
def test_a_kernel_reads_and_writes_an_int8_cache(elsewhere, name):
    mesh = None if name is None else mesh_of(name)
    args = rounded(draw(cache_heads(KV_HEADS, 1 if mesh is None else mesh.shape["tensor"])))
    with on(mesh):
        out, cache = jax.jit(lambda *args: attend_and_write(*args))(*args)
        alone = jax.jit(lambda *args: attend_and_write(*args, kernels=False))(*args)
    np.testing.assert_allclose(out.astype(np.float32), alone[0].astype(np.float32), rtol=0, atol=0.02)
    for ours, wanted in zip(cache, alone[1], strict=True):
        assert np.max(np.abs(np.asarray(ours.value, int) - np.asarray(wanted.value, int))) <= 1  # a tie
        np.testing.assert_allclose(ours.scale, wanted.scale, rtol=0.01)  # of keys in bfloat16, or before they are


def kernels(*args, **options) -> list[str]:
    program = functools.partial(attend_and_write, **options)
    return [str(e.params["name"]) for e in equations(program, *args) if e.primitive.name == "pallas_call"]


def test_of_single_tokens_in_half_precision_platforms_have_kernels_where_they_are_allowed():
    found = kernels(*draw(KV_HEADS))
    assert len(found) == 3 and set(found) == {"ragged_attention", "decode_attention", "decode_attention_merge"}
    assert sorted(kernels(*rounded(draw(KV_HEADS)))) == sorted(found)
    assert not kernels(*draw(KV_HEADS), kernels=False)


@pytest.mark.parametrize("T, dtype", [(2, ml_dtypes.bfloat16), (1, np.float32)])
def test_of_several_tokens_and_of_float32_there_are_none(T, dtype):
    assert not kernels(*draw(KV_HEADS, T, dtype))


def test_of_a_cache_in_another_dtype_there_are_none():
    *args, cache, positions = draw(KV_HEADS)
    assert not kernels(*args, LayerCache(*(x.astype(jnp.float32) for x in cache)), positions)
