"""The training state: where every array lies, and that its values depend on the key alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax.config import PRESETS
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import init_params, param_axes, param_shapes
from llama_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama_jax.training.state import StateForm, init_state, state_shapes, state_shardings, trained_axes
from tests.make_mesh import MESHES, without_rematerialisation
from tests.training.make import CFG, TIED, assert_trees_close, on_host, training_mesh

SCANNED = StateForm(scan=True)


def moments(state) -> list:
    """Every tree of the optimizer's state that is like the parameters."""
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda part: hasattr(part, "mu"))
    return [tree for part in parts if hasattr(part, "mu") for tree in (part.mu, getattr(part, "nu", None)) if tree is not None]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("name", MESHES)
def test_moments_lie_where_their_parameters_do_and_counts_everywhere(name, optimizer, scan):
    mesh = training_mesh(name)
    optimizer_ = make_optimizer(OptimizerConfig(optimizer), param_axes(CFG, scan=scan))
    places = state_shardings(CFG, optimizer_, StateForm(scan), mesh=mesh)
    shapes = state_shapes(CFG, optimizer_, StateForm(scan), tensor=mesh.shape["tensor"])
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
    found = moments(places)
    assert len(found) == {"adamw": 2, "lion": 1, "sgd": 0}[optimizer]
    assert all(tree == places.params for tree in found)
    for shape, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True):
        assert shape.ndim > 0 or place.spec == PartitionSpec()
    assert places.step.spec == PartitionSpec()


@pytest.mark.parametrize(
    "optimizer, copies", [("adamw", 2), ("adafactor", 0), ("lion", 1), ("muon", 1.04), ("schedule_free", 2), ("sgd", 0)]
)
def test_an_optimizer_s_state_is_divided_as_the_weights_are(optimizer, copies):
    """Llama 2 7B on eight devices: bytes of each, in copies of its weights; muon has a second moment of two tables."""
    cfg, mesh = PRESETS["llama2_7b"], training_mesh("2x2x2")
    config = OptimizerConfig(optimizer, schedule="constant" if optimizer == "schedule_free" else "cosine")
    made = make_optimizer(config, trained_axes(cfg, SCANNED))
    shapes = state_shapes(cfg, made, SCANNED, tensor=2)
    places = state_shardings(cfg, made, SCANNED, mesh=mesh)

    def bytes_of(shapes, places) -> int:
        parts = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, places)
        return sum(jax.tree.leaves(parts))

    assert bytes_of(shapes.opt_state, places.opt_state) / bytes_of(shapes.params, places.params) == pytest.approx(
        copies, abs=0.01
    )


def test_the_shapes_of_a_state_are_those_of_its_parameters_and_moments():
    optimizer = make_optimizer(OptimizerConfig(moment_dtype="bfloat16"), param_axes(CFG, scan=True))
    shapes = state_shapes(CFG, optimizer, SCANNED, tensor=8)
    assert shapes.params == param_shapes(CFG, scan=True, tensor=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes.params)} == {jnp.dtype("float32")}
    mu, nu = moments(shapes)
    like = [jax.tree.map(lambda leaf, d=d: jax.ShapeDtypeStruct(leaf.shape, d), shapes.params) for d in ("bfloat16", "float32")]
    assert [mu, nu] == like


@pytest.fixture(scope="module")
def expected():
    """The parameters on one device, layers scanned."""
    params = jax.jit(init_params, static_argnums=0, static_argnames="scan")(CFG, jax.random.key(7), scan=True)
    return on_host(CFG, params)


@pytest.mark.parametrize("name", ["1x1x8", "2x2x2"])
def test_a_state_starts_from_the_same_values_on_every_mesh(expected, name):
    mesh = training_mesh(name)
    optimizer = make_optimizer(OptimizerConfig(), param_axes(CFG, scan=True))
    with without_rematerialisation():
        state = init_state(CFG, optimizer, jax.random.key(7), SCANNED, mesh=mesh)
    assert_trees_close(on_host(CFG, state.params), expected, atol=1e-8)  # the same bits, but for the last of a square root
    assert int(state.step) == 0
    for tree in moments(state):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(tree))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == state_shardings(CFG, optimizer, SCANNED, mesh=mesh)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    cfg = dataclasses.replace(CFG, num_heads=6)
    optimizer = make_optimizer(OptimizerConfig(), param_axes(cfg, scan=True))
    with pytest.raises(LlamaError, match=r"6 heads are not divisible by tensor=8; .*data=2 fsdp=2 tensor=2") as caught:
        init_state(cfg, optimizer, jax.random.key(0), SCANNED, mesh=training_mesh("1x1x8"))
    assert caught.value.code == ExitCode.BAD_MESH


def test_a_tied_head_has_no_parameter_and_no_moment_of_its_own():
    optimizer = make_optimizer(OptimizerConfig(), param_axes(TIED, scan=True))
    shapes = state_shapes(TIED, optimizer, SCANNED, tensor=1)
    assert all("lm_head" not in tree for tree in (shapes.params, *moments(shapes)))
