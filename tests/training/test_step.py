"""A training step: its gradients against float64, and what must change nothing: mesh, scan, rematerialisation, packing."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ModelConfig
from llama_jax.data.batch import batch_shapes
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import Params, param_axes, param_shapes, unstack_layers
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import TrainState, state_shapes
from llama_jax.training.step import StepConfig, batch_loss, make_train_step
from tests.generation.make import counting_compilations, log_softmax
from tests.make_mesh import MESHES, products, without_rematerialisation
from tests.model.make import reference_of
from tests.training.make import (
    CFG,
    OPTIMIZER,
    SEGMENTS,
    TIED,
    B,
    T,
    assert_trees_close,
    batch_of,
    initial_params,
    on_host,
    params_on,
    state_of,
    training_mesh,
)

FLOAT32 = StepConfig(dtype="float32", z_loss=1e-3)
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """Three steps: metrics of each, the first one's gradient after clipping, the parameters at the end; and the old states."""

    metrics: list[dict[str, float]]
    gradient: Params
    params: Params
    states: list[TrainState]
    compiled_after_the_first: list[str]


def run(cfg: ModelConfig, name: str | None, config: StepConfig = FLOAT32) -> Run:
    mesh = training_mesh(name)
    state, optimizer = state_of(cfg, mesh, config.form())
    step = make_train_step(cfg, config, optimizer, mesh)
    states, metrics = [state], []
    with jax.set_mesh(mesh):
        with without_rematerialisation():
            state, numbers = step(state, batch_of(cfg))
        moment = next(part for part in state.opt_state if hasattr(part, "mu")).mu
        gradient = jax.tree.map(lambda m: m / (1 - OPTIMIZER.b1), on_host(cfg, moment))
        metrics.append(numbers)
        with counting_compilations() as compiled:
            for seed in range(1, STEPS):
                states.append(state)
                state, numbers = step(state, batch_of(cfg, seed))
                metrics.append(numbers)
    metrics = [{key: float(value) for key, value in numbers.items()} for numbers in metrics]
    return Run(metrics, gradient, on_host(cfg, state.params), [*states, state], compiled)


@pytest.fixture(scope="module")
def alone():
    """The run on one device, layers scanned."""
    return run(CFG, None)


def assert_same(ours: Run, wanted: Run) -> None:
    assert ours.compiled_after_the_first == wanted.compiled_after_the_first == []
    for a, b in zip(ours.metrics, wanted.metrics, strict=True):
        np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-5)
    assert_trees_close(ours.gradient, wanted.gradient, atol=1e-6)
    assert_trees_close(ours.params, wanted.params)


# The whole step


@pytest.mark.parametrize("name", MESHES)
def test_three_steps_are_the_same_and_compiled_once_on_every_mesh(alone, name):
    assert_same(run(CFG, name), alone)


def test_three_steps_are_the_same_unrolled_on_a_mesh(alone):
    assert_same(run(CFG, "2x2x2", dataclasses.replace(FLOAT32, scan_layers=False, remat="projections")), alone)


def test_a_batch_in_parts_is_the_whole_batch(alone):
    """Weighed by targets, of which the parts have unequally many, not by rows."""
    parts = run(CFG, "2x2x2", dataclasses.replace(FLOAT32, accumulate=2))
    assert_same(parts, alone)
    for ours, wanted in zip(parts.metrics, alone.metrics, strict=True):
        np.testing.assert_allclose(ours["loss"], wanted["loss"], rtol=1e-6)


def test_a_step_learns_counts_and_reports(alone):
    end = alone.states[-1]
    assert int(end.step) == STEPS and end.step.dtype == jnp.int32
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone.params, initial_params(CFG))
    assert min(jax.tree.leaves(moved)) > 1e-3  # every parameter
    assert all(abs(numbers["loss"] - np.log(CFG.vocab_size)) < 1 for numbers in alone.metrics)
    assert all(numbers["grad_norm"] > 0.1 for numbers in alone.metrics)


def test_the_norm_reported_is_that_before_clipping(alone):
    """The gradient that the moments saw has a norm of at most 1."""
    seen = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(alone.gradient)))
    norm = alone.metrics[0]["grad_norm"]
    np.testing.assert_allclose(seen, min(norm, OPTIMIZER.clip_norm), rtol=1e-5)


def test_the_old_state_s_memory_is_the_new_one_s(alone):
    *old, new = alone.states
    for state in old:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


# Gradients


def loss_and_gradient(config: StepConfig, cfg: ModelConfig = CFG):
    return jax.jit(jax.value_and_grad(lambda params, batch: batch_loss(cfg, config, params, batch)[0]))


@pytest.fixture(scope="module")
def params() -> Params:
    """On one device, layers stacked."""
    return params_on(CFG, training_mesh(None), scan=True)


@pytest.fixture(scope="module")
def plain():
    """Loss and gradient, layers scanned, with everything remembered and no z-loss."""
    return loss_and_gradient(StepConfig(dtype="float32", remat="none"))


def float64_loss(cfg: ModelConfig, params: Params, batch, rows: int) -> float:
    """Of the first rows, each of their sequences alone through the NumPy reference; layers a list."""
    total, weight = 0.0, float(np.sum(batch.weights[:rows], dtype=np.float64))
    ends = np.cumsum(SEGMENTS)
    for b in range(rows):
        for begin, end in zip(ends - SEGMENTS, ends, strict=True):
            logprobs = log_softmax(reference_of(cfg, params, batch.tokens[b, begin:end]))
            chosen = logprobs[np.arange(end - begin), batch.targets[b, begin:end]]
            total -= float(np.sum(chosen * batch.weights[b, begin:end]))
    return total / weight


def test_the_loss_of_packed_rows_and_its_gradient_are_those_of_their_sequences_alone(params, plain):
    """In float64: the loss, and by how much it changes when each kind of weight moves a little in a random direction."""
    rows, step = 2, 1e-6
    batch = batch_of()
    batch.weights[rows:] = 0
    loss, gradient = plain(params, batch)
    rng = np.random.default_rng(0)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    np.testing.assert_allclose(loss, float64_loss(CFG, unstack_layers(exact), batch, rows), rtol=1e-5)
    leaves = dict(jax.tree_util.tree_leaves_with_path(gradient))
    assert len(leaves) == 12
    for path, leaf in leaves.items():
        leaf, direction = np.asarray(leaf, np.float64), rng.normal(size=leaf.shape)
        ahead, behind = (
            float64_loss(CFG, unstack_layers(_moved(exact, path, amount * direction)), batch, rows) for amount in (step, -step)
        )
        size = np.linalg.norm(leaf)
        assert size > 1e-3
        assert abs(np.sum(leaf * direction) - (ahead - behind) / (2 * step)) < 1e-4 * size, path


def _moved(params: Params, path: tuple, by: np.ndarray) -> Params:
    return jax.tree.map_with_path(lambda other, leaf: leaf + by if other == path else leaf, params)


@pytest.mark.parametrize(
    "remat, scan", [("full", True), ("projections", True), ("offload", True), ("none", False), ("projections", False)]
)
def test_what_is_remembered_changes_no_gradient(params, plain, remat, scan):
    loss, gradient = plain(params, batch_of())
    config = StepConfig(dtype="float32", remat=remat, scan_layers=scan)
    ours, ours_gradient = loss_and_gradient(config)(params if scan else unstack_layers(params), batch_of())
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    assert_trees_close(on_host(CFG, ours_gradient), on_host(CFG, gradient), atol=1e-6)


def test_the_gradient_of_a_tied_table_is_the_same_on_a_mesh():
    """That of the lookup and that of the head, added."""
    config = StepConfig(dtype="float32")
    found = []
    for name in (None, "2x2x2"):
        mesh = training_mesh(name)
        with jax.set_mesh(mesh), without_rematerialisation():
            loss, gradient = loss_and_gradient(config, TIED)(params_on(TIED, mesh, scan=True), batch_of(TIED))
        found.append((float(loss), on_host(TIED, gradient)))
    (wanted, wanted_gradient), (ours, ours_gradient) = found
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    assert_trees_close(ours_gradient, wanted_gradient, atol=1e-6)


def test_targets_of_weight_0_are_ignored(params, plain):
    batch = batch_of()
    others = batch._replace(targets=np.where(batch.weights > 0, batch.targets, (batch.targets + 1) % CFG.vocab_size))
    assert np.any(others.targets != batch.targets)
    for ours, wanted in zip(jax.tree.leaves(plain(params, others)), jax.tree.leaves(plain(params, batch)), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_the_loss_is_a_mean_over_the_targets_that_count(params, plain):
    """So a batch twice, or with rows that do not count, has the same loss and gradient."""
    batch = batch_of()
    half = batch._replace(weights=batch.weights * (np.arange(B) < 4)[:, None])
    twice = type(batch)(*(np.concatenate([part[:4], part[:4]]) for part in batch))
    for ours, wanted in zip(jax.tree.leaves(plain(params, twice)), jax.tree.leaves(plain(params, half)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient(params, plain):
    for leaf in jax.tree.leaves(plain(params, batch_of()._replace(weights=np.zeros((B, T), np.float32)))):
        np.testing.assert_array_equal(leaf, 0)


# What a step computes in


def test_a_bfloat16_step_has_float32_gradients_near_the_float32_ones(params, plain):
    loss, gradient = plain(params, batch_of())
    ours, ours_gradient = loss_and_gradient(StepConfig())(params, batch_of())
    assert ours.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(ours_gradient)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(ours, loss, rtol=2e-3)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours_gradient), jax.tree.leaves(gradient), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b), path


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_no_product_of_a_bfloat16_step_is_of_float32(scan):
    """Forward, backward and loss: all that matrix units multiply is bfloat16, all they give is float32."""
    gradient = jax.grad(functools.partial(batch_loss, CFG, StepConfig(scan_layers=scan)), has_aux=True)
    found = products(gradient, param_shapes(CFG, scan=scan), batch_of())
    assert len(found) > 20
    bf16, f32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert set(found) == {(bf16, bf16, f32)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(dtype="float16"), "dtype is 'float16', expected one of bfloat16, float32"),
        (dict(remat="some"), "remat is 'some', expected one of none, full, projections, offload"),
    ],
)
def test_a_setting_that_is_unknown_is_refused_with_the_known_ones(wrong, message):
    with pytest.raises(LlamaError, match=message) as caught:
        StepConfig(**wrong)
    assert caught.value.code == ExitCode.BAD_CONFIG


def traced(mesh_name: str, rows: int) -> None:
    """Traces a step for a batch of so many rows, and compiles nothing."""
    mesh = training_mesh(mesh_name)
    optimizer = make_optimizer(OPTIMIZER, param_axes(CFG, scan=True))
    shapes = state_shapes(CFG, optimizer, FLOAT32.form(), tensor=mesh.shape["tensor"])
    jax.eval_shape(make_train_step(CFG, FLOAT32, optimizer, mesh), shapes, batch_shapes(rows, T))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with jax.set_mesh(training_mesh("8x1x1")):
        with pytest.raises(LlamaError, match="a batch of 12 is not divisible by data \\* fsdp = 8") as caught:
            traced("8x1x1", 12)
        traced("8x1x1", 16)
    assert caught.value.code == ExitCode.BAD_MESH


@pytest.mark.parametrize("around", [None, "8x1x1"])
def test_a_step_outside_its_mesh_is_refused(around):
    """It would run, on one device or divided otherwise."""
    with contextlib.nullcontext() if around is None else jax.set_mesh(training_mesh(around)):
        with pytest.raises(ValueError, match=r"outside jax.set_mesh\(mesh\)"):
            traced("2x2x2", 8)
