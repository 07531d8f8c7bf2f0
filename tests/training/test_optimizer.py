"""The optimizer: what decays, how the rate goes, what is clipped, what a moment is kept in."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import param_axes, stack_layers
from llama_jax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from tests.model.make import params_of
from tests.training.make import CFG, assert_trees_close

PLAIN = OptimizerConfig("sgd", peak_lr=1.0, warmup_steps=0, total_steps=10**9, weight_decay=0.0, clip_norm=1e9)


def config_of(name: str, **more) -> OptimizerConfig:
    schedule = "constant" if name == "schedule_free" else "cosine"
    return OptimizerConfig(name, **dict(schedule=schedule, peak_lr=1e-2, warmup_steps=1, total_steps=10) | more)


def drawn(tree, seed: int = 0, scale: float = 1e-2):
    """Gradients for a tree."""
    leaves, form = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return form.unflatten([jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def updates_of(config: OptimizerConfig, params, gradients: list, *, scan: bool = False) -> list:
    """What is added to the parameters in each of so many steps; parameters stay as they are."""
    optimizer = make_optimizer(config, param_axes(CFG, scan=scan))
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found


def rates_of(config: OptimizerConfig, steps: list[int]) -> np.ndarray:
    """The learning rate at steps, from updates of plain gradient descent by a gradient of one."""
    optimizer = make_optimizer(dataclasses.replace(config, name="sgd", weight_decay=0.0, clip_norm=1e9), {"w": ("embed",)})
    gradient = {"w": jnp.ones(1)}

    def rate(step):
        state = jax.tree.map(lambda leaf: jnp.asarray(step, leaf.dtype), optimizer.init(gradient))  # counts are all it has
        return -optimizer.update(gradient, state, gradient)[0]["w"][0]

    return np.asarray(jax.vmap(rate)(np.asarray(steps)))


def test_the_rate_rises_linearly_and_falls_along_a_cosine():
    config = OptimizerConfig(peak_lr=3e-4, warmup_steps=100, total_steps=1100, final_ratio=0.1)
    rates = rates_of(config, [0, 1, 50, 100, 350, 600, 1100, 5000])
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x)) for x in (0.25, 0.5)]
    np.testing.assert_allclose(rates, 3e-4 * np.array([0, 0.01, 0.5, 1, *cosine, 0.1, 0.1]), rtol=1e-5, atol=1e-10)


def test_without_warm_up_the_first_rate_is_the_peak():
    np.testing.assert_allclose(rates_of(OptimizerConfig(peak_lr=2e-3, warmup_steps=0, total_steps=50), [0]), 2e-3, rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_is_all_warm_up():
    rates = rates_of(OptimizerConfig(peak_lr=1.0, warmup_steps=2000, total_steps=10), [0, 10, 1000])
    np.testing.assert_allclose(rates, [0, 0.005, 0.5], rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_matrices_decay_and_norms_do_not(scan):
    """Times the rate; the same whether layers are stacked, where a norm has two axes, or not."""
    params = stack_layers(params_of(CFG)) if scan else params_of(CFG)
    nothing = jax.tree.map(jnp.zeros_like, params)
    (updates,) = updates_of(dataclasses.replace(PLAIN, weight_decay=0.1, peak_lr=0.5), params, [nothing], scan=scan)
    for (path, update), weight in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        decays = not path[-1].key.endswith("norm")
        np.testing.assert_allclose(update, -0.05 * weight if decays else 0 * weight, rtol=1e-6, atol=0, err_msg=str(path))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_are_updated_as_they_are_one_by_one(name):
    config = config_of(name, clip_norm=0.5)
    params = params_of(CFG)
    gradients = [drawn(params, seed) for seed in range(3)]
    apart = updates_of(config, params, gradients)
    stacked = updates_of(config, stack_layers(params), [stack_layers(gradient) for gradient in gradients], scan=True)
    for one, other in zip(apart, stacked, strict=True):
        assert_trees_close(other, stack_layers(one), atol=1e-7)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(apart[-1])) > 1e-3 if name != "sgd" else True


def test_adamw_is_the_formula():
    """Bias-corrected moments, epsilon outside the root, decay beside them (Loshchilov and Hutter 2019, algorithm 2)."""
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=0, total_steps=10**9, clip_norm=1e9, b1=0.8, b2=0.9, eps=1e-3)
    params = {"w": jnp.asarray([[1.0, -2.0, 0.5]])}
    gradients = [np.array([[0.3, -0.1, 1e-4]]) * factor for factor in (1, -2, 0.5)]
    optimizer = make_optimizer(config, {"w": ("mlp", "embed")})
    state, m, v = optimizer.init(params), np.zeros((1, 3)), np.zeros((1, 3))
    for t, gradient in enumerate(gradients, start=1):
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.1 * np.asarray(params["w"], np.float64)
        np.testing.assert_allclose(updates["w"], -0.1 * step, rtol=1e-5)


def test_gradients_are_scaled_down_to_a_norm_and_never_up():
    params = params_of(CFG)
    gradient = drawn(params)
    norm = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(gradient)))
    assert norm > 1
    for clip, factor in ((0.25 * norm, 0.25), (4 * norm, 1.0)):
        (updates,) = updates_of(dataclasses.replace(PLAIN, clip_norm=float(clip)), params, [gradient])
        assert_trees_close(updates, jax.tree.map(lambda leaf, f=factor: -f * leaf, gradient), atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_is_kept_in_the_dtype_asked_for_and_updates_are_float32(name, dtype):
    params = params_of(CFG)
    optimizer = make_optimizer(OptimizerConfig(name, moment_dtype=dtype), param_axes(CFG))
    updates, state = jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    moments = next(part for part in state if hasattr(part, "mu"))
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {jnp.dtype(dtype)}
    if name == "adamw":
        assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}


def test_an_infinite_norm_clips_nothing():
    params = params_of(CFG)
    gradient = drawn(params, scale=1e3)
    (updates,) = updates_of(dataclasses.replace(PLAIN, clip_norm=math.inf), params, [gradient])
    jax.tree.map(lambda update, g: np.testing.assert_array_equal(update, -g), updates, gradient)


def test_plain_descent_keeps_no_moments():
    state = jax.eval_shape(make_optimizer(PLAIN, param_axes(CFG)).init, params_of(CFG))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(name="adam"), "optimizer 'adam' is unknown; known: adamw, adafactor, lion, muon, schedule_free, sgd"),
        (dict(moment_dtype="float16"), "moment_dtype is 'float16', expected one of float32, bfloat16"),
        (dict(peak_lr=0.0), "peak_lr is 0.0, expected a positive number"),
        (dict(clip_norm=float("nan")), "clip_norm is nan, expected a positive number"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1, expected 0 or more"),
        (dict(warmup_steps=-1), "warmup_steps is -1, expected 0 or more"),
        (dict(b2=1.0), "b2 is 1.0, expected 0 or more, below 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(LlamaError, match=message) as caught:
        OptimizerConfig(**wrong)
    assert caught.value.code == ExitCode.BAD_CONFIG
