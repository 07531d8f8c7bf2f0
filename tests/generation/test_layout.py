"""Weights as a GPU serves them: loaded as they are, and fused there, here on CPU devices that say they are one."""

import dataclasses

import numpy as np
import pytest

from llama_jax.generation import layout
from llama_jax.generation.engine import Engine
from llama_jax.generation.load import load
from llama_jax.generation.request import Row, Settings
from llama_jax.model.fused import is_fused
from tests.make_mesh import mesh_of, on, place
from tests.model.make import SMALL, params_of

CFG = dataclasses.replace(SMALL, num_heads=16, num_kv_heads=8)


def own(cfg, dtype="float16"):
    """Weights with a list of layers of their own, which may be emptied."""
    return {**params_of(cfg, dtype), "layers": list(params_of(cfg, dtype)["layers"])}


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(layout, "_platform", lambda params: "gpu")


def answers(params, mesh=None) -> list[int]:
    engine = Engine(CFG, params, 64, mesh, kernels=False)
    with on(mesh):
        state, first = engine.prefill([Row([1, 2, 3, 4, 5], Settings(max_new_tokens=9, temperature=0.0), ())] * 8, 8, 0)
        _, output = engine._advance(state, np.zeros(8, bool), 8, 0)
    return np.concatenate([first.tokens, output.tokens[:, :8]], axis=1).tolist()


def test_elsewhere_they_stay_as_they_are():
    params = own(CFG)
    assert layout.laid_out(params, None) is params and len(params["layers"]) == CFG.num_layers


def test_float32_stays_as_it_is(on_a_gpu):
    params = own(CFG, "float32")
    assert layout.laid_out(params, None) is params and len(params["layers"]) == CFG.num_layers


def test_a_gpu_generates_the_same_from_fused_ones(on_a_gpu):
    params = own(CFG)
    fused = layout.laid_out(params, None)
    assert all(map(is_fused, fused["layers"])) and len(fused["layers"]) == CFG.num_layers
    assert params["layers"] == []  # nothing is there twice
    assert answers(fused) == answers(own(CFG))


@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_gpus_that_share_a_model_do_too(on_a_gpu, name):
    mesh = mesh_of(name)
    fused = layout.laid_out(place(CFG, own(CFG), mesh), mesh)
    assert all(map(is_fused, fused["layers"]))
    kv_heads = {leaf.addressable_shards[0].data.shape[0] for leaf in (layer["qkv_proj"] for layer in fused["layers"])}
    assert kv_heads == {CFG.num_kv_heads // mesh.shape["tensor"]}
    assert answers(fused, mesh) == answers(own(CFG))


def test_more_gpus_than_heads_leave_them_apart(on_a_gpu):
    cfg, mesh = dataclasses.replace(CFG, num_kv_heads=2), mesh_of("1x1x8")
    placed = place(cfg, own(cfg), mesh)
    assert layout.laid_out(placed, mesh) is placed


def test_a_model_and_its_draft_are_laid_out_when_loaded(on_a_gpu):
    llama = load("bundled/checkpoint", draft="bundled/checkpoint")
    assert is_fused(llama.params["layers"][0]) and is_fused(llama.engine.guesses.draft.params["layers"][0])
